"""Loading a model from wherever it lies: an asset, a directory, the local hub cache, a GGUF file, or a module."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pennyweight.errors import ModelError, PennyweightError
from pennyweight.model import assets, compact, gguf_model, gguf_tokenizer
from pennyweight.model.checkpoint import Checkpoint
from pennyweight.model.gguf_file import GgufFile
from pennyweight.model.model import Model, kind_of
from pennyweight.model.resized import Resized, lay
from pennyweight.transformers_plugin import METHOD
from pennyweight.weights import check_finite

_log = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def load(source: str | Path | nn.Module, *, dtype: torch.dtype = torch.float32, name: str | None = None) -> Model:
    """Load a model in eval mode.

    Args:
        source: the short name of an asset (`assets.names`), a directory with ``config.json`` and safetensors, a GGUF
            file, the id of a model in the local hub cache, or a module, which is taken as it is. A directory that
            has the name of an asset is meant by ``./name``.
        dtype: of the parameters; compact weights keep the dtypes they are stored in.
        name: what to call it; from ``source`` when left out.

    Raises:
        ModelError: nothing can be found there, it is damaged, incomplete, or holds a pickle only.
        FormError: NaN or infinite weights.
    """
    if isinstance(source, nn.Module):
        return of_module(source, name=name)
    if str(source) in assets.names("model"):
        return _from_directory(assets.path(str(source)), dtype, name or str(source))
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, dtype, name or path.stem)
    if path.is_dir():
        return _from_directory(path, dtype, name or path.resolve().name)
    if path.exists():
        raise ModelError(f"{path}: not a model; give a directory with config.json and safetensors, or a .gguf file")
    return _from_directory(_cached(str(source)), dtype, name or str(source))


def of_module(module: nn.Module, *, name: str | None = None) -> Model:
    """A `Model` around ``module``, which is put in eval mode."""
    config = getattr(module, "config", None)
    return Model(
        module.eval(),
        None,
        name or type(module).__name__,
        kind_of(type(module).__name__) if isinstance(module, PreTrainedModel) else "module",
        config if isinstance(config, PreTrainedConfig) else None,
        no_tokenizer="a bare module brings none",
    )


def _cached(source: str) -> Path:
    from huggingface_hub import snapshot_download  # only here: nothing else touches the hub's cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source}: no such asset ({', '.join(assets.names('model'))}), directory, GGUF file, or model in the "
            "local hub cache; download it first (`hf download NAME`), nothing is fetched here"
        ) from error


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration in ``directory``.

    Raises:
        ModelError: missing, damaged, of an unknown model type, or in need of remote code.
    """
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory}: holds no config.json; give a directory that transformers can open") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); copy or download it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ModelError(f"{path}: names no model_type; this is not the configuration of a transformers model")
    if found["model_type"] not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{path}: transformers {transformers.__version__} knows no model type {found['model_type']!r}, and code "
            "that comes with a model is not run"
        )
    quantization = found.get("quantization_config") or {"quant_method": METHOD}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != METHOD:
        raise ModelError(f"{path}: already quantized with {method!r}; give the checkpoint it was made from")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything on values it did not expect
        raise ModelError(f"{path}: {_first_line(error)}") from error
    return config


def _from_directory(directory: Path, dtype: torch.dtype, name: str) -> Model:
    config = read_config(directory)
    checkpoint = Checkpoint(directory)
    blocks, held = getattr(config, "num_hidden_layers", 0), len(checkpoint.names())
    if isinstance(blocks, int) and blocks > held:  # a damaged count would be built before it is missed
        raise ModelError(f"{directory}: config.json asks for {blocks} blocks, the files hold {held} tensors")
    if compact.is_compact(directory) or hasattr(config, "quantization_config"):
        layout = compact.read_layout(checkpoint)
        tensors, resized = compact.Overlay(checkpoint, layout).rest(), layout.resized
        if not layout.plain:
            config.quantization_config = {"quant_method": METHOD, "directory": str(directory)}
    else:
        tensors, resized = {key: checkpoint.read(key) for key in checkpoint.names()}, None
    module = build(config, tensors, dtype, str(directory), resized)
    if (directory / "generation_config.json").is_file() and module.can_generate():
        module.generation_config = _generation_config(directory)
    tokenizer, why_not = read_tokenizer(directory)
    return Model(module, tokenizer, name, kind_of(type(module).__name__), config, why_not)


def _from_gguf(path: Path, dtype: torch.dtype, name: str) -> Model:
    file = GgufFile(path)
    config = gguf_model.config(file)
    tensors = {
        key: check_finite(tensor, f"{path}: {key}").to(dtype) for key, tensor in gguf_model.tensors(file, config)
    }
    module = build(config, tensors, dtype, str(path))
    try:
        tokenizer, why_not = gguf_tokenizer.tokenizer(file), ""
    except ModelError as error:
        tokenizer, why_not = None, str(error)
    return Model(module, tokenizer, name, kind_of(type(module).__name__), config, why_not)


def build(
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    where: str,
    resized: Resized | None = None,
) -> PreTrainedModel:
    """The ``transformers`` model of ``config`` with ``tensors`` in it, in eval mode.

    Raises:
        ModelError: tensors are missing, of another shape, or the configuration makes no model.
    """
    architecture = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, architecture, None) or transformers.AutoModel
    try:
        with _quiet():
            _check_shapes(cls, config, tensors, where, resized)
            module, found = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
            )
    except PennyweightError:
        raise
    except Exception as error:  # what a model's constructor raises on a damaged configuration is anybody's guess
        raise ModelError(
            f"{where}: {architecture or config.model_type} cannot be built: {_first_line(error)}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; the copy is incomplete"
        )
    if found["mismatched_keys"]:
        key, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise ModelError(f"{where}: {key} is {tuple(stored)} where config.json asks for {tuple(wanted)}")
    if found["unexpected_keys"]:
        unexpected = sorted(found["unexpected_keys"])
        _log.warning("%s: %d tensors have no place in %s: %s", where, len(unexpected), architecture, unexpected[0])
    if hasattr(module, "hf_quantizer"):
        # only how it was opened: from here on it is a model like any other
        module.hf_quantizer.remove_quantization_config(module)
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                part.config.__dict__.pop("_is_quantized", None)
    built: PreTrainedModel = module.eval()
    return built


def _check_shapes(
    cls: Any, config: PreTrainedConfig, tensors: dict[str, Tensor], where: str, resized: Resized | None
) -> None:
    """Refuse tensors of other shapes than ``config`` asks for, before anything of that size is allocated."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(len(tensors), 1) and not hasattr(config, "quantization_config"):
        raise ModelError(f"{where}: {layers} layers are configured, and there are {len(tensors)} tensors")
    if not issubclass(cls, PreTrainedModel):
        return  # an Auto class: which model it makes is found out by making it
    with torch.device("meta"):
        skeleton = cls(config)
    if resized:
        lay(skeleton, resized, where)
    for name, wanted in skeleton.state_dict().items():
        if name in tensors and tensors[name].shape != wanted.shape:
            there = tuple(tensors[name].shape)
            raise ModelError(f"{where}: {name} is {there}, the configuration asks for {tuple(wanted.shape)}")


def restore(module: nn.Module, directory: str | Path, *, name: str | None = None) -> Model:
    """Load what `saving.save` wrote of a plain module back into a fresh one of the same class.

    Args:
        module: dense, as its class makes it; changed.
        directory: holds ``model.safetensors`` and ``weights.json``.
        name: what to call it.

    Raises:
        ModelError: damaged, or of another module.
    """
    checkpoint = Checkpoint(directory)
    overlay = compact.Overlay(checkpoint, compact.read_layout(checkpoint))
    overlay.strip(module)
    overlay.attach(module)
    rest, wanted = overlay.rest(), module.state_dict()
    for key, tensor in rest.items():
        if key not in wanted or wanted[key].shape != tensor.shape:
            there = tuple(wanted[key].shape) if key in wanted else "nothing"
            raise ModelError(f"{directory}: {key} is {tuple(tensor.shape)}, the module has {there} there")
    missing = [key for key in module.load_state_dict(rest, strict=False).missing_keys if not overlay.owns(key)]
    if missing:
        raise ModelError(f"{directory}: {len(missing)} tensors of the module are missing, the first is {missing[0]}")
    return of_module(module, name=name or Path(directory).name)


def _generation_config(directory: Path) -> GenerationConfig:
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # damaged values raise whatever the class happens to raise
        raise ModelError(f"{directory / 'generation_config.json'}: {_first_line(error)}") from error
    return found


def read_tokenizer(directory: Path) -> tuple[Any, str]:
    """The tokenizer of a directory; None, and why, where there is none."""
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        return None, f"{directory} holds none (no tokenizer.json)"
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False), ""
    except Exception as error:  # damaged files raise bare exceptions from the Rust side
        return None, f"the one in {directory} cannot be read ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of missing tensors from transformers: `build` says what is wrong in one line."""
    talk: Any = transformers_logging  # untyped
    bar, level = talk.is_progress_bar_enabled(), talk.get_verbosity()
    talk.disable_progress_bar()
    talk.set_verbosity_error()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bar:
            talk.enable_progress_bar()
