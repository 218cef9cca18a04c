"""Sparse from the first step to the last: weights are pruned and others grown while a network is trained.

Row 248. Source: S. Wang et al., "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation",
arXiv:2402.02855, and its official code: random masks at first; every so many steps the share rho of the kept weights
that is smallest dies, and as many grow where the gradient is largest; rho falls along a cosine; grown weights start at
zero. Differs from the source: what is grown has no past in the optimizer; the places are exact in number, drawn ones
too; zeros may move between tensors (``scope="global"``), which the paper has and its code leaves out.

Every tensor with a mask is trained under a budget of non-zero weights that no step exceeds: embedding tables as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pennyweight.errors import OptionError
from pennyweight.solvers.masks import smallest
from pennyweight.solvers.spread import erk
from pennyweight.train.masked import Masks

Grow = Literal["gradient", "random", "unfired"]
_GROW = ("gradient", "random", "unfired")


class DynamicSparsity:
    """Keeps a share of the weights of some layers, and changes which: a callback of `Trainer`, or of any loop.

        sparse = DynamicSparsity([model.users, model.items], optimizer, density=0.2, total=2000, every=100)
        for batch in batches:
            loss(batch).backward(); optimizer.step(); optimizer.zero_grad()
            sparse.step()
        sparse.finish()

    Args:
        layers: modules with a ``weight`` (linear, convolution, embedding); none twice.
        optimizer: of their weights; what it remembers of pruned ones is cleared.
        density: share of the weights kept, of all together.
        total: steps of the run, over which rho falls.
        every: steps between two changes; the last change is made before ``total``.
        rate: rho at the start: share of the kept weights that dies.
        final_rate: rho at the end.
        grow: where weights grow: where the gradient of the latest batch is largest, anywhere by chance, or anywhere by
            chance but first where none was yet.
        scope: "tensor" keeps the number of each tensor, "global" only that of all together.
        spread: of the weights kept at first: "layer", the same share of each tensor, or "erk", see `solvers.spread`.
        seed: of the first masks and of growth by chance.

    Raises:
        OptionError: shares outside 0 to 1, or steps that cannot be.
        ShapeError: no layer, or two that share a weight.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        optimizer: Optimizer,
        *,
        density: float = 0.5,
        total: int,
        every: int = 100,
        rate: float = 0.5,
        final_rate: float = 0.005,
        grow: Grow = "gradient",
        scope: Literal["tensor", "global"] = "tensor",
        spread: Literal["layer", "erk"] = "layer",
        seed: int = 0,
    ) -> None:
        if not (0 < density <= 1 and 0 <= rate <= 1 and 0 <= final_rate <= 1):
            raise OptionError(
                f"dynamic sparsity: density {density}, rate {rate} to {final_rate}; give 0 < density <= 1, and shares"
            )
        if every < 1 or total < 1 or seed < 0:
            raise OptionError(f"dynamic sparsity: every {every} of {total} steps, seed {seed}; give 1, 1, 0 or more")
        if grow not in _GROW or scope not in ("tensor", "global") or spread not in ("layer", "erk"):
            raise OptionError(
                f"dynamic sparsity: grow {grow!r}, scope {scope!r}, spread {spread!r}; give one of "
                f"{', '.join(_GROW)}; tensor or global; layer or erk"
            )
        self.masks = Masks(layers, "through", where="dynamic sparsity")
        self.optimizer, self.total, self.every = optimizer, total, every
        self.rate, self.final_rate, self.grow, self.scope, self.seed = rate, final_rate, grow, scope, seed
        self.steps = 0
        shapes = [tuple(matrix.shape) for matrix in self.masks.matrices()]
        shares = [1 - density] * len(shapes) if spread == "layer" else erk(shapes, 1 - density)
        draw = self._generator(0)
        chosen = []
        for shape, part in zip(shapes, shares, strict=True):
            size = math.prod(shape)
            dead = smallest(torch.rand(size, generator=draw), size - round((1 - part) * size))
            chosen.append(~dead.view(shape))
        self._choose(chosen)
        #: Weights kept at any time, of all tensors together.
        self.budget = sum(int(kept.sum()) for kept in chosen)
        self._gradients: list[Tensor | None] = [None] * len(shapes)
        self._handles = [
            weight.register_hook(self._keeper(at, mask))  # type: ignore[no-untyped-call]
            for at, (weight, mask) in enumerate(self.masks)
        ]

    def rho(self, step: int) -> float:
        """Share of the kept weights that a change after ``step`` steps replaces: half a cosine over ``total``."""
        return self.final_rate + (self.rate - self.final_rate) * (1 + math.cos(math.pi * step / self.total)) / 2

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.steps += 1
        if self._changes(self.steps):
            self._change()
        self._gradients = [None] * len(self._gradients)

    @property
    def explored(self) -> float:
        """Share of all weights that were kept at some time."""
        fired = self._fired()
        return sum(int(one.sum()) for one in fired) / sum(one.numel() for one in fired)

    def nonzero(self) -> int:
        """Weights that are not zero now; `budget` at most."""
        return sum(int(weight.detach().count_nonzero()) for weight, _ in self.masks)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the state of the layers, which holds the masks."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]

    def finish(self) -> None:
        """Leave plain layers with their zeros behind."""
        for handle in self._handles:
            handle.remove()
        self.masks.finish()

    def _changes(self, step: int) -> bool:
        return step % self.every == 0 and step < self.total

    def _keeper(self, at: int, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Keeps the whole gradient where it will be asked for; the optimizer sees that of kept weights alone."""

        def keep(gradient: Tensor) -> Tensor:
            if self.grow == "gradient" and self._changes(self.steps + 1):
                before = self._gradients[at]
                self._gradients[at] = gradient.detach() if before is None else before + gradient.detach()
            return gradient * mask

        return keep

    @torch.no_grad()
    def _change(self) -> None:
        kept = [mask.clone() for mask in self.masks.kept()]
        sizes = [matrix.abs() for matrix in self.masks.matrices()]
        wanted = self._wanted()
        if self.scope == "global":
            together = [torch.cat([one.flatten() for one in many])[None] for many in (kept, sizes, wanted)]
            found = self._moved(together[0], together[1], together[2])
            parts = torch.split(found.flatten(), [one.numel() for one in kept])
            kept = [part.view(one.shape) for part, one in zip(parts, kept, strict=True)]
        else:
            kept = [self._moved(*each) for each in zip(kept, sizes, wanted, strict=True)]
        self._choose(kept)

    def _moved(self, kept: Tensor, sizes: Tensor, wanted: Tensor) -> Tensor:
        """``kept`` after as many deaths as births: the smallest ``sizes`` die, the most ``wanted`` of the dead grow."""
        dying = math.ceil(self.rho(self.steps) * int(kept.sum()))
        never = torch.full((), math.inf, dtype=sizes.dtype, device=sizes.device)
        alive = kept & ~smallest(torch.where(kept, sizes, never).flatten(), dying).view(kept.shape)
        born = smallest(torch.where(alive, never, -wanted).flatten(), dying).view(kept.shape)
        return alive | born

    def _wanted(self) -> list[Tensor]:
        """How much each weight is wanted back, (M, N) each, finite."""
        shapes = [mask.shape for mask in self.masks.kept()]
        if self.grow == "gradient":
            pairs = zip(self._gradients, shapes, strict=True)
            return [torch.zeros(shape) if one is None else one.abs().view(shape) for one, shape in pairs]
        draw = self._generator(self.steps)
        chance = [torch.rand(shape, generator=draw) for shape in shapes]
        if self.grow == "random":
            return chance
        return [one - fired.view(one.shape).to(one) for one, fired in zip(chance, self._fired(), strict=True)]

    @torch.no_grad()
    def _choose(self, kept: Sequence[Tensor]) -> None:
        self.masks.choose([one.to(mask.device) for one, mask in zip(kept, self.masks.kept(), strict=True)])
        for (weight, mask), fired in zip(self.masks, self._fired(), strict=True):
            weight.masked_fill_(~mask, 0)  # what grows later starts at zero
            fired |= mask
        self.masks.clear_moments(self.optimizer)

    def _fired(self) -> list[Tensor]:
        """Where weights were kept at some time: buffers beside the masks, so that checkpoints have them."""
        for part in self.masks.parts:
            if not hasattr(part, "fired"):
                part.register_buffer("fired", torch.zeros_like(part.mask))
        return [part.get_buffer("fired") for part in self.masks.parts]

    def _generator(self, step: int) -> torch.Generator:
        # of the step alone, so that a resumed run draws the same
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)
