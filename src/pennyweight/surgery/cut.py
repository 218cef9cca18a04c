"""Make a model physically smaller: fewer heads, hidden units, channels, or dimensions of a residual stream.

Tensors are sliced wherever a dimension appears; then whole numbers that the code of modules reads (how many heads, how
to split a fused layer) are found by trial, among those that equal an old size, until the shrunk model gives what the
masked one gives. Where no choice does, everything is put back and the error says so.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import accepts
from pennyweight.model import anatomy
from pennyweight.model.resized import is_counter, note, resized_of
from pennyweight.surgery.axes import Axis, mask_of, parts
from pennyweight.surgery.reference import masked
from pennyweight.surgery.settle import changed, changes, settle
from pennyweight.surgery.trace import Dimension, Graph, run, tensors_of

Inputs = Mapping[str, Any] | Sequence[Any]
#: Largest difference between shrunk and masked outputs, relative to the largest output, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TRIALS = 512


def remove(module: nn.Module, graph: Graph, kept: Mapping[Dimension, Tensor], inputs: Inputs) -> float:
    """Shrink ``module`` in place to what ``kept`` says, and hold it against the masked model.

    Where ``transformers`` can say the new sizes in its configuration, it does, and the model saves as a plain one;
    elsewhere the sizes are saved beside the tensors.

    Args:
        module: as it was traced.
        graph: from `trace` of this module.
        kept: by dimension, which of its indices stay: whole numbers or bool.
        inputs: to compare on.

    Returns:
        The largest difference between an output of the shrunk and the masked model.

    Raises:
        OptionError: indices that are not there, or none left.
        ModelError: the shrunk model gives something else; it is as it was before.
    """
    masks = {dimension.axis: _mask(dimension, stay) for dimension, stay in kept.items()}
    masks = {axis: mask for axis, mask in masks.items() if not bool(mask.all())}
    if not masks:
        return 0.0
    wanted = masked(module, graph, masks, inputs)
    padded = _padded(module, inputs)
    before = {name: tensor.data for name, tensor in tensors_of(module).items()}
    held = tensors_of(module)
    _slice(held, graph, masks)
    numbers = _Numbers(module, graph, masks)
    bound = TOLERANCE.get(wanted[0].dtype, 1e-2) * max(float(one.abs().max()) for one in wanted)
    difference, failures = torch.inf, Counter[str]()
    for choice, change in itertools.islice(_ways(module, numbers), _TRIALS):
        numbers.set(choice)
        with changed(module, change):
            found = _difference(module, inputs, wanted, failures)
            if found <= bound and padded is not None:
                found = max(found, _difference(module, padded, wanted, failures, twice=True))
        difference = min(difference, found)
        if difference <= bound:
            break
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items() if tensor.shape != before[name].shape}
    earlier = resized_of(module)
    _remember(module, shapes, numbers.changed())
    if difference <= bound and (settle(module, numbers.pairs, inputs) or not change):
        return difference
    note(module, earlier)
    numbers.restore()
    for name, data in before.items():
        held[name].data = data
    names = ", ".join(dimension.name for dimension in list(kept)[:3])
    if difference == torch.inf and failures:
        why = "; ".join(failure for failure, _ in failures.most_common(2))
        raise ModelError(
            f"surgery: the model does not run without {names} ({why}); keep other numbers of them, multiples of 8 say"
        )
    raise ModelError(
        f"surgery: without {names} the model differs from the masked one by {difference:.2g} (at most {bound:.2g} "
        "would be rounding); its code reads sizes that cannot be changed"
    )


def _padded(module: nn.Module, inputs: Inputs) -> dict[str, Any] | None:
    """``inputs`` twice, the second time without the last token: what attention reads its sizes for may differ then.

    None where the model takes no mask, or where one row of a batch changes what others give.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.shape[-1] < 2 or not accepts(module, "attention_mask"):
        return None
    assert isinstance(inputs, Mapping)
    mask = inputs.get("attention_mask")
    whole = torch.ones_like(ids) if mask is None else mask
    if whole.shape != ids.shape:
        return None
    cut = whole.clone()
    cut[:, -1] = 0
    twice = {
        name: torch.cat([one, one]) if isinstance(one, Tensor) and one.ndim else one for name, one in inputs.items()
    }
    twice["attention_mask"] = torch.cat([whole, cut])
    wanted = run(module, inputs)
    bound = TOLERANCE.get(wanted[0].dtype, 1e-2) * max(float(one.abs().max()) for one in wanted)
    return twice if _difference(module, twice, wanted, Counter(), twice=True) <= bound else None


def _ways(module: nn.Module, numbers: _Numbers) -> Iterator[tuple[dict[tuple[type, str], int | None], dict[str, Any]]]:
    """Numbers to set; then, for code that reads the configuration itself, settings to change with them."""
    yield from ((choice, {}) for choice in itertools.islice(numbers.choices(), _TRIALS // 2))
    if isinstance(module, PreTrainedModel):
        few = list(itertools.islice(numbers.choices(), 8))
        yield from ((choice, change) for change in changes(module.config, numbers.pairs) for choice in few if change)


def _mask(dimension: Dimension, stay: Tensor) -> Tensor:
    if stay.dtype != torch.bool:
        mask = torch.zeros(dimension.size, dtype=torch.bool)
        if stay.numel() and not 0 <= int(stay.min()) <= int(stay.max()) < dimension.size:
            raise OptionError(f"surgery: {dimension.name} has indices 0 to {dimension.size - 1}, not {stay.tolist()}")
        mask[stay] = True
    else:
        mask = stay
    if mask.shape != (dimension.size,) or not bool(mask.any()):
        raise OptionError(f"surgery: {dimension.name} has {dimension.size} entries; keep at least one of them")
    return mask


def _slice(held: Mapping[str, Tensor], graph: Graph, masks: Mapping[Axis, Tensor]) -> None:
    done: set[int] = set()
    for name, tensor in held.items():
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        kept = [mask_of(axis, masks) for axis in graph.axes[name]]
        data = tensor.data
        for dim, mask in enumerate(kept):
            if not bool(mask.all()):
                data = data.index_select(dim, mask.nonzero().flatten().to(data.device))
        if data is not tensor.data:
            tensor.data = data.contiguous()


def _difference(
    module: nn.Module, inputs: Inputs, wanted: Sequence[Tensor], failures: Counter[str], *, twice: bool = False
) -> float:
    """Of what ``module`` gives (where it is given everything ``twice``, of the first half) from what is ``wanted``.

    Errors are counted in ``failures``.
    """
    try:
        found = run(module, inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:  # sizes that do not fit: a wrong choice
        failures[str(error).partition("\n")[0]] += 1
        return torch.inf
    if twice:
        found = [one[: len(one) // 2] if one.ndim else one for one in found]
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return torch.inf
    worst = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    return worst if worst == worst else torch.inf


class _Numbers:
    """The whole numbers of modules that may be sizes which changed."""

    def __init__(self, module: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]) -> None:
        self.module = module
        #: (old size, new size) of everything that changed
        self.pairs: set[tuple[int, int]] = set()
        self._fixed: list[tuple[nn.Module, str, Any, Any]] = []
        #: by class and name, since what a class reads it reads in all its modules: module, old, the new ones
        self._open: dict[tuple[type, str], list[tuple[nn.Module, int, list[int]]]] = {}
        containers = _containers(module)
        self._path = {id(part): path for path, part in module.named_modules()}
        for path, axes in graph.touched.items():
            sizes: dict[int, set[int]] = {}
            for axis in {id(part): part for one in axes for part in parts(one)}.values():
                new = int(mask_of(axis, masks).sum())
                if new != axis.size:
                    sizes.setdefault(axis.size, set()).add(new)
            part = module.get_submodule(path)
            self.pairs.update((old, new) for old, found in sizes.items() for new in found)
            known = set(_own_sizes(part))
            for key, value in vars(part).items():
                if type(value) is int and value in sizes and key not in known and not _counts(containers, path, key):
                    option = (part, value, sorted(sizes[value]))
                    self._open.setdefault((type(part), key), []).append(option)
        self._before = [(part, key, getattr(part, key)) for part in module.modules() for key in _own_sizes(part)]

    def choices(self) -> Iterator[dict[tuple[type, str], int | None]]:
        """What to set: by class and name, which of the new sizes; None leaves the old one. Few changes first."""
        keys = list(self._open)
        ways = [[None, *range(max(len(new) for _, _, new in self._open[key]))] for key in keys]
        several = itertools.product(*ways) if len(keys) <= 8 else _few(ways)
        for values in sorted(several, key=lambda chosen: sum(one is not None for one in chosen)):
            yield dict(zip(keys, values, strict=True))

    def set(self, choice: Mapping[tuple[type, str], int | None]) -> None:
        """Set the numbers of ``choice``, and those of the framework's layers."""
        for key, which in choice.items():
            for part, old, new in self._open[key]:
                setattr(part, key[1], old if which is None else new[min(which, len(new) - 1)])
        for part in self.module.modules():
            for name, value in _own_sizes(part).items():
                setattr(part, name, value)

    def restore(self) -> None:
        """Put every number back."""
        self.set(dict.fromkeys(self._open))
        for part, name, value in self._before:
            setattr(part, name, value)

    def changed(self) -> dict[str, dict[str, Any]]:
        """By path of a module, the numbers that are others now."""
        found: dict[str, dict[str, Any]] = {}
        opened = [(part, key[1], old) for key, one in self._open.items() for part, old, _ in one]
        for part, name, old in (*opened, *self._before):
            if getattr(part, name) != old:
                found.setdefault(self._path[id(part)], {})[name] = getattr(part, name)
        return found


def _few(ways: Sequence[Sequence[int | None]]) -> Iterator[tuple[int | None, ...]]:
    """One change at most, two, or all: there are too many to try them all."""
    none: list[int | None] = [None] * len(ways)
    yield tuple(none)
    yield tuple(way[-1] for way in ways)
    for count in (1, 2):
        for places in itertools.combinations(range(len(ways)), count):
            for values in itertools.product(*(ways[place][1:] for place in places)):
                made = list(none)
                for place, value in zip(places, values, strict=True):
                    made[place] = value
                yield tuple(made)


def _own_sizes(layer: nn.Module) -> dict[str, Any]:
    """The sizes that a layer of the framework says of itself, as its tensors have them now."""
    match layer:
        case nn.Linear():
            return {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}
        case Conv1D():
            return {"nx": layer.weight.shape[0], "nf": layer.weight.shape[1]}
        case nn.Conv1d() | nn.Conv2d():
            return {"out_channels": layer.weight.shape[0], "in_channels": layer.weight.shape[1] * layer.groups}
        case nn.Embedding():
            return {"embedding_dim": layer.weight.shape[1]}
        case nn.modules.batchnorm._BatchNorm() if layer.running_mean is not None:
            return {"num_features": layer.running_mean.shape[0]}
        case nn.LayerNorm() | nn.RMSNorm() if layer.weight is not None:
            return {"normalized_shape": tuple(layer.weight.shape)}
        case nn.GroupNorm() if layer.weight is not None:
            return {"num_channels": layer.weight.shape[0]}
    return {}


def _containers(module: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    paths = dict.fromkeys(block.path.rpartition(".")[0] for block in anatomy.of(module).blocks)
    return [(path, list(module.get_submodule(path).children())) for path in paths]


def _counts(containers: Sequence[tuple[str, list[nn.Module]]], path: str, key: str) -> bool:
    """Whether the number ``key`` of the module at ``path`` is the index of the block that it lies in."""
    for above, blocks in containers:
        begin = f"{above}." if above else ""
        if path.startswith(begin):
            inner = path[len(begin) :].partition(".")[2]
            if is_counter(blocks, inner, key):
                return True
    return False


def _remember(module: nn.Module, shapes: dict[str, tuple[int, ...]], sizes: dict[str, dict[str, Any]]) -> None:
    known = resized_of(module)
    merged = {path: {**known.sizes.get(path, {}), **sizes.get(path, {})} for path in (*known.sizes, *sizes)}
    note(module, replace(known, shapes={**known.shapes, **shapes}, sizes=merged))
