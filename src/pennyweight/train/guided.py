"""Self-guided training: a dense matrix beside each structured one, faded out on a schedule.

Row 35. Source: X. Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured
Feedforward Layers", arXiv:2406.16450, section 3.2, and its code (CLAIRE-Labo/StructuredFFN): structured layers start
slowly and with spikes; a layer ``share * G x + (1 - share) * S x`` whose share falls from 1 to 0 along a cosine over
the first part of training lets the matrix G show the structured S the way. At first G is the product of S, so that
nothing is changed; at the end it is thrown away.
Differs from the source: G is the product with the deal of block-shuffled layers in it (its code leaves that out, and so
changes the function at step 0); G may start from other matrices; samples of the guided part are not shown again.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pennyweight.errors import OptionError
from pennyweight.train.distributed import world
from pennyweight.weights import CompactLinear, Cost, Dense, Transposed, Weight


class Guided(Weight):
    """``share * guide + (1 - share) * weight`` of shape (M, N) while a network is trained; never saved.

    Args:
        weight: the structured one.
        guide: (M, N).
    """

    def __init__(self, weight: Weight, guide: Tensor) -> None:
        super().__init__(shape=weight.shape)
        self.weight, self.guide = weight, nn.Parameter(guide.detach().float().clone())
        self.share, self.used = 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        own: Tensor = self.weight(x)
        if not self.used or self.share == 0:
            return own
        return self.share * (x @ self.guide.T.to(x.dtype)) + (1 - self.share) * own

    def dense(self) -> Tensor:
        own = self.weight.dense()
        return own if not self.used or self.share == 0 else self.share * self.guide + (1 - self.share) * own

    @property
    def T(self) -> Weight:
        return Transposed(self)

    def cost(self) -> Cost:
        return self.weight.cost()


class SelfGuided:
    """Guides some layers of ``module``; a callback of `pennyweight.train.Trainer`.

        guided = SelfGuided(model, paths, steps=1000)
        Trainer(model, AdamW(model.parameters()), samples, batch=64, callbacks=[guided]).run(1000)
        guided.finish()

    The guides are parameters: make the optimizer after this.

    Args:
        module: changed in place.
        paths: of compact layers.
        steps: of the whole training.
        part: of the steps in which layers are guided.
        sparing: run the guides in a step only with a probability that is their share, all or none; what layers give is
            then ``S x`` alone.
        guides: (M, N) to start from, by path; the layer's own product where there is none.
        seed: of the draws of ``sparing``.

    Raises:
        OptionError: no path, a layer that is dense or not compact, several processes (where each step has to use every
            parameter), or options outside their ranges.
    """

    def __init__(
        self,
        module: nn.Module,
        paths: Sequence[str],
        *,
        steps: int,
        part: float = 0.5,
        sparing: bool = False,
        guides: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not paths or steps < 1 or not 0 < part <= 1:
            raise OptionError(
                f"self-guided training: {len(paths)} layers, {steps} steps, part = {part}; give at least one of each, "
                "and a part in (0, 1]"
            )
        if world() > 1:
            raise OptionError("self-guided training: guides fall out of use on the way; train in one process")
        layers = [module.get_submodule(path) for path in paths]
        for path, layer in zip(paths, layers, strict=True):
            if not isinstance(layer, CompactLinear) or isinstance(layer.weight, Dense):
                raise OptionError(f"self-guided training: {path} holds a dense matrix; make it a structured one first")
        self.steps, self.part, self.sparing, self.seed, self.done = steps, part, sparing, seed, 0
        self._layers: list[CompactLinear] = layers  # type: ignore[assignment]
        for path, layer in zip(paths, self._layers, strict=True):
            guide = (guides or {}).get(path)
            layer.weight = Guided(layer.weight, layer.weight.dense() if guide is None else guide)
        self._set()

    @property
    def share(self) -> float:
        """What guides count for now: 1 at first, 0 from ``part`` of the steps on."""
        through = self.done / (self.part * self.steps)
        return 0.0 if through >= 1 else 0.5 * (1 + math.cos(math.pi * through))

    def step(self) -> None:
        """Call once after each step of the optimizer."""
        self.done += 1
        self._set()

    def _set(self) -> None:
        # drawn from seed and step alone, so that a resumed run draws the same
        draw = torch.rand((), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.done))
        used = not self.sparing or float(draw) < self.share
        for layer in self._layers:
            assert isinstance(layer.weight, Guided)
            layer.weight.share, layer.weight.used = self.share, used

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the state of the layers."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.done = state["done"]
        self._set()

    def finish(self) -> None:
        """Leave the structured layers behind: the same function, to the last bit.

        Raises:
            OptionError: guides still count.
        """
        if self.share:
            raise OptionError(
                f"self-guided training: guides count for {self.share:.3g} after {self.done} steps; go on to step "
                f"{math.ceil(self.part * self.steps)}"
            )
        for layer in self._layers:
            assert isinstance(layer.weight, Guided)
            layer.weight = layer.weight.weight
