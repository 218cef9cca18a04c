"""What claims about merging encoders share: MiniLM, four experts fine-tuned from its blocks, and ways to merge them.

Tweets (three moods), film reviews (two), and which of 16 modules of program code, or of 16 articles, a piece is from.
Classes are texts: a head is what the base makes of their words, and is never trained, so that encoders can be merged
whole. Two more tasks that no expert saw: 16 other modules, and which news a later piece of it belongs to; there both
sides are read by the model that is judged. Pieces to judge by are never trained on.

Shape letters: W pieces, T tokens, C classes, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pennyweight.claims.experts import parameters
from pennyweight.claims.tiny import one_thread
from pennyweight.data import documents
from pennyweight.data.tables import labelled_text
from pennyweight.evaluate.embedding import pool
from pennyweight.merge.engine import merge_tensors
from pennyweight.merge.expert import Learned, importance_chunks, merge_experts
from pennyweight.merge.moments import read_moments, second_moments
from pennyweight.merge.ota import OTA
from pennyweight.merge.study import METHODS, Study, Tensors, Way, study
from pennyweight.model.loading import load
from pennyweight.model.model import Model
from pennyweight.train import Samples, Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine

TASKS = ("tweets", "polarity", "stdlib-code", "wiki")
OUTSIDE = ("other modules", "news")
_LENGTH = {"polarity": 40}  # tokens; 16 of all others
SHARPNESS = 20.0  # of cosines, as MiniLM was trained
_CLASSES = 16
_STEPS = {"polarity": 10}  # of 136 sentences; 40 of all others
_MOODS = {
    "tweets": ("a sad, angry or unhappy message", "a neutral message that states a fact", "a happy, excited message"),
    "polarity": ("a bad, boring film", "a good, moving film"),
}


@dataclass(frozen=True)
class Task:
    """Pieces of text and the classes they are of.

    Attributes:
        classes: token ids (C, T) of what says each class in words.
        train: (W, T), with `labels` (W,).
        held: (W, T) to judge by, with `held_labels`.
    """

    classes: Tensor
    train: Tensor
    labels: Tensor
    held: Tensor
    held_labels: Tensor


class Encoder(nn.Module):
    """MiniLM's blocks as parameters, its tables beside them: rows (W, 1+T), a task and ids, to logits (W, C)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        layers = copy.deepcopy(bert.get_submodule("encoder.layer"))
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        self.tables = (bert.get_submodule("embeddings"),)  # in a tuple: nobody trains or merges them
        self.heads: list[Tensor] = []
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # else training would hang on torch's global seed

    def embed(self, ids: Tensor) -> Tensor:
        """Mean over tokens of length 1: (W, T) to (W, D)."""
        with torch.no_grad():
            states: Tensor = self.tables[0](ids)
        seen = ids != 0
        for layer in self.layers:
            states = layer(states, seen[:, None, None, :])
        return pool(states, seen)

    def forward(self, rows: Tensor) -> Tensor:
        """All rows are of the first one's task; -1 gives embeddings."""
        task, found = int(rows[0, 0]), self.embed(rows[:, 1:])
        return found if task < 0 else SHARPNESS * found @ self.heads[task].T


@cache
def _minilm() -> Model:
    return load("minilm-l6")


@cache
def task(name: str) -> Task:
    """One of `TASKS` or `OUTSIDE`."""
    g = torch.Generator().manual_seed(0)
    if name in _MOODS:
        known, (train, held) = labelled_text(name), {"tweets": (1600, 96), "polarity": (136, 64)}[name]
        order = torch.randperm(len(known.texts), generator=g)[: train + held].tolist()
        pieces = _ids([known.texts[n] for n in order], _LENGTH.get(name, 16))
        labels = torch.tensor([known.labels[n] for n in order])
        return Task(_ids(_MOODS[name]), pieces[:train], labels[:train], pieces[train:], labels[train:])
    if name == "news":
        texts = [text for text in documents(name) if len(text.split()) > 80][:64]
        later = _ids([" ".join(text.split()[40:]) for text in texts])
        return Task(_ids(texts), later[:0], torch.empty(0).long(), later, torch.arange(len(texts)))
    first = _CLASSES if name == "other modules" else 0
    texts = sorted(documents("stdlib-code" if first else name), key=len, reverse=True)[first : first + _CLASSES]
    train, held = (0 if first else 100), 6
    chosen: list[list[str]] = []
    for text in texts:
        words = text.split()[30:]  # what begins a text says its class
        pieces_of = [" ".join(words[at : at + 15]) for at in range(0, len(words) - 15, 15)]
        chosen.append([pieces_of[n] for n in torch.randperm(len(pieces_of), generator=g)[: train + held].tolist()])
    labels = torch.arange(len(texts))
    return Task(
        _ids(texts),
        _ids([piece for found in chosen for piece in found[held:]]) if train else torch.empty(0, 16).long(),
        labels.repeat_interleave(train),
        _ids([piece for found in chosen for piece in found[:held]]),
        labels.repeat_interleave(held),
    )


def _ids(texts: Sequence[str], length: int = 16) -> Tensor:
    """(W, T), cut or filled with 0."""
    encode = _minilm().tokenizer
    assert encode is not None
    short = [text[:400] for text in texts]
    found: Tensor = encode(
        short, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return found


def _rows(name: str, ids: Tensor) -> Tensor:
    """What an `Encoder` reads: (W, 1+T)."""
    return functional.pad(ids, (1, 0), value=TASKS.index(name) if name in TASKS else -1)


@dataclass(frozen=True)
class Encoders:
    """The base, the experts in the order of `TASKS`, and each one's second moments."""

    base: Encoder
    models: tuple[Encoder, ...]
    moments: tuple[dict[str, Tensor], ...]

    def losses(self, tensors: Tensors) -> Sequence[float]:
        """Nats a piece on each of `TASKS` and `OUTSIDE`, of the base with these parameters; found when looked at."""
        return _Losses(self.base, tensors)


class _Losses(Sequence[float]):
    """A study looks at the tasks of the experts it has merged, and at those of none: so no others are run."""

    def __init__(self, base: Encoder, tensors: Tensors) -> None:
        self.base, self.tensors, self.names = base, dict(tensors), (*TASKS, *OUTSIDE)
        self.found: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> list[float]: ...
    def __getitem__(self, place: int | slice) -> float | list[float]:
        if isinstance(place, slice):
            return [self[n] for n in range(len(self))[place]]
        if place not in self.found:
            self.found[place] = self._loss(self.names[place])
        return self.found[place]

    @torch.inference_mode()
    def _loss(self, name: str) -> float:
        def read(ids: Tensor) -> Tensor:
            found: Tensor = functional_call(self.base, self.tensors, (_rows(name, ids),))
            return found

        one = task(name)
        logits = read(one.held)
        if name in OUTSIDE:
            logits = SHARPNESS * logits @ read(one.classes).T
        return float(functional.cross_entropy(logits, one.held_labels))


def _trained(base: Encoder, name: str) -> tuple[Encoder, dict[str, Tensor]]:
    one, module = task(name), copy.deepcopy(base)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    steps = _STEPS.get(name, 40)
    samples = Samples(_rows(name, one.train), one.labels, seed=TASKS.index(name))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    schedule = cosine(total=steps, warmup=4, peak=1e-4)
    Trainer(module, optimizer, samples, batch=32, loss=loss, schedule=schedule, clip=1.0).run(steps)
    return module.eval(), second_moments(module, optimizer)


@cache
def encoders() -> Encoders:
    """Trained once a process, in one to two minutes on one thread."""
    base = Encoder(_minilm().module).eval()
    with torch.no_grad():
        base.heads = [base.embed(task(name).classes) for name in TASKS]
    found = [_trained(base, name) for name in TASKS]
    return Encoders(base, tuple(one for one, _ in found), tuple(moments for _, moments in found))


#: Options of learned merges, those of the claim with byte-level experts.
_LEARNING: dict[str, Any] = {"initial": 0.3, "rate": 0.1, "epochs": 10, "batch": 8}


@cache
def studied() -> Study:
    """Two and four experts, every method; those with a scale have the better of two by what is judged."""
    with one_thread():
        known = encoders()
        base = parameters(known.base)

        def ota(density: float) -> Way:
            def way(chosen: Sequence[int]) -> Tensors:
                moments = tuple(read_moments(known.moments[n]) for n in chosen)
                return merge_tensors(OTA(moments=moments, density=density), [models[n] for n in chosen], base)

            return way

        def samples(chosen: Sequence[int]) -> list[Tensor]:
            trained_on = [(TASKS[n], task(TASKS[n]).train) for n in chosen]
            return [_rows(name, ids[:: len(ids) // 8][:8]) for name, ids in trained_on]  # of several classes

        @cache
        def by_tensor(chosen: tuple[int, ...]) -> Learned:
            return merge_experts(known.base, [known.models[n] for n in chosen], samples(chosen), **_LEARNING)

        def by_chunk(chosen: Sequence[int]) -> Tensors:
            experts, first = [known.models[n] for n in chosen], by_tensor(tuple(chosen))
            chunks = importance_chunks(known.base, experts, first, budget=3 * len(base))
            return merge_experts(known.base, experts, samples(chosen), chunks=chunks, **_LEARNING).tensors

        methods: dict[str, Sequence[Way]] = {
            # of the grid of all 0.3 is left out to save time: it is near the plain average
            **{name: [way for way in ways if getattr(way, "scale", 1.0) != 0.3] for name, ways in METHODS.items()},
            "ota": [ota(1.0)],
            "ota + ffg": [ota(0.4)],
            "expert merging": [lambda chosen: by_tensor(tuple(chosen)).tensors],
            "expert merging ++": [by_chunk],
        }
        models = [parameters(one) for one in known.models]
        return study(base, models, known.losses, counts=(2, 4), methods=methods)
