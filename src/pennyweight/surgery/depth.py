"""Take whole blocks out of a model.

A block that is gone passes on what it was given: that is what the shrunk model is held against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from pennyweight.errors import ModelError, OptionError
from pennyweight.model import anatomy
from pennyweight.model.resized import Resized, keep_blocks, note, resized_of
from pennyweight.surgery.cut import TOLERANCE
from pennyweight.surgery.settle import settle
from pennyweight.surgery.trace import run


def without(module: nn.Module, blocks: Collection[int], inputs: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    """The outputs of ``module`` where ``blocks`` (indices of its anatomy) pass on what they are given.

    Raises:
        ModelError: a block gives something of another shape than it takes.
        OptionError: no such block.
    """
    paths = _paths(module, blocks)
    with ExitStack() as stack:
        for path in paths:
            handle = module.get_submodule(path).register_forward_hook(passing(path), with_kwargs=True)
            stack.callback(handle.remove)
        return run(module, inputs)


def passing(path: str) -> Any:
    """A forward hook, with keywords, that makes the block at ``path`` pass on what it is given."""

    def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, (tuple, list)) else out
        given = next((one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)), None)
        if given is None or not isinstance(first, Tensor) or given.shape != first.shape:
            raise ModelError(f"surgery: {path} gives another shape than it takes; it cannot be left out")
        return (given, *out[1:]) if isinstance(out, (tuple, list)) else given

    return hook


def _paths(module: nn.Module, blocks: Collection[int]) -> list[str]:
    there = anatomy.of(module).blocks
    missing = [index for index in blocks if not 0 <= index < len(there)]
    if missing or len(set(blocks)) >= len(there):
        raise OptionError(
            f"surgery: blocks {sorted(blocks)} of {len(there)}; give some of 0 to {len(there) - 1}, and leave one"
        )
    return [there[index].path for index in sorted(set(blocks))]


def remove_blocks(module: nn.Module, blocks: Collection[int], inputs: Mapping[str, Any] | Sequence[Any]) -> float:
    """Take ``blocks`` (indices of the anatomy) out of ``module``, in place.

    Returns:
        The largest difference between an output and that of the model whose blocks pass on what they are given.

    Raises:
        ModelError: blocks that change shapes, or that lie in no list; the model is as it was.
        OptionError: no such block, or none left.
    """
    if not blocks:
        return 0.0
    paths, wanted = _paths(module, blocks), without(module, blocks, inputs)
    gone: dict[str, set[int]] = {}
    for path in paths:
        above, _, key = path.rpartition(".")
        container = module.get_submodule(above)
        gone.setdefault(above, set()).add(list(container._modules).index(key))
    before = resized_of(module)
    config = copy.deepcopy(module.config.__dict__) if isinstance(module, PreTrainedModel) else {}
    kept, lists = dict(before.kept), {}
    for above, taken in gone.items():
        container = module.get_submodule(above)
        lists[above] = (container, container._modules)
        left = [place for place in range(len(container._modules)) if place not in taken]
        if config:
            _slice_lists(module.config, len(container._modules), left)
        first = kept.get(above, tuple(range(len(container._modules))))
        keep_blocks(module, above, left)
        kept[above] = tuple(first[place] for place in left)
    new = _renamed(gone)
    shapes = {name: shape for old, shape in before.shapes.items() if (name := new(old)) is not None}
    sizes = {at: found for old, found in before.sizes.items() if (at := new(old)) is not None}
    linear = {at: found for old, found in before.linear.items() if (at := new(old)) is not None}
    note(module, Resized(kept, shapes, sizes, linear))
    pairs = {(len(found), len(found) - len(gone[above])) for above, (_, found) in lists.items()}
    if not settle(module, pairs, inputs, Resized(before.kept, shapes, sizes, linear)) and config:
        module.config.__dict__.update(copy.deepcopy(config))
    difference, bound = torch.inf, TOLERANCE.get(wanted[0].dtype, 1e-2) * max(float(one.abs().max()) for one in wanted)
    try:
        found = run(module, inputs)
        difference = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        reason = f"it cannot run ({error})"
    else:
        reason = f"it differs by {difference:.2g} from the model whose blocks pass on what they are given"
    if not difference <= bound:
        for container, found_before in lists.values():
            _put_back(container, found_before)
        if config:
            module.config.__dict__.update(config)
        note(module, before)
        raise ModelError(f"surgery: without blocks {', '.join(paths)}: {reason}")
    return difference


def _put_back(container: nn.Module, blocks: Any) -> None:
    """All ``blocks`` in their list again, numbered as they were."""
    container._modules = blocks
    keep_blocks(nn.ModuleDict({"at": container}), "at", range(len(blocks)))


def _slice_lists(config: Any, count: int, left: Sequence[int]) -> None:
    """Lists in the configuration with an entry for each block (kinds of layers) follow the blocks."""
    for key, value in list(config.__dict__.items()):
        if isinstance(value, list) and len(value) == count and not key.startswith("_") and key != "architectures":
            setattr(config, key, [value[place] for place in left])


def _renamed(gone: Mapping[str, set[int]]) -> Callable[[str], str | None]:
    """New names of tensors and modules below lists that lost blocks; None for those that went."""

    def name(old: str) -> str | None:
        for above, taken in gone.items():
            begin = f"{above}."
            if old.startswith(begin):
                key, dot, rest = old[len(begin) :].partition(".")
                if int(key) in taken:
                    return None
                return f"{begin}{int(key) - sum(one < int(key) for one in taken)}{dot}{rest}"
        return old

    return name
