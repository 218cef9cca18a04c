"""Trained models on streams without an end: a step at a time, nothing computed twice."""

from pennyweight.zoo.continual import Convolution, EachStep, Mean, Pointwise, Pool, Stepwise
from pennyweight.zoo.retroactive import Encoder, RecyclingPositions, Retroactive, SingleOutput
from pennyweight.zoo.streams import Parallel, Residual, Sequential, Shift, continual

__all__ = [
    "Convolution",
    "EachStep",
    "Encoder",
    "Mean",
    "Parallel",
    "Pointwise",
    "Pool",
    "RecyclingPositions",
    "Residual",
    "Retroactive",
    "Sequential",
    "Shift",
    "SingleOutput",
    "Stepwise",
    "continual",
]
