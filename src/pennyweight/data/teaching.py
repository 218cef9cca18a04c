"""Data from a teacher: three ways to spend its queries, and questions grounded in documents.

Row 89. Source: Y. Chan et al., "Balancing Cost and Effectiveness of Synthetic Data Generation Strategies for LLMs",
arXiv:2409.19759: new answers to old questions, rephrased questions, or new ones. Row 59. Source: Z. Qin et al.,
"Scaling Laws of Synthetic Data for Language Models", arXiv:2503.19551: questions from one document (level 1), from
concepts recombined within a document (level 2), or from concepts of a walk on the graph of all documents (level 3).
Differs from the sources: any callable stands for the language model, and concepts are what a callable finds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from pennyweight.elementwise import numbers
from pennyweight.errors import BudgetError, DataError, OptionError

Example = tuple[str, str]


class Teacher(Protocol):
    """What is asked; each call is one query."""

    def answer(self, question: str, rng: np.random.Generator) -> str:
        """An answer, with its reasoning."""
        ...

    def rephrase(self, question: str, rng: np.random.Generator) -> str:
        """The question in other words."""
        ...

    def invent(self, question: str, rng: np.random.Generator) -> str:
        """Another question like it."""
        ...


class Augmented(NamedTuple):
    """Examples made, the strategy that made them, and the queries they took."""

    examples: list[Example]
    strategy: str
    queries: int


def augment(
    strategy: Literal["answer", "rephrase", "new", "auto"],
    teacher: Teacher,
    seeds: Sequence[str],
    budget: int,
    *,
    verify: Callable[[str, str], bool] | None = None,
    arms: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Augmented:
    """Spend ``budget`` teacher queries on examples.

    Args:
        strategy: "answer" (one query an example), "rephrase" or "new" (two); "auto" asks `plan.augmentation`.
        teacher: see `Teacher`.
        seeds: questions there are.
        budget: queries.
        verify: keeps an example (question, answer) when true; the queries are spent all the same.
        arms: laws of the strategies for "auto", of `plan.augmentation_arms.fit_arms`.
        seed: of the draws.

    Raises:
        OptionError: an unknown strategy, or no seeds.
        BudgetError: a budget that pays no example.
    """
    if not seeds:
        raise OptionError("augment: no seed questions; give at least one")
    if strategy == "auto":
        from pennyweight.plan.augmentation_arms import augmentation

        strategy = augmentation(len(seeds), budget, arms=arms).strategy
    if strategy not in ("answer", "rephrase", "new"):
        raise OptionError(f"augment: strategy = {strategy!r}; give answer, rephrase, new or auto")
    each = 1 if strategy == "answer" else 2
    numbers("augment", budget=budget)
    if int(budget) != budget:
        raise OptionError(f"augment: budget = {budget!r}; give a whole number of queries")
    budget = int(budget)
    if budget < each:
        raise BudgetError(f"augment: a budget of {budget} pays no {strategy} example, which takes {each} queries")
    rng = np.random.default_rng(seed)
    found: list[Example] = []
    for at in range(budget // each):
        question = seeds[at % len(seeds)]
        if strategy == "rephrase":
            question = teacher.rephrase(question, rng)
        elif strategy == "new":
            question = teacher.invent(question, rng)
        answer = teacher.answer(question, rng)
        if verify is None or verify(question, answer):
            found.append((question, answer))
    return Augmented(found, strategy, budget // each * each)


@dataclass(frozen=True)
class ConceptGraph:
    """Topics and concepts of documents, joined where they occur together.

    Attributes:
        topics: of each document.
        concepts: of each document.
        epsilon: added to counts, so that every edge of the walk has a chance.
    """

    topics: tuple[tuple[str, ...], ...]
    concepts: tuple[tuple[str, ...], ...]
    epsilon: float = 1.0
    _edges: dict[str, Counter[str]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.topics) != len(self.concepts) or not any(self.concepts):
            raise DataError(
                f"concept graph: topics of {len(self.topics)} documents, concepts of {len(self.concepts)}; give both"
            )
        for topics, concepts in zip(self.topics, self.concepts, strict=True):
            both = [*(f"topic {t}" for t in dict.fromkeys(topics)), *dict.fromkeys(concepts)]
            for one in both:
                self._edges.setdefault(one, Counter()).update(other for other in both if other != one)

    @classmethod
    def of(cls, documents: Sequence[str], find: Callable[[str], tuple[Sequence[str], Sequence[str]]]) -> ConceptGraph:
        """From documents and a callable that finds (topics, concepts) of one."""
        found = [find(document) for document in documents]
        return cls(tuple(tuple(t) for t, _ in found), tuple(tuple(c) for _, c in found))

    def probabilities(self, node: str, *, topics: bool) -> tuple[list[str], np.ndarray[Any, Any]]:
        """Where a walk goes from ``node``: softmax of log(count + epsilon), so in proportion to count + epsilon."""
        edges = self._edges.get(node, Counter())
        near = sorted(other for other in edges if other.startswith("topic ") == topics)
        weights = np.array([edges[other] + self.epsilon for other in near], dtype=float)
        return near, weights / weights.sum() if near else weights

    def walk(self, rng: np.random.Generator) -> list[str]:
        """Concepts of one walk: a topic, 1-2 steps among topics, one to a concept, 3-4 among concepts."""
        everywhere = sorted(name for name in self._edges if name.startswith("topic "))
        if not everywhere:
            raise DataError("concept graph: no topics to start a walk from; give some")
        node = everywhere[rng.integers(len(everywhere))]
        for _ in range(int(rng.integers(1, 3))):
            node = self._step(node, rng, topics=True) or node
        concept = self._step(node, rng, topics=False)
        found: dict[str, None] = {}
        for _ in range(int(rng.integers(3, 5)) + 1):
            if concept is None:
                break
            found[concept] = None
            concept = self._step(concept, rng, topics=False)
        return list(found)

    def _step(self, node: str, rng: np.random.Generator, *, topics: bool) -> str | None:
        near, chance = self.probabilities(node, topics=topics)
        return str(near[rng.choice(len(near), p=chance)]) if near else None

    def nearest(self, concepts: Sequence[str], count: int = 2) -> list[int]:
        """Documents of the largest Jaccard overlap with ``concepts``; ties by number."""
        wanted = set(concepts)
        overlap = [len(wanted & set(own)) / max(1, len(wanted | set(own))) for own in self.concepts]
        return sorted(range(len(overlap)), key=lambda at: (-overlap[at], at))[:count]


class Grounded(NamedTuple):
    """A question made, with the documents and concepts it came from."""

    question: str
    documents: tuple[int, ...]
    concepts: tuple[str, ...]


def synthesise(
    level: Literal[1, 2, 3],
    concept_graph: ConceptGraph,
    *,
    documents: Sequence[str],
    generate: Callable[[Sequence[str], Sequence[str], np.random.Generator], str],
    count: int,
    seed: int = 0,
) -> list[Grounded]:
    """Questions grounded in documents.

    Args:
        level: 1 from one document as it is; 2 from topics and concepts recombined within one; 3 from a walk on the
            graph and the two documents nearest to it.
        concept_graph: of the documents.
        documents: texts, in the order of the graph.
        generate: a question from texts and concepts.
        count: of questions; exact repetitions are dropped, so fewer may come back.
        seed: of the draws.

    Raises:
        OptionError: an unknown level, or a graph of other documents.
    """
    if level not in (1, 2, 3) or len(documents) != len(concept_graph.concepts) or count < 1:
        raise OptionError(
            f"synthesise: level {level}, {len(documents)} documents, a graph of {len(concept_graph.concepts)}, "
            f"count {count}; give level 1, 2 or 3, the graph's own documents and at least 1"
        )
    rng = np.random.default_rng(seed)
    found: dict[str, Grounded] = {}
    for at in range(count):
        for sources, concepts in _grounds(level, concept_graph, at % len(documents), rng):
            question = generate([documents[i] for i in sources], concepts, rng)
            found.setdefault(question, Grounded(question, tuple(sources), tuple(concepts)))
    return list(found.values())


def _grounds(
    level: int, graph: ConceptGraph, at: int, rng: np.random.Generator
) -> Iterator[tuple[list[int], list[str]]]:
    own = list(graph.concepts[at])
    if level == 1:
        yield [at], own[:1]
    elif level == 2:
        many = min(len(own), 1 + int(rng.integers(1, 4)))
        yield [at], [own[i] for i in sorted(rng.choice(len(own), many, replace=False))] if own else []
    else:
        concepts = graph.walk(rng)
        yield graph.nearest(concepts), concepts


def diversity(questions: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all of them: 1 where none repeats."""
    grams = [tuple(parts[i : i + n]) for q in questions for parts in (q.split(),) for i in range(len(parts) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


#: American spelling of the same.
synthesize = synthesise
