"""Compact layers on disk: what ``weights.json`` says, and how it is laid over a model again.

``model.safetensors`` holds every tensor once under its module path; ``weights.json`` holds the structure of each
compact layer (structures that repeat, once), which layers share one weight, and the SHA-256 of the header it belongs
to, so that files of two runs are never mixed unnoticed.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, PennyweightError, ShapeError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.checkpoint import Checkpoint
from pennyweight.model.experts import SplitExperts, split_experts
from pennyweight.model.products import attention_arithmetic, use_in_attention
from pennyweight.model.resized import Resized, lay, resized_of
from pennyweight.weights import (
    Activation,
    CompactConv1d,
    CompactConv2d,
    CompactLinear,
    Dense,
    Weight,
    rebuild,
    structure,
)
from pennyweight.weights.l_mul import LMul

WEIGHTS = "weights.json"
VERSION = 1


@dataclass(frozen=True)
class Layout:
    """Which layers of a model are compact, and how.

    Attributes:
        structures: by module path, what `weights.structure` gave; tied layers are left out.
        tied: module path to the path of an earlier layer that holds the same weight.
        shared: further names of tensors that are stored once, outside of tied layers.
        split: paths of stacked experts that were taken apart (`experts.split_experts`).
        activations: by module path, the settings of what rounds a layer's input.
        products: by module path, the settings of how a layer multiplies.
        attention: the same of all attention; None as the model has it.
        resized: blocks that are gone and sizes that the configuration does not say.
    """

    structures: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]
    shared: Mapping[str, str]
    split: tuple[str, ...]
    activations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    products: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attention: Mapping[str, Any] | None = None
    resized: Resized = field(default_factory=Resized)

    @property
    def paths(self) -> list[str]:
        """Paths of all compact layers."""
        return [*self.structures, *self.tied]

    @property
    def plain(self) -> bool:
        """Whether the model that its class makes needs nothing but tensors."""
        return not (self.paths or self.split or self.attention or self.resized)


def compact_layers(module: nn.Module) -> dict[str, Weight]:
    """The weight of every compact layer by module path, in order."""
    return {
        path: weight
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(weight := getattr(layer, "weight", None), Weight) and not isinstance(layer, Weight)
    }


def activations(module: nn.Module) -> dict[str, Activation]:
    """What rounds the input of compact layers, by the path of the layer, in order."""
    return {
        path: found
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(found := getattr(layer, "activation", None), Activation)
    }


def products(module: nn.Module) -> dict[str, LMul]:
    """How compact layers multiply that do so in a way of their own, by the path of the layer, in order."""
    return {
        path: found
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(found := getattr(layer, "product", None), LMul)
    }


def compact_layer(module: nn.Module, found: Map) -> CompactLinear | CompactConv1d | CompactConv2d:
    """The compact layer of the linear map or convolution ``found``; a plain one is made one that holds its matrix."""
    layer = module.get_submodule(found.path)
    if not isinstance(layer, (CompactLinear, CompactConv1d, CompactConv2d)):
        anatomy.replace(module, found.path, Dense(anatomy.matrix(module, found).contiguous()))
        layer = module.get_submodule(found.path)
    assert isinstance(layer, (CompactLinear, CompactConv1d, CompactConv2d)), found.kind
    return layer


def behavior(module: nn.Module) -> str:
    """What layers and attention do beside their tensors, as JSON; empty where they do nothing but multiply."""
    layout = layout_of(module)
    found = [_grouped(layout.activations), _grouped(layout.products), dict(layout.attention or {})]
    return json.dumps(found) if any(found) else ""


def layout_of(module: nn.Module) -> Layout:
    """The layout of a model in memory."""
    structures, tied, first = {}, {}, dict[int, str]()
    for path, weight in compact_layers(module).items():
        if id(weight) in first:
            tied[path] = first[id(weight)]
        else:
            first[id(weight)] = path
            structures[path] = structure(weight)
    inside = tuple(f"{path}.weight." for path in tied)
    shared = {name: to for name, to in stored_tensors(module)[1].items() if not name.startswith(inside)}
    split = tuple(path for path, layer in module.named_modules() if isinstance(layer, SplitExperts))
    rounded = {path: found.settings() for path, found in activations(module).items()}
    multiplied = {path: found.settings() for path, found in products(module).items()}
    arithmetic = attention_arithmetic(module)
    attention = None if arithmetic is None else arithmetic.settings()
    return Layout(structures, tied, shared, split, rounded, multiplied, attention, resized_of(module))


def dump(layout: Layout, headers: Mapping[str, str]) -> str:
    """The text of ``weights.json``; ``headers`` gives the SHA-256 of each file's header."""
    forms: dict[str, int] = {}
    layers = {}
    for path, found in layout.structures.items():
        layers[path] = forms.setdefault(json.dumps(found, separators=(",", ":")), len(forms))
    found = {
        "format": "pennyweight",
        "version": VERSION,
        "headers": dict(headers),
        "forms": [json.loads(form) for form in forms],
        "layers": layers,
        **({"tied": dict(layout.tied)} if layout.tied else {}),
        **({"shared": dict(layout.shared)} if layout.shared else {}),
        **({"split_experts": list(layout.split)} if layout.split else {}),
        **({"activations": _grouped(layout.activations)} if layout.activations else {}),
        **({"products": _grouped(layout.products)} if layout.products else {}),
        **({"attention": dict(layout.attention)} if layout.attention else {}),
        **({"resized": layout.resized.plain()} if layout.resized else {}),
    }
    return json.dumps(found, separators=(",", ":"), allow_nan=False)


def _grouped(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that repeat once, with the layers that have them."""
    layers: dict[str, list[str]] = {}
    for path, settings in found.items():
        layers.setdefault(json.dumps(settings), []).append(path)
    return [{**json.loads(settings), "layers": paths} for settings, paths in layers.items()]


def _ungrouped(found: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        path: {key: value for key, value in group.items() if key != "layers"}
        for group in found
        for path in group["layers"]
    }


def read_layout(checkpoint: Checkpoint) -> Layout:
    """The layout beside ``checkpoint``.

    Raises:
        ModelError: damaged, of a newer version, or written for other tensors.
    """
    path = checkpoint.directory / WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{path}: missing, and without it the tensors beside it mean nothing; copy the whole directory"
        )
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != "pennyweight":
            raise ValueError(f"format {found['format']!r}")
        if type(found["version"]) is not int or found["version"] > VERSION:
            raise ModelError(
                f"{path}: version {found['version']!r}; this Pennyweight reads up to {VERSION}; upgrade it"
            )
        headers, forms, layers = dict(found["headers"]), list(found["forms"]), dict(found["layers"])
        if not all(type(index) is int and 0 <= index < len(forms) for index in layers.values()):
            raise ValueError("a layer of a form that is not there")
        structures = {name: dict(forms[index]) for name, index in layers.items()}
        tied, shared = dict(found.get("tied", {})), dict(found.get("shared", {}))
        split = tuple(found.get("split_experts", ()))
        rounded, multiplied = (_ungrouped(found.get(key, ())) for key in ("activations", "products"))
        attention = found.get("attention") and dict(found["attention"])
        resized = Resized.of_plain(found["resized"]) if "resized" in found else Resized()
        if not all(isinstance(name, str) for name in (*split, *shared.values())):
            raise ValueError("names that are not text")
        if not all(isinstance(to, str) and to in structures and name not in structures for name, to in tied.items()):
            raise ValueError("tied layers that do not lead to another layer")
        if not all(name in structures or name in tied for name in (*rounded, *multiplied)):
            raise ValueError("activations or products of a layer that is not there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, PennyweightError):
            raise
        raise ModelError(f"{path}: damaged ({type(error).__name__}: {error}); fit again, or copy it again") from error
    for file, header in checkpoint.headers.items():
        if headers.get(file.name) != header.sha256:
            raise ModelError(
                f"{path}: belongs to another {file.name}; the two come from different runs, copy both again"
            )
    return Layout(structures, tied, shared, split, rounded, multiplied, attention, resized)


class Overlay:
    """Lays compact layers over the dense skeleton of a model, before and after its other tensors are loaded.

    Between `strip` and `attach` the skeleton lacks the tensors that the file holds in compact form, so that nobody
    allocates or initializes them.

    Args:
        checkpoint: holds the tensors.
        layout: says what they make.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint, self.layout = checkpoint, layout
        self._where = str(checkpoint.directory / WEIGHTS)
        self._paths = set(layout.paths)
        self._taken: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._read: dict[str, Tensor] = {}
        self._names = sorted({*checkpoint.names(), *layout.shared})

    def owns(self, name: str) -> bool:
        """Whether tensor ``name`` of the file is read here, and by nobody else."""
        parts = name.split(".")
        inside = any(
            part in ("weight", "activation") and ".".join(parts[:at]) in self._paths for at, part in enumerate(parts)
        )
        return inside or self._in_split(name)

    def rest(self) -> dict[str, Tensor]:
        """The tensors that are not read here, tied ones under each of their names."""
        found = {name: self.checkpoint.read(name) for name in self.checkpoint.names() if not self.owns(name)}
        return found | {name: found[first] for name, first in self.layout.shared.items() if first in found}

    def strip(self, module: nn.Module) -> None:
        """Take the parameters that compact layers stand for off the skeleton, once it has the sizes that were saved.

        Raises:
            ModelError: a compact layer has no place in ``module``.
        """
        if self.layout.resized:
            lay(module, self.layout.resized, self._where)
        for path in self.layout.paths:
            at = None if self._in_split(path) else self._find(module, path)
            if at is not None:
                self._take(module.get_submodule(at), "weight")
        for path in self.layout.split:
            stacked = module.get_submodule(self._find(module, path) or "")
            for name, _ in list(stacked.named_parameters(recurse=False)):
                self._take(stacked, name)

    def attach(self, module: nn.Module) -> None:
        """Put every compact layer in its place.

        Raises:
            ModelError: tensors are missing or do not fit.
            FormError: a structure that cannot be rebuilt.
        """
        for stripped, name, parameter in self._taken:
            del stripped.__dict__[name]
            stripped._parameters[name] = parameter
        if self.layout.split:
            split_experts(module)
            for path in self.layout.split:
                self._fill(path, module.get_submodule(self._find(module, path) or ""))
        places = {path: self._find(module, path) for path in self.layout.paths}
        found = {path: at for path, at in places.items() if at is not None}  # a head: the model was opened without one
        made = self._weights({self.layout.tied.get(path, path) for path in found})
        self._replace(module, {at: made[self.layout.tied.get(path, path)] for path, at in found.items()})
        for path, at in found.items():
            if path in self.layout.activations:
                module.get_submodule(at).register_module("activation", self._activation(path))
            if path in self.layout.products:
                layer: Any = module.get_submodule(at)
                layer.product = LMul.of(self.layout.products[path], f"{self._where}: {path}")
        if self.layout.attention:
            use_in_attention(module, LMul.of(self.layout.attention, f"{self._where}: attention"))

    def _in_split(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.layout.split)

    def _take(self, layer: nn.Module, name: str) -> None:
        parameter = layer._parameters.pop(name, None)
        if parameter is None:
            raise ModelError(f"{self._where}: {type(layer).__name__} has no parameter {name!r} to replace")
        # a plain attribute: unseen by whoever loads or counts parameters, and still there for the initialization of
        # the modules around it, which writes to it (in vain: it lies on the meta device)
        layer.__dict__[name] = parameter
        self._taken.append((layer, name, parameter))

    def _find(self, module: nn.Module, path: str) -> str | None:
        """``path`` in ``module``, which may be the bare model inside the one that was saved, or around it."""
        prefix = getattr(module, "base_model_prefix", "")
        candidates = [path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"] if prefix else [path]
        for candidate in candidates:
            try:
                module.get_submodule(candidate)
            except AttributeError:
                continue
            return candidate
        if not hasattr(module, "get_output_embeddings") or self._in_split(path):
            raise ModelError(f"{self._where}: the model has no layer {path}")
        return None

    def _fill(self, path: str, experts: nn.Module) -> None:
        """Read the dense tensors of split experts, saved below ``path``."""
        for inner, layer in experts.named_modules():
            at = f"{path}.{inner}"
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name == "weight" and at in self._paths:
                    continue
                tensor = self.checkpoint.read(f"{at}.{name}")
                if tensor.shape != parameter.shape:
                    there, wanted = tuple(tensor.shape), tuple(parameter.shape)
                    raise ModelError(
                        f"{self.checkpoint.directory}: {at}.{name} is {there}, config.json asks for {wanted}"
                    )
                setattr(layer, name, nn.Parameter(tensor.to(parameter.dtype)))

    def _weights(self, paths: set[str]) -> dict[str, Weight]:
        """The weights at ``paths``, several at once: streams are decoded outside of the interpreter."""

        def made(path: str) -> Weight:
            return rebuild(self.layout.structures[path], tensors[path], where=f"{self._where}: {path}")

        tensors = {path: self._below(f"{path}.weight.") for path in sorted(paths)}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return dict(zip(tensors, pool.map(made, tensors), strict=True))

    def _activation(self, path: str) -> Activation:
        tensors = self._below(f"{path}.activation.")
        return Activation.rebuild(self.layout.activations[path], tensors, where=f"{self._where}: {path}")

    def _below(self, begin: str) -> dict[str, Tensor]:
        names = self._names[bisect_left(self._names, begin) :]
        inside = takewhile(lambda name: name.startswith(begin), names)
        return {name.removeprefix(begin): self._tensor(name) for name in inside}

    def _tensor(self, name: str) -> Tensor:
        """Tensor ``name``; layers that share it get the same memory."""
        first = self.layout.shared.get(name, name)
        if first not in self._read:
            tensor = self.checkpoint.read(first)
            if first not in self.layout.shared.values():
                return tensor
            self._read[first] = tensor
        return self._read[first]

    def _replace(self, module: nn.Module, weights: dict[str, Weight]) -> None:
        try:
            anatomy.replace_all(module, weights)
        except (ModelError, ShapeError) as error:
            raise ModelError(f"{self._where}: {error}") from error


def untie(module: nn.Module, paths: set[str]) -> None:
    """Make a ``transformers`` model forget that it ties the weights of the layers at ``paths``: sharing one `Weight`
    ties them already, and there is no tensor to copy."""
    gone = {f"{path}.weight" for path in paths}
    for at, model in module.named_modules():
        begin = f"{at}." if at else ""
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            keys = getattr(model, attribute, None)
            if isinstance(keys, dict):
                left = {
                    target: source
                    for target, source in keys.items()
                    if f"{begin}{target}" not in gone and f"{begin}{source}" not in gone
                }
                setattr(model, attribute, left)


def stored_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state dict under its first name, and the other names of those that have more than one."""
    first: dict[tuple[Any, ...], str] = {}
    tensors, shared = {}, {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, shared


def is_compact(directory: Path) -> bool:
    """Whether ``directory`` was written with compact layers."""
    return (directory / WEIGHTS).is_file()


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that the uncompressed part of ``module`` computes in: of its first such parameter, else float32."""
    held: list[nn.Module] = [*compact_layers(module).values(), *activations(module).values()]
    inside = {id(parameter) for part in held for parameter in part.parameters()}
    outside = (p for p in module.parameters() if p.is_floating_point() and id(p) not in inside)
    return next((parameter.dtype for parameter in outside), torch.float32)
