"""The real models and texts that claims run on: loaded when first asked for, and held once.

Shape letters: M out features, N in features, C windows, T tokens.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pennyweight import data
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.loading import load
from pennyweight.model.model import Model

if TYPE_CHECKING:
    from pennyweight.data import Part, Split


class AssetModel:
    """An embedded model, float32 on the CPU. What a claim changes, it changes in a `fresh` copy.

    Args:
        name: short name of the asset.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def model(self) -> Model:
        """The loaded model; shared by all claims of a run, so not to be changed."""
        return load(self.name)

    def fresh(self) -> Model:
        """The model loaded anew, to be changed at will."""
        return load(self.name)

    def maps(self, part: str = "blocks") -> tuple[Map, ...]:
        """Its linear maps.

        Args:
            part: "blocks" (all inside blocks; "encoder" and "decoder" mean the same), "all", or a role such as
                "ffn.up".
        """
        found = self.model.anatomy.maps()
        if part in ("blocks", "encoder", "decoder"):
            return tuple(one for one in found if one.block is not None)
        return found if part == "all" else tuple(one for one in found if one.role == part)

    def matrices(self, part: str = "blocks") -> list[Tensor]:
        """The matrices (M, N) of `maps`, in order, float32."""
        found = [anatomy.matrix(self.model.module, one).detach() for one in self.maps(part)]
        assert found, f"{self.name} has no maps in {part!r}"
        return found

    def inputs(self, one: Map, windows: Tensor) -> Tensor:
        """What the map ``one`` multiplies when the model reads ``windows`` (C, T): (R, N) float32, R = C*T rows."""
        seen: list[Tensor] = []
        layer = self.model.module.get_submodule(one.path)
        handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        try:
            with torch.inference_mode():
                self.model.module(input_ids=windows)
        finally:
            handle.remove()
        assert len(seen) == 1, f"{one.path} ran {len(seen)} times"
        return seen[0].reshape(-1, one.shape[1]).clone()

    def windows(self, text: str = "wiki", *, part: Part, length: int = 256, count: int = 8, seed: int = 0) -> Tensor:
        """Windows (C, T) of token ids of an embedded text."""
        return data.windows(text, self.model.tokenizer, part=part, length=length, count=count, seed=seed)


class Assets:
    """Every real part a claim may ask for."""

    @cache  # noqa: B019  (one object a run, and it is what holds the models)
    def load(self, name: str) -> AssetModel:
        """The embedded model of that short name."""
        return AssetModel(name)

    def minilm(self) -> AssetModel:
        """all-MiniLM-L6-v2: a sentence encoder, true float32."""
        return self.load("minilm-l6")

    def smollm2(self, *, permuted: bool = False) -> AssetModel:
        """SmolLM2-135M-Instruct; ``permuted`` scatters the 4-bit grid it arrives on (same function)."""
        return self.load("smollm2-135m-permuted" if permuted else "smollm2-135m")

    def text(self, name: str = "wiki") -> Split:
        """The documents of an embedded text, in calibration and held-out parts."""
        return data.split(name)
