"""Row 89, synthetic data: few queries a seed favor more answers, many favor new questions; laws of pilots know when.

The order of the arms is shown here; that laws of pilots find the winner in four budgets of five is not (see `holds`):
below three queries a seed the arms lie within a point of each other, nearer than three students tell.

Shape letters: Q examples, T tokens.
"""

from __future__ import annotations

from functools import partial
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.data.teaching import Example, augment
from pennyweight.plan import augmentation_arms
from pennyweight.train import Samples, Trainer
from pennyweight.train.samples import Batch
from pennyweight.train.schedules import cosine
from pennyweight.zoo.gpt import GPT, GPTConfig

_SIDE = 12  # adjectives, and as many nouns
_TEMPLATES = ("say {a} {n} for me ?", "how is {a} {n} said ?", "{a} {n} , what is it", "i want to say {a} {n}")
_REASONS = ("{u} {v} .", "{v} to {u} = {u} {v} .", "{n} , {a} = {u} {v} .")
_WORDS = [
    "pad", *(f"a{at}" for at in range(_SIDE)), *(f"n{at}" for at in range(_SIDE)), *(f"v{at}" for at in range(_SIDE)),
    *(f"u{at}" for at in range(_SIDE)), *"say for me how is said what it i want to ? , = .".split(),
]  # fmt: skip
_NUMBER = {word: at for at, word in enumerate(_WORDS)}
_QUESTION, _LENGTH, _TESTS = 6, 13, 300
_WRONG = 0.15  # of what the teacher says to questions it made up itself
_STEPS, _BATCH, _STUDENTS = 200, 32, (0, 1, 2)
_RATIOS = (1, 2, 10, 50)  # queries a seed
_PILOTS, _JUDGED = (8, 32), (12, 20)  # seeds


def _asked(pair: tuple[int, int], rng: np.random.Generator) -> str:
    return _TEMPLATES[rng.integers(len(_TEMPLATES))].format(a=f"a{pair[0]}", n=f"n{pair[1]}")


def _drawn(rng: np.random.Generator) -> tuple[int, int]:
    adjective, noun = rng.integers(_SIDE, size=2).tolist()
    return adjective, noun


def _pair(question: str) -> tuple[int, int]:
    adjective, noun = (int(word[1:]) for word in question.split() if word[1:].isdigit())
    return adjective, noun


class _Interpreter:
    """A teacher of a language with the noun first: three ways to reason, four to ask, slips at questions of its own."""

    def __init__(self) -> None:
        self.invented: set[str] = set()

    def answer(self, question: str, rng: np.random.Generator) -> str:
        adjective, noun = v, u = _pair(question)
        if question in self.invented and rng.random() < _WRONG:
            v = (v + int(rng.integers(1, _SIDE))) % _SIDE
        reason = _REASONS[rng.integers(len(_REASONS))]
        return reason.format(a=f"a{adjective}", n=f"n{noun}", u=f"u{u}", v=f"v{v}")

    def rephrase(self, question: str, rng: np.random.Generator) -> str:
        return _asked(_pair(question), rng)

    def invent(self, question: str, rng: np.random.Generator) -> str:
        made = _asked(_drawn(rng), rng)
        self.invented.add(made)
        return made


def _encoded(text: str) -> list[int]:
    return [_NUMBER[word] for word in text.split()]


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    """Of the answer's tokens alone."""
    (ids,) = batch
    wanted = ids[:, _QUESTION:]
    logits = module(ids[:, :-1])[:, _QUESTION - 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=0)


def _student(examples: list[Example], seed: int) -> float:
    """Trained on ``examples``; the share of 300 phrases that it does not get right."""
    rows = [_encoded(f"{question} {answer}") for question, answer in examples]
    ids = torch.tensor([row + [0] * (_LENGTH - len(row)) for row in rows])
    config = GPTConfig(width=32, depth=2, num_heads=2, vocabulary=len(_WORDS), context=_LENGTH)
    module = GPT(config, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.1)
    schedule = cosine(_STEPS, _STEPS // 10, peak=5e-3, floor=0.0)
    Trainer(module, optimizer, Samples(ids, seed=seed), batch=_BATCH, loss=_loss, schedule=schedule, clip=1.0).run(
        _STEPS
    )
    return _errors(module.eval())


@torch.no_grad()
def _errors(module: nn.Module) -> float:
    rng = np.random.default_rng(1)
    pairs = [_drawn(rng) for _ in range(_TESTS)]
    ids = torch.tensor([_encoded(_asked(pair, rng)) for pair in pairs])  # (Q, 6)
    said = torch.full((len(ids), 2), -1)
    for _ in range(_LENGTH - _QUESTION):
        following = module(ids)[:, -1].argmax(-1)
        ends = (said[:, 0] < 0) & (following == _NUMBER["."])
        said = torch.where(ends[:, None], ids[:, -2:], said)
        ids = torch.cat([ids, following[:, None]], 1)
    right = torch.tensor([[_NUMBER[f"u{noun}"], _NUMBER[f"v{adjective}"]] for adjective, noun in pairs])
    return float((said != right).any(1).float().mean())


def _cell(arm: augmentation_arms.Strategy, seeds: int, ratio: int, student: int) -> tuple[int, float]:
    """Examples that ``ratio`` queries a seed made, and the error of a student of them."""
    rng = np.random.default_rng((student, seeds))
    questions = [_asked(_drawn(rng), rng) for _ in range(seeds)]
    made = augment(arm, _Interpreter(), questions, seeds * ratio, seed=student)
    return len(made.examples), _student(made.examples, student)


@claim(row=89, pace="slow", headline="answers at few queries a seed, new questions at many (abstract; no figure there)")
@tiny.one_thread()
def the_arm_to_buy_turns_with_the_queries_a_seed(assets: Assets) -> Outcome:
    """Three arms at four ratios and four numbers of seeds, three students each; laws of the outer two choose inside."""
    errors: dict[tuple[str, int, int], float] = {}
    pilots: dict[str, list[dict[str, float]]] = {arm: [] for arm in augmentation_arms.ARMS}
    for arm in augmentation_arms.ARMS:
        for seeds in (*_PILOTS, *_JUDGED):
            for ratio in _RATIOS:
                found = [_cell(arm, seeds, ratio, student) for student in _STUDENTS]
                errors[arm, seeds, ratio] = mean(error for _, error in found)
                if seeds in _PILOTS:
                    row = {"seeds": seeds, "examples": found[0][0], "error": max(errors[arm, seeds, ratio], 1e-3)}
                    pilots[arm].append(row)
    laws = augmentation_arms.fit_arms(pilots)
    cells = [(seeds, ratio) for seeds in _JUDGED for ratio in _RATIOS]
    picks = {cell: augmentation_arms.augmentation(cell[0], cell[0] * cell[1], arms=laws).strategy for cell in cells}
    best = {cell: min(augmentation_arms.ARMS, key=lambda arm: errors[arm, *cell]) for cell in cells}
    hits = mean(errors[picks[cell], *cell] <= errors[best[cell], *cell] for cell in cells)  # a tie is no miss

    def over(arm: str, ratios: tuple[int, ...]) -> float:
        return mean(errors[arm, seeds, ratio] for seeds in (*_PILOTS, *_JUDGED) for ratio in ratios)

    few = {arm: over(arm, (1, 2)) for arm in augmentation_arms.ARMS}
    many = {arm: over(arm, (50,)) for arm in augmentation_arms.ARMS}
    single = {arm: mean(errors[arm, *cell] for cell in cells) for arm in augmentation_arms.ARMS}
    switch = augmentation_arms.crossover(laws, _JUDGED[0], "answer", "new")
    shown = partial(", ".join)
    return Outcome(
        method=mean(errors[picks[cell], *cell] for cell in cells),
        baseline=min(single.values()),
        unit="share of answers wrong, mean over eight budgets",
        holds=bool(few["answer"] <= min(few.values()) and many["new"] < many["answer"] and hits >= 0.8),
        control=("the best arm of each budget, known afterwards", mean(errors[best[cell], *cell] for cell in cells)),
        notes=(
            "at 1-2 queries a seed: " + shown(f"{arm} {error:.3f}" for arm, error in few.items())
            + "; at 50: " + shown(f"{arm} {error:.3f}" for arm, error in many.items())
            + f"; the laws pick the winner in {hits:.0%} of {len(cells)} cells they have not seen ("
            + shown(f"{seeds}x{ratio}: {picks[seeds, ratio]}/{best[seeds, ratio]}" for seeds, ratio in cells)
            + "); new questions overtake answers at "
            + ("no budget" if switch is None else f"{switch / _JUDGED[0]:.3g} queries a seed")
        ),
    )  # fmt: skip
