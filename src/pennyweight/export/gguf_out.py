"""Export to a GGUF file: metadata, tokenizer, and codes written as they are; see `pennyweight.export.export`.

The inverse of `pennyweight.model.gguf_model`. Families: ``llama``, ``mistral`` without a sliding window (a llama
there), ``qwen2`` and ``qwen3``.

Shape letters: M out features, N in features, D head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from pennyweight.errors import FormError, ModelError, OptionError, OutputError
from pennyweight.export import gguf_tokens
from pennyweight.export.checkpoint import relative_error
from pennyweight.export.gguf_blocks import BLOCK, HOLDS, Blocks, blocks_of
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model import compact
from pennyweight.model.model import Model
from pennyweight.model.saving import narrowest
from pennyweight.safe_write import write_file
from pennyweight.weights import Dense, Weight, check_finite

DTYPES = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_EXACT = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_FILE_TYPES = {
    Kind.F32: 0, Kind.F16: 1, Kind.Q4_0: 2, Kind.Q4_1: 3, Kind.Q8_0: 7, Kind.Q5_0: 8, Kind.Q5_1: 9, Kind.Q2_K: 10,
    Kind.Q3_K: 12, Kind.Q4_K: 15, Kind.Q5_K: 17, Kind.Q6_K: 18, Kind.IQ4_NL: 25, Kind.BF16: 32,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name in the file, what holds it, its type, and the order its rows go in."""

    name: str
    held: Weight | Tensor
    shape: tuple[int, ...]
    kind: Kind
    rows: Tensor | None
    codes: bool

    @property
    def bytes(self) -> int:
        """Of its data."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    def dense(self) -> Tensor:
        """Its values in float32, rows in the order of the file."""
        with torch.no_grad():
            found = (self.held.dense() if isinstance(self.held, Weight) else self.held.detach()).cpu().float()
        return found if self.rows is None else found[self.rows]

    def encode(self) -> tuple[Any, float]:
        """What goes to the file, and the relative error of it."""
        if self.codes:
            assert isinstance(self.held, Weight)
            blocks = blocks_of(self.held)
            assert isinstance(blocks, Blocks), "it was one a moment ago"
            written = blocks.encode()
            return (written if self.rows is None else written[self.rows.numpy()]), 0.0
        values = self.dense()
        if self.kind is Kind.F32:
            return values.numpy(), 0.0
        with np.errstate(over="ignore"):  # said in words below
            written = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), self.kind)
            back = torch.from_numpy(np.array(gguf.quants.dequantize(written, self.kind), dtype=np.float32))
        if not bool(back.isfinite().all()):
            raise FormError(f"export gguf: {self.name} is beyond the range of {self.kind.name}; give bf16 or f32")
        return written, relative_error(back, values)


def to_gguf(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """One file that llama.cpp runs; see `pennyweight.export.export`."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"export gguf: dtype {dtype!r}; give one of {', '.join(DTYPES)}")
    if path.suffix != ".gguf":
        raise OptionError(f"export gguf: {path}; give a file that ends in .gguf")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: is there already; give another name, or overwrite")
    file = _File.of(model, dtype)
    loss: dict[str, float] = {}

    def fill(aside: str) -> None:
        writer = file.begin(aside)
        for entry in file.entries:  # one at a time: the model need not fit twice
            written, error = entry.encode()
            writer.write_tensor_data(np.ascontiguousarray(written))
            if error:
                loss[entry.name] = error
        writer.close()

    write_file(path, fill)
    return Exported(path, "gguf", path.stat().st_size, {e.name: e.kind.name for e in file.entries}, loss)


def check_gguf(model: Model) -> None:
    """Refuse what no GGUF file can say of ``model``, whatever its matrices will be.

    Raises:
        ModelError: as `pennyweight.export.export`.
    """
    module = check_plain(model, "GGUF")
    config: Any = module.config
    _metadata(model, _family(model))
    _rope(model)
    gguf_tokens.metadata(model, config.vocab_size)


def gguf_bytes(model: Model) -> int:
    """Exactly the size of the file that `to_gguf` writes without a dtype."""
    file = _File.of(model, None)
    with TemporaryDirectory() as aside:
        head = Path(aside) / "head.gguf"
        file.begin(str(head)).close()
        size = head.stat().st_size
    return sum((each + _ALIGNED - 1) // _ALIGNED * _ALIGNED for each in (size, *(e.bytes for e in file.entries)))


@dataclass(frozen=True)
class _File:
    """What a file will hold."""

    family: gguf.MODEL_ARCH
    said: dict[str, Any]
    entries: list[_Entry]

    @classmethod
    def of(cls, model: Model, dtype: str | None) -> _File:
        module = check_plain(model, "GGUF")
        config: Any = module.config
        family = _family(model)
        entries = list(_entries(model, module, family, dtype))
        said = _metadata(model, family) | gguf_tokens.metadata(model, config.vocab_size)
        matrices = Counter(entry.kind for entry in entries if len(entry.shape) == 2)
        said["general.file_type"] = _FILE_TYPES[matrices.most_common(1)[0][0]]
        return cls(family, said, entries)

    def begin(self, path: str) -> gguf.GGUFWriter:
        """A file at ``path`` with all but the data of its tensors."""
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self.family])
        for key, value in self.said.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value) if not _unsigned(value) else _UINT32)
        for entry in self.entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer


_ALIGNED = gguf.GGUF_DEFAULT_ALIGNMENT
_UINT32 = gguf.GGUFValueType.UINT32


def _unsigned(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _family(model: Model) -> gguf.MODEL_ARCH:
    """The architecture that the file will state, or a ModelError that says what it could not hold."""
    config: Any = model.config
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES or model.kind != "causal-lm":
        raise ModelError(
            f"{model.name}: a {kind} ({model.kind}) is not written as GGUF; causal models of these families are: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    window = getattr(config, "sliding_window", None)
    cannot = {
        "a sliding window of attention": window if getattr(config, "use_sliding_window", True) else None,
        "biases in the feed-forward blocks": getattr(config, "mlp_bias", False),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
    }
    for words, there in cannot.items():
        if there:
            raise ModelError(f"{model.name}: GGUF cannot say {words} for a {kind}; give another format")
    return _ARCHITECTURES[kind]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _metadata(model: Model, family: gguf.MODEL_ARCH) -> dict[str, Any]:
    config: Any = model.config
    said: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": _head_dim(config),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    rope = config.rope_parameters
    if rope["rope_type"] == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    name = gguf.MODEL_ARCH_NAMES[family]
    general = {"general.name": model.name, "general.quantization_version": gguf.GGML_QUANT_VERSION}
    return general | {f"{name}.{key}": value for key, value in said.items()}


def _rope(model: Model) -> Tensor | None:
    """The divisors of the rotary frequencies, (D / 2,), where the file has to list them."""
    config: Any = model.config
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in known or set(rope) - known[kind]:
        more = ", ".join(sorted(set(rope) - known.get(kind, set())))
        raise ModelError(f"{model.name}: rotary scaling {kind} ({more}) is not written; {', '.join(known)} are")
    if kind != "llama3":
        return None
    size = _head_dim(config)
    frequency = float(theta) ** -(torch.arange(0, size, 2).double() / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.float()


def _entries(model: Model, module: PreTrainedModel, family: gguf.MODEL_ARCH, dtype: str | None) -> Iterator[_Entry]:
    config: Any = module.config
    names = gguf.get_tensor_name_map(family, config.num_hidden_layers)
    weights = compact.compact_layers(module)
    held: dict[str, Weight | Tensor] = {f"{path}.weight": weight for path, weight in weights.items()}
    inside = tuple(f"{name}." for name in held)
    held |= {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(inside)}
    head, embedding = held.get("lm_head.weight"), held["model.embed_tokens.weight"]
    if head is embedding or (
        isinstance(head, Tensor) and isinstance(embedding, Tensor) and head.data_ptr() == embedding.data_ptr()
    ):
        del held["lm_head.weight"]
    divisors = _rope(model)
    if divisors is not None:
        yield _Entry("rope_freqs.weight", divisors, tuple(divisors.shape), Kind.F32, None, False)
    for name, tensor in held.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"{model.name}: {name} has no place in a GGUF file of its family")
        if tensor.dtype == torch.float64:
            raise ModelError(
                f"{model.name}: {name} is float64, which GGUF files of models do not hold; load it as float32"
            )
        check_finite(tensor.dense() if isinstance(tensor, Weight) else tensor, f"{model.name}: {name}")
        entry = _Entry(target, tensor, tuple(tensor.shape), Kind.F32, None, False)
        if family is gguf.MODEL_ARCH.LLAMA and ".self_attn." in name:
            # llama.cpp turns neighboring pairs of a head, transformers its halves
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            if heads:
                order = torch.arange(tensor.shape[0]).reshape(heads, 2, -1)
                entry = replace(entry, rows=order.transpose(1, 2).reshape(-1))
        yield _typed(entry, model.name, name, dtype) if len(entry.shape) == 2 else entry


def _typed(entry: _Entry, model: str, name: str, dtype: str | None) -> _Entry:
    """``entry`` with the type that holds its matrix."""
    why = ""
    if isinstance(entry.held, Weight) and not isinstance(entry.held, Dense):
        blocks = blocks_of(entry.held)
        if isinstance(blocks, Blocks):
            return replace(entry, kind=blocks.kind, codes=True)
        why = blocks
    if dtype is None and why:
        raise ModelError(
            f"{model}: GGUF does not hold {name} as it is: {why}. {HOLDS}; or give a dtype that such matrices are "
            f"rounded to ({', '.join(DTYPES)})"
        )
    kind = _EXACT[narrowest(entry.dense())] if dtype is None else DTYPES[dtype]
    if kind is Kind.Q8_0 and entry.shape[1] % BLOCK:
        raise ModelError(
            f"{model}: blocks of {BLOCK} do not divide the {entry.shape[1]} inputs of {name}; give dtype f16, bf16 "
            "or f32"
        )
    return replace(entry, kind=kind)
