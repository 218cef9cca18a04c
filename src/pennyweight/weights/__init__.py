"""The algebra of compact weights."""

from pennyweight.weights.combine import Hadamard, Product, Sum
from pennyweight.weights.dense import Dense
from pennyweight.weights.grid import Grid
from pennyweight.weights.layers import CompactConv1d, CompactConv2d, CompactEmbedding, CompactLinear
from pennyweight.weights.low_rank import LowRank
from pennyweight.weights.quantized import Integers, Quantized, doubled
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Nested, Weight, check_finite, form, forms, rebuild, stored_bytes, structure

__all__ = [
    "CompactConv1d",
    "CompactConv2d",
    "CompactEmbedding",
    "CompactLinear",
    "Cost",
    "Dense",
    "Grid",
    "Hadamard",
    "Integers",
    "LowRank",
    "Nested",
    "Product",
    "Quantized",
    "Sum",
    "Transposed",
    "Weight",
    "check_finite",
    "doubled",
    "form",
    "forms",
    "rebuild",
    "stored_bytes",
    "structure",
]
