"""Models for other engines: plain safetensors for ``transformers``, GGUF for llama.cpp and its kin, ONNX.

An export that cannot keep what a model does says so before it writes anything. `GRIDS` has the options of
`quantize.gptq` and `quantize.rtn` that solve a model on the grid of each GGUF block type, so that its codes are written
as they are and nothing is rounded twice.
"""

from __future__ import annotations

from pathlib import Path

from pennyweight.errors import OptionError
from pennyweight.export.checkpoint import to_checkpoint
from pennyweight.export.gguf_blocks import GRIDS, Blocks, blocks_of
from pennyweight.export.gguf_out import to_gguf
from pennyweight.export.onnx_out import to_onnx
from pennyweight.export.result import Exported
from pennyweight.model.loading import load
from pennyweight.model.model import Model

__all__ = ["FORMATS", "GRIDS", "Blocks", "Exported", "blocks_of", "export"]

#: Each format and what writes it.
FORMATS = {"safetensors": to_checkpoint, "gguf": to_gguf, "onnx": to_onnx}


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

    ``onnx`` is one graph in float32, every matrix multiplied out (causal and masked language models, encoders,
    classifiers of text and images; no caches, experts or encoder-decoders), from ``input_ids`` and ``attention_mask``
    (B, L) or ``pixel_values`` to ``logits`` or ``output``, whose B and L are free. Before it is kept, ONNX Runtime runs
    it on inputs of other shapes than it was traced with.

    Of ``gguf``: codes with an integer zero take the narrowest type that has room for ``code - zero``; norms and biases
    stay F32.

    Args:
        model: loaded, or what `load` takes; not changed.
        format: "safetensors", "gguf" or "onnx".
        path: a new or empty directory; of gguf and onnx, a file that ends in .gguf or .onnx.
        dtype: "f32", "f16", "bf16", and of gguf "q8_0" (onnx is "f32"): what is rounded to, every floating-point tensor
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
        MissingExtraError: onnx, without the packages onnx and onnxruntime.
        OutputError: something is there already, or cannot be written.
    """
    if format not in FORMATS:
        raise OptionError(f"export: format {format!r}; give one of {', '.join(FORMATS)}")
    loaded = model if isinstance(model, Model) else load(model)
    return FORMATS[format](loaded, Path(path), dtype=dtype, overwrite=overwrite)
