"""The survey's taxonomy of quantization, and which of its values this build implements.

Row 226. Source: A. Gholami et al., arXiv:2103.13630, sections III to V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from pennyweight.errors import OptionError
from pennyweight.lever import levers
from pennyweight.levers.quantize.scheme import Scheme


@dataclass(frozen=True)
class Value:
    """One value of one axis.

    Attributes:
        axis, name: as the survey divides things.
        settings: the options of `Scheme` that choose it; None where it is not a property of one map.
        by: the lever or module that does it; None where nothing here does.
    """

    axis: str
    name: str
    settings: Mapping[str, Any] | None = None
    by: str | None = field(default="quantize.scheme")

    @property
    def implemented(self) -> bool:
        """Whether the installed build does it: looked up, not promised."""
        if self.by is None:
            return False
        return any(card.name == self.by for card in levers()) or (
            self.by.startswith("pennyweight.") and find_spec(self.by) is not None
        )

    def scheme(self, **others: Any) -> Scheme:
        """The configuration that chooses this value, and ``others``.

        Raises:
            OptionError: it is not a property of one map.
        """
        if self.settings is None:
            raise OptionError(
                f"taxonomy: {self.axis} = {self.name} is not a setting of one map; it is {self.by or 'not here'}"
            )
        return Scheme(**{**others, **self.settings})


def _each(axis: str, option: str, *names: Any, **also: Any) -> list[Value]:
    return [Value(axis, str(name), {option: name, **also}) for name in names]


_TABLE = [
    Value("values", "uniform", {"values": "uniform"}),
    Value("values", "floating point", {"values": "float", "bits": 4}),
    Value("values", "logarithmic", {"values": "power-of-two"}),
    Value("values", "normal quantiles", {"values": "normal-float"}),
    Value("values", "k-means codebook", {"values": "k-means"}),
    Value("values", "vector", {"values": "vector", "granularity": "tensor", "bits": 8}),
    Value("values", "ternary", {"values": "ternary", "bits": 2}),
    Value("values", "binary", {"values": "binary", "bits": 1}),
    Value("symmetry", "asymmetric", {"symmetric": False}),
    Value("symmetry", "symmetric", {"symmetric": True}),
    *_each("range", "range", "min-max", "percentile", "mse", "kl"),
    *_each("granularity", "granularity", "tensor", "channel", "group"),
    *_each("rounding", "rounding", "nearest", "stochastic"),
    Value("rounding", "error feedback", by="quantize.gptq"),
    *_each("activations", "activations", "none", "static", "dynamic"),
    Value("arithmetic", "simulated", {"arithmetic": "simulated"}),
    Value(
        "arithmetic",
        "integer only",
        {"arithmetic": "integer", "symmetric": True, "granularity": "channel", "activations": "static", "bits": 8},
    ),
    Value("tuning", "post-training", {"tuning": "none"}),
    Value("tuning", "quantization-aware", {"tuning": "aware", "symmetric": True}),
    Value("tuning", "data-free", by="pennyweight.levers.quantize.equalize"),
    Value("mixed precision", "integer program over sensitivities", by="pennyweight.plan.choose"),
    Value("mixed precision", "reinforcement learning", by=None),
    Value("assisted by", "distillation", by=None),
    Value("coding", "entropy", by="quantize.entropy"),
]


def taxonomy() -> tuple[Value, ...]:
    """Every value of every axis, in the survey's order."""
    return tuple(_TABLE)
