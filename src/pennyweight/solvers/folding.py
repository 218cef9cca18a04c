"""Scales between two layers: which channels may be divided before and multiplied after, proved by running the model.

A group of maps that read one input may have its columns multiplied by s if whatever gives that input divides its
channels by s, and nobody else looks. Who that is no name tells: a norm may feed a residual stream beside the maps
(BERT), an activation may stand in between. So the model itself is asked, on one window:

* a norm is a source of the maps that read its very output, if no gradient reaches that output once the maps' inputs
  are cut off: then nothing else depends on it;
* a linear map is the source of another if no gradient reaches its output once the other's input is cut off, and
  doubling and halving its channels doubles and halves the other's input, channel for channel.

Shape letters: N channels, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.calibrate.walk import Windows, cast, inputs_of
from pennyweight.errors import FormError, OptionError
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.model.anatomy import Map
from pennyweight.model.compact import dtype_of
from pennyweight.model.model import Model
from pennyweight.weights import Weight

#: Roles of which the second reads what the first gives, possibly with something in between.
_CHAINS = (("ffn.up", "ffn.down"), ("attention.value", "attention.output"))
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Source:
    """What gives the input of some maps, and how its channels are divided.

    Attributes:
        path: of the norm or linear layer.
        kind: "norm" scales by its weight, "offset norm" by one plus its weight, "linear" by the rows of its matrix.
    """

    path: str
    kind: str


def sources(model: Model, windows: Windows) -> dict[str, Source]:
    """By input group, the source of the maps of the group, where there is one that the run proves.

    Only plain (dense) maps in blocks are looked at; a norm that something else reads as well is no source.

    Args:
        model: unchanged.
        windows: calibration windows, of which the first is run, forward and backward.
    """
    module = model.module
    inputs = _first(cast(inputs_of(model, windows), dtype_of(module)))
    groups: dict[str, list[Map]] = {}
    for layer in _plain(model):
        if layer.block is not None:
            groups.setdefault(layer.input_group, []).append(layer)
    return _norms(module, inputs, model.anatomy.norms, groups) | _linears(module, inputs, groups)


def _plain(model: Model) -> list[Map]:
    return [
        layer
        for layer in model.anatomy.layers()
        if layer.kind in ("linear", "conv1d-transposed")
        and isinstance(model.module.get_submodule(layer.path).weight, nn.Parameter)
    ]


def linear_maps(model: Model, maps: Sequence[Map], where: str) -> list[Map]:
    """Those of ``maps`` that are linear layers; tables and convolutions are for other levers.

    Raises:
        OptionError: none of them is.
        FormError: one that is compact already.
    """
    found = [one for one in maps if one.kind in ("linear", "conv1d-transposed")]
    if not found:
        raise OptionError(
            f"{where}: none of the {len(maps)} selected maps is a linear layer; select some, as by role:ffn.*"
        )
    for one in found:
        held = model.module.get_submodule(one.path).weight
        if isinstance(held, Weight):
            raise FormError(f"{where}: {one.name} is {held.form} already; put this step first")
    return found


def fold(model: Model, windows: Windows, scales: Mapping[str, Tensor]) -> set[str]:
    """Multiply the columns of all maps of a group by its scale, and divide its input where that comes from; in place.

    The model computes what it did, up to rounding in its dtype. Groups without a proven source are left as they are.

    Args:
        model: its plain maps and norms are changed.
        windows: see `sources`.
        scales: (N,), positive, by input group.

    Returns:
        The groups that were folded.
    """
    known = sources(model, windows)
    folded = {group for group in scales if group in known}
    with torch.no_grad():
        for layer in _plain(model):
            if layer.input_group in folded:
                held: Any = model.module.get_submodule(layer.path)
                scale = scales[layer.input_group].to(held.weight)
                held.weight.mul_(scale if isinstance(held, nn.Linear) else scale[:, None])
    for group in scales:
        if group in folded:
            divide(model.module, known[group], scales[group])
    return folded


def divide(module: nn.Module, source: Source, scale: Tensor) -> None:
    """Divide the channels that ``source`` gives by ``scale`` (N,), in place."""
    layer: Any = module.get_submodule(source.path)
    with torch.no_grad():
        if source.kind == "linear":
            weight = layer.weight
            weight.div_(scale.to(weight)[:, None] if isinstance(layer, nn.Linear) else scale.to(weight))
        elif source.kind == "offset norm":
            layer.weight.copy_((1 + layer.weight) / scale.to(layer.weight) - 1)
        else:
            layer.weight.div_(scale.to(layer.weight))
        if getattr(layer, "bias", None) is not None:
            layer.bias.div_(scale.to(layer.bias))


def _first(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: tensor[:1] for name, tensor in inputs.items()}
    return tuple(tensor[:1] for tensor in inputs)


def _run(module: nn.Module, inputs: Any) -> Tensor:
    return first_tensor(module(**inputs) if isinstance(inputs, Mapping) else module(*inputs))


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(module: nn.Module, inputs: Any, norms: Sequence[str], groups: dict[str, list[Map]]) -> dict[str, Source]:
    given: dict[int, str] = {}  # by identity of the tensor, which `kept` keeps alive
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    readers: dict[str, set[str]] = {}

    def give(path: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            probe = torch.zeros_like(output, requires_grad=True)
            found = output + probe
            given[id(found)] = path
            kept.setdefault(path, []).append((probe, found))
            return found

        return hook

    def read(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> Any:
            path = given.get(id(args[0])) if args else None
            readers.setdefault(name, set()).add(path or "")
            return (args[0].detach(), *args[1:]) if path else None

        return hook

    members = [layer for group in groups.values() for layer in group]
    handles = [module.get_submodule(path).register_forward_hook(give(path)) for path in norms]
    handles += [module.get_submodule(layer.path).register_forward_pre_hook(read(layer.name)) for layer in members]
    with _hooked(handles), torch.enable_grad():
        output = _run(module, inputs)
    once = {path: runs[0][0] for path, runs in kept.items() if len(runs) == 1}
    elsewhere = _reached(output, list(once.values()))
    alone = {path for (path, _), seen in zip(once.items(), elsewhere, strict=True) if not seen}
    found = {}
    for group, inside in groups.items():
        paths = set.union(*(readers.get(layer.name, {""}) for layer in inside))
        path = next(iter(paths))
        others = {name for name, read_by in readers.items() if path in read_by} - {layer.name for layer in inside}
        if len(paths) == 1 and path in alone and not others:
            kind = _norm_kind(module.get_submodule(path), inside[0].shape[1])
            if kind is not None:
                found[group] = Source(path, kind)
    return found


def _reached(output: Tensor, probes: list[Tensor]) -> list[bool]:
    """Whether the gradient of (a random sum of) ``output`` by each probe is other than zero."""
    if not probes or not output.requires_grad:
        return [False] * len(probes)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    with torch.enable_grad():
        found = torch.autograd.grad((output * pull).sum(), probes, allow_unused=True)
    return [gradient is not None and bool(gradient.any()) for gradient in found]


def _norm_kind(norm: nn.Module, width: int) -> str | None:
    """How its weight scales its channels; None when neither way does."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (width,):
        return None
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=g).to(weight)
    scale = torch.exp2(torch.randint(-2, 3, (width,), generator=g).double()).to(weight)
    held = [parameter.detach().clone() for parameter in norm.parameters(recurse=False)]
    with looking(norm):
        wanted = norm(x) / scale
        for kind in ("norm", "offset norm"):
            _divided(norm, kind, scale)
            near = bool(((norm(x) - wanted).norm() <= _TOLERANCE * wanted.norm()).item())
            for parameter, before in zip(norm.parameters(recurse=False), held, strict=True):
                parameter.copy_(before)
            if near:
                return kind
    return None


def _divided(norm: nn.Module, kind: str, scale: Tensor) -> None:
    shell = nn.Module()
    shell.add_module("norm", norm)
    divide(shell, Source("norm", kind), scale)


def _linears(module: nn.Module, inputs: Any, groups: dict[str, list[Map]]) -> dict[str, Source]:
    by_role = {(layer.block, layer.role): layer for group in groups.values() for layer in group}
    pairs = []
    for first, second in _CHAINS:
        for (block, role), layer in by_role.items():
            after = by_role.get((block, second))
            if role != first or after is None or len(groups[after.input_group]) > 1:
                continue
            if after.shape[1] == layer.shape[0]:
                pairs.append((layer, after))
    probes: dict[str, list[Tensor]] = {}

    def probe(path: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            probes.setdefault(path, []).append(torch.zeros_like(output, requires_grad=True))
            return output + probes[path][-1]

        return hook

    def cut(layer: nn.Module, args: Any) -> Any:
        return (args[0].detach(), *args[1:])

    handles = [module.get_submodule(one.path).register_forward_hook(probe(one.path)) for one, _ in pairs]
    handles += [module.get_submodule(other.path).register_forward_pre_hook(cut) for _, other in pairs]
    with _hooked(handles), torch.enable_grad():
        output = _run(module, inputs)
    leaked = dict(zip(probes, _reached(output, [runs[0] for runs in probes.values()]), strict=True))
    found = {}
    follows = _follows(module, inputs, pairs)
    for first_map, second_map in pairs:
        if len(probes.get(first_map.path, ())) == 1 and not leaked[first_map.path] and follows.get(second_map.path):
            found[second_map.input_group] = Source(first_map.path, "linear")
    return found


def _follows(module: nn.Module, inputs: Any, pairs: Sequence[tuple[Map, Map]]) -> dict[str, bool]:
    """By path of the second map, whether its input is scaled as the output of the first one is."""
    g = torch.Generator().manual_seed(1)
    scales = {one.path: torch.exp2(torch.randint(-1, 2, (one.shape[0],), generator=g).float()) for one, _ in pairs}
    before: dict[str, Tensor] = {}
    same: dict[str, bool] = {}

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            before[path] = args[0].detach()

        return hook

    def scaled(path: str) -> Any:
        return lambda layer, args, output: output * scales[path].to(output)

    def compare(path: str, source: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> Any:
            wanted = before[path] * scales[source].to(before[path])
            near = args[0].shape == wanted.shape and (args[0] - wanted).norm() <= _TOLERANCE * wanted.norm()
            same[path] = bool(near)
            return (before[path], *args[1:])  # so that later maps see what they saw before

        return hook

    with looking(module):
        with _hooked([module.get_submodule(b.path).register_forward_pre_hook(keep(b.path)) for _, b in pairs]):
            _run(module, inputs)
        handles = [module.get_submodule(a.path).register_forward_hook(scaled(a.path)) for a, _ in pairs]
        handles += [module.get_submodule(b.path).register_forward_pre_hook(compare(b.path, a.path)) for a, b in pairs]
        with _hooked(handles):
            _run(module, inputs)
    return same
