"""Tables of embeddings under a budget of bytes (row 114): fourteen ways to make them small, measured alike."""

from pennyweight.embeddings.bench import Bags, Result, bench, recommend, report
from pennyweight.embeddings.table import METHODS, Compressor, Table, compressor
from pennyweight.embeddings.trained import compress
from pennyweight.embeddings.words import word_bags

__all__ = [
    "METHODS",
    "Bags",
    "Compressor",
    "Result",
    "Table",
    "bench",
    "compress",
    "compressor",
    "recommend",
    "report",
    "word_bags",
]
