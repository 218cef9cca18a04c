"""The algebra of compact weights."""

from pennyweight.weights.codebook import Codebook, normal_float
from pennyweight.weights.combine import Hadamard, Product, Sum
from pennyweight.weights.dense import Dense
from pennyweight.weights.dictionary import DictionaryCoded
from pennyweight.weights.entropy import EntropyCoded
from pennyweight.weights.grid import Grid
from pennyweight.weights.hashed import Hashed, RandomBasis
from pennyweight.weights.layers import CompactConv1d, CompactConv2d, CompactEmbedding, CompactLinear
from pennyweight.weights.low_rank import LowRank
from pennyweight.weights.quantized import Integers, Quantized, doubled
from pennyweight.weights.sparse import BlockSparse, NofM, Sparse
from pennyweight.weights.structured import BlockDiagonal, Diagonal, Kronecker, Monarch, Permutation
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.vector import VectorCodebook
from pennyweight.weights.weight import Cost, Nested, Weight, check_finite, form, forms, rebuild, stored_bytes, structure

__all__ = [
    "BlockDiagonal",
    "BlockSparse",
    "Codebook",
    "CompactConv1d",
    "CompactConv2d",
    "CompactEmbedding",
    "CompactLinear",
    "Cost",
    "Dense",
    "Diagonal",
    "DictionaryCoded",
    "EntropyCoded",
    "Grid",
    "Hadamard",
    "Hashed",
    "Integers",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Nested",
    "NofM",
    "Permutation",
    "Product",
    "Quantized",
    "RandomBasis",
    "Sparse",
    "Sum",
    "Transposed",
    "VectorCodebook",
    "Weight",
    "check_finite",
    "doubled",
    "form",
    "forms",
    "normal_float",
    "rebuild",
    "stored_bytes",
    "structure",
]
