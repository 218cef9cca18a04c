"""Models for other engines: GGUF (llama.cpp), compressed-tensors (vLLM), OpenVINO, ONNX, and plain safetensors.

An export that cannot keep what a model does says so before it writes anything. `GRIDS` has the options of
`quantize.gptq` and `quantize.rtn` that solve a model on the grid of each GGUF block type, so that its codes are written
as they are and nothing is rounded twice.
"""

from __future__ import annotations

from pathlib import Path

from pennyweight.errors import OptionError
from pennyweight.export.checkpoint import to_checkpoint
from pennyweight.export.compressed_tensors_out import to_compressed_tensors
from pennyweight.export.gguf_blocks import GRIDS, Blocks, blocks_of
from pennyweight.export.gguf_out import to_gguf
from pennyweight.export.onnx_out import to_onnx
from pennyweight.export.openvino_out import to_openvino
from pennyweight.export.result import Exported
from pennyweight.model.loading import load
from pennyweight.model.model import Model

__all__ = ["FORMATS", "GRIDS", "Blocks", "Exported", "blocks_of", "export"]

#: Each format and what writes it.
FORMATS = {
    "safetensors": to_checkpoint,
    "gguf": to_gguf,
    "onnx": to_onnx,
    "compressed-tensors": to_compressed_tensors,
    "openvino": to_openvino,
}


def export(
    model: Model | str | Path, format: str, path: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Exported:
    """Write ``model`` for another engine: all of it, or nothing.

    ``safetensors`` is a directory that stock ``transformers`` opens, every matrix multiplied out. ``gguf`` is one file
    for llama.cpp (families llama, mistral, qwen2, qwen3), tokenizer included. Codes go straight into its blocks where
    these hold them bit for bit, in groups that are a multiple of 32:

    ====  =============================================  ==========================================
    type  holds                                          solve with ``quantize.gptq`` or ``.rtn``
    ====  =============================================  ==========================================
    Q4_0  symmetric codes of 4 bits or fewer             ``bits: 4, group_size: 32, zero: none``
    Q4_1  codes of 4 bits or fewer with a float minimum  ``bits: 4, group_size: 32, zero: float``
    Q5_0  symmetric codes of 5 bits                      ``bits: 5, group_size: 32, zero: none``
    Q5_1  codes of 5 bits with a float minimum           ``bits: 5, group_size: 32, zero: float``
    Q8_0  symmetric codes of 6 to 8 bits                 ``bits: 8, group_size: 32, zero: none``
    ====  =============================================  ==========================================

    ``quantize.blocks`` solves on these and on IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, which are written bit for bit,
    too; `pennyweight.fit` with ``target="gguf"`` chooses among them for every matrix under a budget.

    ``compressed-tensors`` is a directory for vLLM and ``transformers`` (layout ``pack-quantized``): linear layers of
    4 or 8 bits in groups of 32, 64, 128 or whole rows, zero none (``quantize.gptq``); embeddings are
    multiplied out. Scales and codes are written as they are; an engine that computes in bfloat16 rounds scales. vLLM
    runs maps that read the same inputs as one, and needs one setting for them: a fit for this target sees to it.

    ``openvino`` is a directory with a graph (no caches) whose matrices are codes of 4 or 8 bits where they were of at
    most as many, zero none or integer, in groups that divide the inputs; OpenVINO runs it on other shapes before it is
    kept.

    ``onnx`` is one graph in float32, every matrix multiplied out (causal and masked language models, encoders,
    classifiers of text and images; no caches, experts or encoder-decoders), from ``input_ids`` and ``attention_mask``
    (B, L) or ``pixel_values`` to ``logits`` or ``output``, whose B and L are free. Before it is kept, ONNX Runtime runs
    it on inputs of other shapes than it was traced with.

    Of ``gguf``: codes with an integer zero take the narrowest type that has room for ``code - zero``; norms and biases
    stay F32.

    Args:
        model: loaded, or what `load` takes; not changed.
        format: "safetensors", "gguf", "onnx", "compressed-tensors" or "openvino".
        path: a new or empty directory; of gguf and onnx, a file that ends in .gguf or .onnx.
        dtype: "f32", "f16", "bf16", and of gguf "q8_0" (onnx and openvino take "f32" alone, compressed-tensors none):
            what is rounded to, every floating-point tensor
            of safetensors, the matrices of gguf whose codes no block holds. The loss of each is in the result. Left
            out, nothing is rounded: plain tensors take the narrowest dtype that holds them, and codes that gguf does
            not hold are an error.
        overwrite: replace the results that are there.

    Exact without ``dtype``: what is read back equals ``dense()`` of every weight (safetensors, onnx: in the dtype that
    the model computes in; where that rounds a compact weight, the loss is in the result, too).

    Raises:
        OptionError: an unknown format or dtype, or a name of another ending.
        ModelError: what plain weights or the format cannot say: rounded inputs, products of another arithmetic, shapes
            that the configuration does not give, other families, a tokenizer of another kind, codes off every grid.
        FormError: NaN or infinite values, or values beyond ``dtype``.
        MissingExtraError: onnx without the packages onnx and onnxruntime, openvino without its own.
        OutputError: something is there already, or cannot be written.
    """
    if format not in FORMATS:
        raise OptionError(f"export: format {format!r}; give one of {', '.join(FORMATS)}")
    loaded = model if isinstance(model, Model) else load(model)
    return FORMATS[format](loaded, Path(path), dtype=dtype, overwrite=overwrite)
