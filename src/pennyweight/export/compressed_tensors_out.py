"""Export to the compressed-tensors layout ``pack-quantized``: what vLLM runs and ``transformers`` opens.

A linear layer is ``weight_packed`` (codes in 32-bit words, lowest bits first), ``weight_scale`` and ``weight_shape``;
the configuration lists which layers have which widths and groups. Embeddings, heads and norms are plain there. Zeros,
which the layout could say, are refused: ``transformers`` does not open them packed.

Source: the layout of the compressed-tensors package (its compressor ``pack_quantized``). Differs: nothing.

Shape letters: M out features, N in features, G groups of a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.export.checkpoint import rounding
from pennyweight.export.plain import check_plain
from pennyweight.export.result import Exported
from pennyweight.model import compact, safetensors_file
from pennyweight.model.checkpoint import SINGLE, Checkpoint
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.model.sites import expert_stacks
from pennyweight.safe_write import check_free, staged
from pennyweight.weights import Dense, Weight
from pennyweight.weights.layers import CompactLinear
from pennyweight.weights.packing import pack
from pennyweight.weights.quantized import Quantized

#: Widths and groups that vLLM's kernels for packed weights take.
WIDTHS, GROUPS = (4, 8), (None, 32, 64, 128)


def check_compressed_tensors(model: Model) -> None:
    """Refuse what the layout cannot say of ``model``, whatever its matrices will be.

    Raises:
        ModelError: as `pennyweight.export.export`.
    """
    module = check_plain(model, "compressed-tensors")
    if any(expert_stacks(part) for part in module.modules()):
        raise ModelError(f"{model.name}: stacked experts are not written as compressed-tensors; give another format")


def to_compressed_tensors(model: Model, path: Path, *, dtype: str | None, overwrite: bool) -> Exported:
    """A directory that vLLM and ``transformers`` open; see `pennyweight.export.export`."""
    if dtype is not None:
        raise OptionError(f"export compressed-tensors: dtype {dtype!r}; codes are written as they are, leave it out")
    check_compressed_tensors(model)
    check_free(path, overwrite=overwrite)
    module = model.module
    found = model.anatomy
    ends = {end.path for end in (found.embedding, found.head) if end is not None}  # which vLLM runs plain
    packed: dict[str, Quantized] = {}
    for name, weight in compact.compact_layers(module).items():
        if isinstance(module.get_submodule(name), CompactLinear) and name not in ends:
            if not isinstance(weight, Dense):
                packed[name] = _held(weight, f"{model.name}: {name}")
    if not packed:
        raise ModelError(f"{model.name}: no linear layer is quantized; give format safetensors")
    loss = {name: off for name, off in rounding(module, None, model.name).items() if name[:-7] not in packed}
    with TemporaryDirectory() as folder, staged(path, overwrite=overwrite) as aside:
        save(model, Path(folder) / "dense", dense=True)
        dense = Checkpoint(Path(folder) / "dense")
        tensors = {name: dense.read(name) for name in dense.names() if name.removesuffix(".weight") not in packed}
        for name, weight in packed.items():
            tensors |= {f"{name}.{key}": held for key, held in _tensors(weight).items()}
        safetensors_file.write(aside / SINGLE, tensors)
        for file in (Path(folder) / "dense").iterdir():
            if file.suffix != ".safetensors" and file.is_file():
                (aside / file.name).write_bytes(file.read_bytes())
        config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
        linear = {name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, CompactLinear))}
        config["quantization_config"] = _config(packed, sorted(linear - set(packed)))
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in path.iterdir())
    kinds = {name: str(held.dtype).removeprefix("torch.") for name, held in tensors.items()}
    return Exported(path, "compressed-tensors", size, kinds, loss)


def _held(weight: Weight, where: str) -> Quantized:
    why = ""
    if not isinstance(weight, Quantized) or weight.format not in ("integer", "unsigned"):
        why = f"a {type(weight).__name__} weight is no whole numbers on one grid"
    elif weight.bits not in WIDTHS or weight.format == "unsigned" or weight.zero_kind != "none":
        words = f"{weight.bits} bits, {weight.format}, zero: {weight.zero_kind}"
        why = f"its codes are {words}; {' or '.join(map(str, WIDTHS))} bits with zero: none are held"
    elif weight.group_size not in GROUPS or weight.shape[1] % (weight.group_size or 1):
        why = f"groups of {weight.group_size} of its {weight.shape[1]} inputs; 32, 64, 128 and none are held"
    if why:
        raise ModelError(
            f"{where}: compressed-tensors does not hold it: {why}. Solve it with quantize.gptq (bits: 4, group_size: "
            "128, zero: none), or fit with --target compressed-tensors"
        )
    assert isinstance(weight, Quantized)
    return weight


def _words(codes: Tensor, bits: int) -> Tensor:
    """(R, C) whole numbers -> (R, ceil(C * bits / 32)) int32."""
    held = pack(codes, bits)
    return torch.nn.functional.pad(held, (0, -held.shape[1] % 4)).contiguous().view(torch.int32)


def _tensors(weight: Quantized) -> dict[str, Tensor]:
    scale = weight.scale.dense().detach()
    return {
        "weight_packed": _words(weight.codes(), weight.bits),
        "weight_scale": scale.expand(weight.shape[0], -1).contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _config(packed: dict[str, Quantized], ignore: list[str]) -> dict[str, Any]:
    schemes: dict[tuple[int, int | None], list[str]] = {}
    for name, weight in packed.items():
        schemes.setdefault((weight.bits, weight.group_size), []).append(name)
    groups = {
        f"group_{index}": {
            "targets": names,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "channel" if size is None else "group", "group_size": size,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for index, ((bits, size), names) in enumerate(schemes.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignore, "global_compression_ratio": None, "kv_cache_scheme": None,
    }  # fmt: skip
