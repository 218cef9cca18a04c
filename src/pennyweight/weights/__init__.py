"""The algebra of compact weights."""

from pennyweight.weights.combine import Hadamard, Product, Sum
from pennyweight.weights.dense import Dense
from pennyweight.weights.low_rank import LowRank
from pennyweight.weights.weight import Cost, Nested, Weight, check_finite, form, forms, rebuild, stored_bytes, structure

__all__ = [
    "Cost",
    "Dense",
    "Hadamard",
    "LowRank",
    "Nested",
    "Product",
    "Sum",
    "Weight",
    "check_finite",
    "form",
    "forms",
    "rebuild",
    "stored_bytes",
    "structure",
]
