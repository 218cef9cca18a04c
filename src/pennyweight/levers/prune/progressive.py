"""Progressive gradient flow: N:M sparsity that comes gradually, so that pruned weights are not cut off at once.

Row 97. Source: A. R. Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
arXiv:2402.04744. Method: after a dense phase either masks fade in (pruned weights count by a factor that falls from 1
to 0, in a line or exponentially), or patterns harden in frames (7:8, 4:8, 2:8, 1:8, or 8:64, 4:32, 2:16, 1:8); a last
phase has the hard pattern. Masks are chosen anew at every step, by magnitude. Differs from the source: gradients of
pruned weights are what the forward pass makes them, faded alike (``gradient="through"`` is the published code, which
passes them on whole); the factor of the exponential is 0.7 % where the last phase starts, unless told otherwise; the
patterns of convolutions run along the flattened kernel, as they are stored here.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.masks import DTYPES, Selection, check_width, parse_pattern
from pennyweight.solvers.sparse_training import beside, packed, students
from pennyweight.train.masked import Masks, Rule
from pennyweight.train.sparsity_schedules import Frames, Pattern, geometric, halving
from pennyweight.work import Work

_NAME = "prune.progressive"
Method = Literal["sr-ste", "mask-linear", "mask-exponential", "structure-halving", "structure-geometric"]
_METHODS = get_args(Method)


class ProgressiveMasks:
    """Trains some layers towards N:M in any training loop; see the module's text.

    A callback of `pennyweight.train.Trainer`; the optimizer may be made before or after, the parameters stay.

    Args:
        layers: modules with a ``weight``; none twice, no weight shared between two.
        pattern: such as "1:8".
        steps: of the run.
        method: "mask-linear", "mask-exponential", "structure-halving", "structure-geometric"; or "sr-ste", the rival:
            the hard pattern at once.
        dense: share of the steps before any mask.
        fine: share of the steps at the end with the hard pattern.
        rate: c of the factor ``1 - c * t`` or ``exp(-c * t)`` after t steps of the middle phase; None for one that has
            (almost) reached 0 where that phase ends.
        gradient: with masks that fade in: "faded" as they are, or "through".
        decay: of pruned weights, with "sr-ste".

    Raises:
        OptionError: an unknown method, shares that leave no middle, or a width that a pattern does not divide.
        ShapeError: layers that cannot be masked.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        pattern: str,
        steps: int,
        method: Method = "mask-exponential",
        dense: float = 0.1,
        fine: float = 0.1,
        rate: float | None = None,
        gradient: Literal["faded", "through"] = "faded",
        decay: float = 2e-4,
    ) -> None:
        if method not in _METHODS or gradient not in ("faded", "through"):
            raise OptionError(
                f"progressive masks: method {method!r}, gradient {gradient!r}; give one of {', '.join(_METHODS)}, and "
                "faded or through"
            )
        self.start, self.end = round(dense * steps), steps - round(fine * steps)
        if not (dense >= 0 and fine >= 0 and self.start < self.end):
            raise OptionError(
                f"progressive masks: {dense:.0%} dense and {fine:.0%} at the end leave {self.end - self.start} of "
                f"{steps} steps between; give shares that leave some"
            )
        self.pattern, self.method, self.rate = parse_pattern(pattern, "progressive masks"), method, rate
        fading: Rule = "soft" if gradient == "faded" else "soft-through"
        rule: Rule = "sr-ste" if method == "sr-ste" else fading if method.startswith("mask") else "through"
        patterns: list[Pattern] = [self.pattern]
        if method == "structure-halving":
            patterns = halving(*self.pattern)
        elif method == "structure-geometric":
            patterns = geometric(*self.pattern)
        self.frames = Frames(patterns=patterns, start=self.start, end=self.end)
        self.masks = Masks(layers, rule, decay=decay, leak=1.0, where="progressive masks")
        for matrix in self.masks.matrices():
            for kept, of in patterns:
                check_width(matrix.shape[1], f"{kept}:{of}", "progressive masks")
        self.steps = 0
        self._choose()

    @property
    def leak(self) -> float:
        """The factor by which pruned weights count now, 1 while dense; for masks that fade in."""
        done, length = self.steps - self.start, self.end - self.start
        if done < 0:
            return 1.0
        if self.steps >= self.end:
            return 0.0
        if self.method == "mask-linear":
            return max(0.0, 1 - (1 / length if self.rate is None else self.rate) * done)
        return exp(-(5 / length if self.rate is None else self.rate) * done)

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.steps += 1
        self._choose()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the state of the layers, which holds the masks."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]
        self._fade()

    def finish(self) -> None:
        """Write the zeros into the weights and leave plain layers behind."""
        self.masks.finish()

    def _choose(self) -> None:
        found = self.frames.pattern(self.steps)
        if found is not None:
            kept, of = found
            scores = [matrix.abs() for matrix in self.masks.matrices()]
            self.masks.choose(Selection(pattern=f"{kept}:{of}").kept(scores))
        self._fade()

    def _fade(self) -> None:
        if self.method.startswith("mask"):
            self.masks.set(leak=self.leak)


class GradientNoise:
    """The variance of gradients from step to step, of kept and of pruned weights apart.

    Args:
        masks: of the layers; watch before the first step that counts.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self._sums = [torch.zeros(2, *weight.shape, dtype=torch.float64) for weight in masks.parameters]
        self._count = 0
        for index, weight in enumerate(masks.parameters):
            weight.register_hook(partial(self._add, index))  # type: ignore[no-untyped-call]

    def _add(self, index: int, gradient: Tensor) -> None:
        self._count += index == 0
        found = gradient.detach().double().cpu()
        self._sums[index] += torch.stack([found, found.square()])

    def read(self) -> tuple[float, float]:
        """Mean variance of the gradients of kept and of pruned weights since the last call; NaN where there are none.

        Raises:
            OptionError: fewer than two gradients since then.
        """
        if self._count < 2:
            raise OptionError(f"gradient noise: {self._count} gradients to read; train at least two steps")
        variances = [held[1] / self._count - (held[0] / self._count).square() for held in self._sums]
        pruned = torch.cat([~part.mask.cpu().flatten() for part in self.masks.parts])
        flat = torch.cat([one.flatten() for one in variances])
        for held in self._sums:
            held.zero_()
        self._count = 0
        return float(flat[~pruned].mean()), float(flat[pruned].mean())


@lever(
    _NAME,
    reach="model",
    row=97,
    paper="Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, arXiv:2402.04744",
)
@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Train a model towards N:M with masks that fade in or patterns that harden.

    For training from nothing, `ProgressiveMasks` does the same in any training loop.
    """

    pattern: str = option("2:4", ANY, "kept:of, in every run of inputs")
    method: str = option("mask-exponential", one_of(*_METHODS), "how it comes; sr-ste: at once")
    steps: int = option(300, at_least(2), "steps of the optimizer")
    batch: int = option(8, at_least(1), "windows a step")
    windows: int = option(256, at_least(1), "calibration windows to train on")
    rate: float = option(2e-4, at_least(0), "learning rate at its peak")
    warmup: float = option(0.05, between(0, 1), "share of the steps in which the rate rises")
    weight_decay: float = option(0.1, at_least(0), "of all matrices")
    dense: float = option(0.0, between(0, 1), "share of the steps before any mask")
    fine: float = option(0.2, between(0, 1), "share of the steps at the end with the hard pattern")
    gradient: str = option("faded", one_of("faded", "through"), "of pruned weights: as they count, or whole")
    target: str = option("original", one_of("original", "text"), "what is learned: the dense model, or the text")
    others: bool = option(True, ANY, "train all other parameters, too")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        parse_pattern(self.pattern, _NAME)
        if self.gradient != "faded" and not self.method.startswith("mask"):
            raise OptionError(f"{_NAME}: gradient has no effect with method = {self.method}; leave it out")

    def change(self, model: Model, work: Work) -> None:
        """Put N:M weights in the place of all selected maps, and train them.

        Raises:
            OptionError: the model predicts no next tokens, or a width does not fit a pattern.
            DataError: no calibration data.
            ModelError: a loss that is not finite.
        """
        windows = work.text(self.windows)
        loss = loss_towards("text" if self.target == "text" else "original", model, _NAME)
        denses = students(model, work.maps, self.pattern, _NAME)
        progress = ProgressiveMasks(
            denses.values(), pattern=self.pattern, steps=self.steps, method=self.method, dense=self.dense,  # type: ignore[arg-type]
            fine=self.fine, gradient=self.gradient,  # type: ignore[arg-type]
        )  # fmt: skip
        own = progress.masks.parameters
        matrices, vectors = beside(model.module, own) if self.others else ([], [])
        groups = [Group([*own, *matrices], self.rate, self.weight_decay), Group(vectors, self.rate)]
        train(
            model.module, groups, windows, loss, steps=self.steps, batch=self.batch, warmup=self.warmup, clip=1.0,
            seed=work.seed, callbacks=[progress], report=lambda done, total: work.report("training", done, total),
        )  # fmt: skip
        found = dict(zip(denses, progress.masks.matrices(), strict=True))
        packed(model.module, found, progress.masks.kept(), self.pattern, self.dtype)
