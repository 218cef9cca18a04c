"""Structural surgery: physically smaller models, found by tracing them and held against the masked ones.

graph = trace(module, inputs)
units = graph.of("ffn", block=3)[0]
remove(module, graph, {units: scores.topk(1024).indices}, inputs)
remove_blocks(module, [20, 21, 22], inputs)
"""

from pennyweight.surgery.cut import remove
from pennyweight.surgery.depth import remove_blocks, without
from pennyweight.surgery.reference import masked
from pennyweight.surgery.trace import Dimension, Graph, trace

__all__ = ["Dimension", "Graph", "masked", "remove", "remove_blocks", "trace", "without"]
