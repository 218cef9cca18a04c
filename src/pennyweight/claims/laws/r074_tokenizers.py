"""Row 74, vocabulary law: over tokenizers made here the best size grows with compute, once it left the smallest.

Letters: V vocabulary, C compute; W windows, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from pennyweight import data
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.laws import vocab
from pennyweight.measure import stats
from pennyweight.measure.unigram import unigram_normalized_loss
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine
from pennyweight.zoo.gpt import GPT, GPTConfig

_READ, _JUDGED = 1_500_000, 60_000  # characters
_VOCABULARIES = (112, 168, 252, 378, 567)
_WIDTHS = ((8, 12), (12, 16), (16, 24), (24, 32), (32,))  # tried at each budget
_CODE, _WIKI = (2e9, 6e9, 18e9, 54e9, 162e9), (3e9, 9e9, 27e9, 81e9)  # FLOPs
_LENGTH, _BATCHES = 33, (8, 16)  # below ten thousand million FLOPs, and above
Row = dict[str, float]


@dataclass(frozen=True)
class _Tokens:
    """A text in one vocabulary: windows (W, T) to train on and to judge by, and tokens a character."""

    vocabulary: int
    train: Tensor
    held: Tensor
    per_character: float

    @property
    def counts(self) -> Tensor:
        """(V,) of the training text, and a half for what is not in it."""
        return torch.bincount(self.train.flatten(), minlength=self.vocabulary).double() + 0.5


def _reader(text: str, held: str) -> Callable[[int], _Tokens]:
    """Byte-pair tokenizers of any size, trained on ``text``."""
    made: dict[int, _Tokens] = {}

    def tokens(vocabulary: int) -> _Tokens:
        if vocabulary not in made:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
            ids = [torch.tensor(tokenizer.encode(part).ids) for part in (text, held)]
            train, judge = (one[: len(one) // _LENGTH * _LENGTH].view(-1, _LENGTH) for one in ids)
            made[vocabulary] = _Tokens(vocabulary, train, judge, len(ids[0]) / len(text))
        return made[vocabulary]

    return tokens


def _run(width: int, tokens: _Tokens, compute: float, seed: int = 0) -> Row:
    """One model of that width, trained for that many FLOPs."""
    config = GPTConfig(width=width, depth=1, num_heads=2, vocabulary=tokens.vocabulary, context=_LENGTH)
    module = GPT(config, generator=torch.Generator().manual_seed(seed))
    whole = sum(weight.numel() for weight in module.parameters())  # the head is tied to the embedding
    batch = _BATCHES[compute > 1e10]
    steps = max(8, round(compute / (6 * whole * batch * (_LENGTH - 1))))
    Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=0.0), Samples(tokens.train, seed=seed),
        batch=batch, schedule=cosine(steps, max(1, steps // 20), peak=0.1 / width), clip=1.0,
    ).run(steps)  # fmt: skip
    fair = unigram_normalized_loss(module, tokens.held, frequencies=tokens.counts, batch=128)
    plain = float(token_losses(module, tokens.held, batch=128).mean())
    return {
        "vocab_size": tokens.vocabulary,
        "embed_dim": width,
        "nonvocab_params": whole - tokens.vocabulary * width,
        "num_characters": steps * batch * (_LENGTH - 1) / tokens.per_character,
        "loss_unigram_normalised": fair,
        "compute": compute,
        "plain": plain,
        "per_character": plain * tokens.per_character,
    }


def _best(rows: Sequence[Row], target: str = "loss_unigram_normalised") -> float:
    """The V of least loss: the bottom of a parabola in log V through the best width of each, within those tried."""
    least = [min(row[target] for row in rows if row["vocab_size"] == v) for v in _VOCABULARIES]
    logs = np.log(_VOCABULARIES)
    bend, tilt, _ = np.polyfit(logs, least, 2)
    bottom = -tilt / (2 * bend) if bend > 0 else logs[int(np.argmin(least))]
    return float(np.exp(np.clip(bottom, logs[0], logs[-1])))


def _least(rows: Sequence[Row], v: int | None = None) -> float:
    """The least fair loss of a budget, with vocabulary ``v`` where one is given."""
    return min(row["loss_unigram_normalised"] for row in rows if v in (None, row["vocab_size"]))


@dataclass(frozen=True)
class _Sweep:
    """Runs at every budget, the last one of which no rule may look at."""

    read: Callable[[int], _Tokens]
    table: dict[float, list[Row]]

    @classmethod
    def of(cls, text: str, budgets: Sequence[float], widths: Sequence[tuple[int, ...]]) -> _Sweep:
        found = data.split(text)
        train, held = (
            "\n\n".join(part).encode("ascii", "ignore").decode() for part in (found.calibration, found.heldout)
        )
        read = _reader(train[:_READ], held[:_JUDGED])
        return cls(read, {
            compute: [_run(width, read(v), compute) for width in tried for v in _VOCABULARIES]
            for compute, tried in zip(budgets, widths, strict=True)
        })  # fmt: skip

    @property
    def fitted(self) -> list[list[Row]]:
        return list(self.table.values())[:-1]

    @property
    def fixed(self) -> int:
        """The one vocabulary that is best for all fitted budgets together."""
        return min(_VOCABULARIES, key=lambda v: sum(_least(rows, v) - _least(rows) for rows in self.fitted))

    def line(self) -> tuple[float, int]:
        """The power law through the best V of each fitted budget: its exponent, and its V at the last one."""
        budgets = np.log(list(self.table))
        slope, start = np.polyfit(budgets[:-1], np.log([_best(rows) for rows in self.fitted]), 1)
        ends = np.log((_VOCABULARIES[0], _VOCABULARIES[-1]))
        return float(slope), round(float(np.exp(np.clip(start + slope * budgets[-1], *ends))))

    def judged(self, rule: Callable[[int], int], said: str, *, seeds: tuple[int, ...]) -> Outcome:
        """``rule`` gives the vocabulary of a width at the last budget; new seeds decide against the fixed one."""
        budgets = list(self.table)
        widths = sorted({int(row["embed_dim"]) for row in self.table[budgets[-1]]})
        losses: dict[str, list[float]] = {"chosen": [], "fixed": [], "published": []}
        choices = []
        for width in widths:
            published = vocab.optimal(12 * width**2 + 3 * width, method="derivative", width=width)
            chosen = {"chosen": rule(width), "fixed": self.fixed, "published": max(_VOCABULARIES[0], published)}
            choices.append(f"width {width}: " + ", ".join(f"{name} {v}" for name, v in chosen.items()))
            for name, v in chosen.items():
                judges = seeds[:2] if name == "published" else seeds
                runs = [_run(width, self.read(v), budgets[-1], seed) for seed in judges]
                losses[name] += [run["loss_unigram_normalised"] for run in runs]
        gain = stats.paired_difference(losses["fixed"], losses["chosen"])
        method, baseline, control = (float(np.mean(values)) for values in losses.values())
        best = {
            name: [_best(rows, name) for rows in self.table.values()]
            for name in ("loss_unigram_normalised", "plain", "per_character")
        }
        fair = best["loss_unigram_normalised"]
        growth = float(np.polyfit(np.log(budgets), np.log(fair), 1)[0])
        shown = [", ".join(f"{v:.0f}" for v in found) for found in best.values()]
        return Outcome(
            method=method,
            baseline=baseline,
            unit=f"unigram-normalized loss at {budgets[-1]:.2g} FLOPs, nats a token, mean of {len(losses['fixed'])} "
            "runs; the baseline is the one vocabulary best for all budgets fitted",
            holds=growth > 0 and fair[-1] > fair[0] and gain.high < 0,
            control=("the vocabulary of the published constants", control),
            interval=(baseline + gain.low, baseline + gain.high),
            notes=(
                f"best V at {', '.join(f'{compute:.2g}' for compute in budgets)} FLOPs: {shown[0]}, growing as "
                f"C^{growth:.2f}; by the plain loss a token {shown[1]}; by nats a character {shown[2]}; vocabularies "
                f"from {_VOCABULARIES[0]} to {_VOCABULARIES[-1]} tried; {'; '.join(choices)}; {said}; the interval is "
                "of the difference to the baseline"
            ),
        )


@claim(row=74, pace="slow", headline="larger models deserve larger vocabularies (title)")
@tiny.one_thread()
def fitted_loss_chooses_a_vocabulary_for_a_larger_budget(assets: Assets) -> Outcome:
    """Byte-pair tokenizers of five sizes, library source; the loss fitted to three budgets chooses at a fourth."""
    sweep = _Sweep.of("stdlib-code", _CODE[:4], _WIDTHS[:4])
    rows = [row for budget in sweep.fitted for row in budget]
    characters = np.array([sweep.read(v).per_character for v in _VOCABULARIES])
    law = vocab.fit_loss(
        {name: [row[name] for row in rows] for name in rows[0]},
        per_character=lambda v: np.interp(v, _VOCABULARIES, characters),
        holdout=False,
    )

    def chosen(width: int) -> int:
        size, tried = float(12 * width**2 + 3 * width), np.arange(_VOCABULARIES[0], _VOCABULARIES[-1] + 1)
        tokens = _CODE[3] / (6 * (size + tried * width))
        losses = law(N_nv=np.full(tried.shape, size), N_v=tried * float(width), D=tokens)
        return int(tried[np.argmin(losses)])

    return sweep.judged(chosen, str(law), seeds=(1, 2, 3))


@claim(row=74, pace="slow", headline="vocabulary parameters grow as the compute to the 0.42 (section 4.1)")
@tiny.one_thread()
def equal_compute_curves_choose_a_vocabulary_for_a_larger_budget(assets: Assets) -> Outcome:
    """The same on Wikipedia, the choice by a power law through the best vocabularies of three budgets."""
    sweep = _Sweep.of("wiki", _WIKI, _WIDTHS[:4])
    slope, v = sweep.line()
    return sweep.judged(lambda width: v, f"V ~ C^{slope:.2f} before the last budget", seeds=(1, 2, 3))


@claim(row=74, pace="slow", headline="vocabulary parameters grow as the compute to the 0.42 (section 4.1)")
@tiny.one_thread()
def equal_compute_curves_choose_where_the_best_vocabulary_moves(assets: Assets) -> Outcome:
    """The same on library source at three times the budgets, read up to 1.6 times; the best size has left the edge."""
    sweep = _Sweep.of("stdlib-code", _CODE[1:], _WIDTHS[1:])
    slope, v = sweep.line()
    return sweep.judged(lambda width: v, f"V ~ C^{slope:.2f} before the last budget", seeds=(1, 2, 3, 4))
