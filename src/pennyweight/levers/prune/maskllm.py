"""MaskLLM: which weights of every group stay is learned; the weights themselves are left as they are.

Row 45. Source: G. Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
arXiv:2409.17481. Method: every group of inputs owns odds of each legal pattern; masks are drawn from them by a Gumbel
softmax, ever more sharply, and the odds learn from the loss of the text; they start near the mask of a one-shot lever;
while odds are open, large surviving weights are rewarded, so that gradients stay large. The likeliest patterns are
what is left. Differs from the source: one lever serves all N:M patterns of 256 ways or fewer, not 2:4 and 1:4 alone.

Shape letters: M out features, N in features, G groups of a row, P patterns, m inputs of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pennyweight.errors import OptionError
from pennyweight.lever import ANY, at_least, between, lever, one_of, option
from pennyweight.levers.prune.magnitude import Magnitude
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.levers.prune.wanda import Wanda
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, loss_towards, train
from pennyweight.solvers.masks import DTYPES, parse_pattern
from pennyweight.solvers.sparse_training import packed, seen, students
from pennyweight.statistics import NO_STATISTICS, Statistics
from pennyweight.train.loop import Loss
from pennyweight.train.masked import gumbel_mask, patterns_of
from pennyweight.weights import Dense, NofM
from pennyweight.work import Work

_NAME = "prune.maskllm"
Prior = type[Magnitude | Wanda | SparseGPT]
_PRIORS: dict[str, Prior] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}


class PatternOdds(nn.Module):
    """The parametrization of a frozen matrix (M, N) by masks drawn from learned odds of N:M patterns.

    Args:
        shape: (M, N).
        pattern: (kept, of).
        generator: of the first odds and of all draws, on the CPU.
        spread: standard deviation of the first odds.

    Attributes:
        logits: (M, G, P), trained.
        scale: of the logits; see `pennyweight.train.masked.gumbel_mask`.
        temperature: of the draw.
        norm: the squared norm of the weights that the latest mask left, for a reward.
    """

    patterns: Tensor

    def __init__(
        self, shape: tuple[int, int], pattern: tuple[int, int], *, generator: torch.Generator, spread: float = 0.01
    ) -> None:
        super().__init__()
        self.register_buffer("patterns", patterns_of(*pattern).float(), persistent=False)
        groups = shape[1] // pattern[1]
        # patterns outermost in memory, as draws are computed
        first = spread * torch.randn(len(self.patterns), shape[0], groups, generator=generator)
        self.logits = nn.Parameter(first.movedim(0, -1))
        self.scale, self.temperature = 1.0, 1.0
        self._generator = generator
        self.norm = torch.zeros(())

    @torch.no_grad()
    def lean_towards(self, mask: Tensor, strength: float) -> None:
        """Raise the odds of patterns by what they share with ``mask`` (M, N), in units of the spread of the odds."""
        shared = mask.to(self.logits.dtype).view(*self.logits.shape[:2], -1) @ self.patterns.T
        self.logits.add_((shared - 1) * self.logits.std() * strength)

    def forward(self, weight: Tensor) -> Tensor:
        mask = gumbel_mask(
            self.logits, self.patterns, scale=self.scale, temperature=self.temperature, generator=self._generator
        ).flatten(1)
        found = weight * mask
        self.norm = found.flatten().dot(found.flatten())
        return found

    def likeliest(self) -> Tensor:
        """(M, N) bool: the pattern of greatest odds in each group."""
        return self.patterns[self.logits.detach().argmax(-1)].flatten(1).bool()


class Sharpening:
    """A callback that takes scale and temperature of the draws from one end to the other in a straight line.

    Args:
        parts: whose draws.
        steps: of the run.
        scale: first and last.
        temperature: first and last.
    """

    def __init__(
        self, parts: Sequence[PatternOdds], steps: int, *, scale: tuple[float, float], temperature: tuple[float, float]
    ) -> None:
        self.parts, self.total, self.scale, self.temperature = list(parts), steps, scale, temperature
        self.steps = -1
        self.step()

    @property
    def share(self) -> float:
        """Of the run that is done."""
        return self.steps / self.total

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.steps += 1
        for part in self.parts:
            part.scale = self.scale[0] + (self.scale[1] - self.scale[0]) * self.share
            part.temperature = self.temperature[0] + (self.temperature[1] - self.temperature[0]) * self.share


@lever(
    _NAME,
    reach="model",
    row=45,
    paper="MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, arXiv:2409.17481",
)
@dataclass(frozen=True, kw_only=True)
class MaskLLM:
    """Learn which weights of every group stay, on text; no weight is changed.

    With no steps the masks of the prior.
    """

    pattern: str = option("2:4", ANY, "kept:of, in every run of inputs; 256 ways or fewer")
    steps: int = option(300, at_least(0), "steps of the optimizer; 0 is the prior")
    batch: int = option(8, at_least(1), "windows a step")
    windows: int = option(256, at_least(1), "calibration windows to train on")
    rate: float = option(5e-4, at_least(0), "learning rate of the odds, at its peak")
    weight_decay: float = option(0.1, at_least(0), "of the odds")
    prior: str = option("sparsegpt", one_of(*_PRIORS, "none"), "whose mask the odds lean towards at the start")
    strength: float = option(3.0, at_least(0), "how far they lean, in standard deviations a shared weight")
    scale: float = option(100.0, at_least(0), "of the odds at the start")
    last_scale: float = option(500.0, at_least(0), "of the odds at the end")
    temperature: float = option(4.0, between(1e-3, 100), "of the draws at the start")
    last_temperature: float = option(0.05, between(1e-3, 100), "of the draws at the end")
    reward: float = option(1e-5, at_least(0), "for the squared norm of what is kept, at the start; it falls to 0")
    dtype: str = option("float16", one_of(*DTYPES), "what the kept values are stored in")

    def __post_init__(self) -> None:
        patterns_of(*parse_pattern(self.pattern, _NAME))
        if self.steps == 0 and self.prior == "none":
            raise OptionError(f"{_NAME}: nothing to learn from with steps = 0 and no prior; give one of the two")

    def change(self, model: Model, work: Work) -> None:
        """Put N:M weights in the place of all selected maps.

        Raises:
            OptionError: the model predicts no next tokens, or a width does not fit the pattern.
            DataError: no calibration data, and steps to train or a prior that needs some.
            ModelError: a loss that is not finite.
        """
        windows = work.text(self.windows) if self.steps else None
        known = seen(model, work) if self.prior in ("sparsegpt", "wanda") else {}
        denses = students(model, work.maps, self.pattern, _NAME)
        originals = {path: dense.matrix.detach().clone() for path, dense in denses.items()}
        priors = {one.path: self._prior(denses[one.path], known.get(one.name, NO_STATISTICS)) for one in work.maps}
        if windows is None:
            kept = [mask for mask in priors.values() if mask is not None]
        else:
            odds = self._odds(denses, priors, work.seed)
            self._train(model, odds, windows, work)
            kept = [part.likeliest() for part in odds]
        packed(model.module, originals, kept, self.pattern, self.dtype)

    def _prior(self, dense: Dense, statistics: Statistics) -> Tensor | None:
        if self.prior == "none":
            return None
        found = _PRIORS[self.prior](pattern=self.pattern).solve(dense, statistics)
        assert isinstance(found, NofM)
        return found.mask()

    def _odds(self, denses: Mapping[str, Dense], priors: Mapping[str, Tensor | None], seed: int) -> list[PatternOdds]:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for path, dense in denses.items():
            part = PatternOdds(dense.shape, parse_pattern(self.pattern, _NAME), generator=generator)
            prior = priors[path]
            if prior is not None:
                part.lean_towards(prior, self.strength)
            dense.matrix.requires_grad_(False)
            parametrize.register_parametrization(dense, "matrix", part, unsafe=True)
            found.append(part)
        return found

    def _train(self, model: Model, odds: Sequence[PatternOdds], windows: Tensor, work: Work) -> None:
        ends = {"scale": (self.scale, self.last_scale), "temperature": (self.temperature, self.last_temperature)}
        sharpening = Sharpening(odds, self.steps, **ends)
        of_text: Loss = loss_towards("text", model, _NAME)

        def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            found = of_text(module, batch)
            kept = torch.stack([part.norm for part in odds]).sum()
            return found - self.reward * (1 - sharpening.share) * kept

        train(
            model.module, [Group([part.logits for part in odds], self.rate, self.weight_decay)], windows, loss,
            steps=self.steps, batch=self.batch, seed=work.seed, callbacks=[sharpening],
            report=lambda done, total: work.report("training", done, total),
        )  # fmt: skip
