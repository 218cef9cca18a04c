"""The algebra of compact weights."""

from pennyweight.weights.activations import Activation
from pennyweight.weights.codebook import Codebook, normal_float
from pennyweight.weights.combine import Hadamard, Product, Sum
from pennyweight.weights.deep_hash import DeepHash
from pennyweight.weights.dense import Dense
from pennyweight.weights.dictionary import DictionaryCoded
from pennyweight.weights.entropy import EntropyCoded
from pennyweight.weights.grid import Grid
from pennyweight.weights.grid_coded import GridCoded
from pennyweight.weights.hashed import Hashed, RandomBasis
from pennyweight.weights.lattice import Lattice
from pennyweight.weights.layers import CompactConv1d, CompactConv2d, CompactEmbedding, CompactLinear
from pennyweight.weights.low_rank import LowRank
from pennyweight.weights.premerged import Premerged
from pennyweight.weights.quantized import Integers, Quantized, doubled
from pennyweight.weights.rotation import Rotation
from pennyweight.weights.shared_rows import SharedRows
from pennyweight.weights.sparse import BlockSparse, NofM, Sparse
from pennyweight.weights.stacked import Stacked
from pennyweight.weights.structured import BlockDiagonal, Diagonal, Kronecker, Monarch, Permutation
from pennyweight.weights.tensor_train import TensorTrain
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.vector import VectorCodebook
from pennyweight.weights.weight import Cost, Nested, Weight, check_finite, form, forms, rebuild, stored_bytes, structure

__all__ = [
    "Activation",
    "BlockDiagonal",
    "BlockSparse",
    "Codebook",
    "CompactConv1d",
    "CompactConv2d",
    "CompactEmbedding",
    "CompactLinear",
    "Cost",
    "DeepHash",
    "Dense",
    "Diagonal",
    "DictionaryCoded",
    "EntropyCoded",
    "Grid",
    "GridCoded",
    "Hadamard",
    "Hashed",
    "Integers",
    "Kronecker",
    "Lattice",
    "LowRank",
    "Monarch",
    "Nested",
    "NofM",
    "Permutation",
    "Premerged",
    "Product",
    "Quantized",
    "RandomBasis",
    "Rotation",
    "SharedRows",
    "Sparse",
    "Stacked",
    "Sum",
    "TensorTrain",
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
