"""What a model's own class does not know: layers of other sizes than its configuration says, and blocks that are gone.

Kept on the module, written into ``weights.json``, and laid over a fresh skeleton before its tensors are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pennyweight.errors import ModelError

_KEY = "pennyweight_resized"


@dataclass(frozen=True)
class Resized:
    """How a module differs from what its class makes of its configuration.

    Attributes:
        kept: by path of a list of blocks, which of its blocks are left, in order.
        shapes: by name, the shapes of tensors that are smaller.
        sizes: by path of a module, whole numbers that its code reads and that changed.
        linear: by path of a module, (outputs, inputs) of the linear layer with a bias that stands in its place.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    linear: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.shapes or self.sizes or self.linear)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "kept": {path: list(found) for path, found in self.kept.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "sizes": {path: dict(found) for path, found in self.sizes.items()},
            **({"linear": {path: list(found) for path, found in self.linear.items()}} if self.linear else {}),
        }

    @classmethod
    def of_plain(cls, found: Mapping[str, Any]) -> Resized:
        """What `plain` gave.

        Raises:
            ValueError: anything else.
        """
        kept = {str(path): tuple(map(int, one)) for path, one in found["kept"].items()}
        shapes = {str(name): tuple(map(int, one)) for name, one in found["shapes"].items()}
        sizes = {
            str(path): {str(key): tuple(value) if isinstance(value, list) else int(value) for key, value in one.items()}
            for path, one in found["sizes"].items()
        }
        linear = {str(path): (int(out), int(into)) for path, (out, into) in found.get("linear", {}).items()}
        if any(size < 0 for shape in (*shapes.values(), *kept.values(), *linear.values()) for size in shape):
            raise ValueError("sizes below 0")
        return cls(kept, shapes, sizes, linear)


def resized_of(module: nn.Module) -> Resized:
    """How ``module`` differs from what its class makes; falsy where it does not."""
    found: Resized = module.__dict__.get(_KEY, Resized())
    return found


def note(module: nn.Module, found: Resized) -> None:
    """Remember how ``module`` differs."""
    module.__dict__[_KEY] = found


def lay(module: nn.Module, found: Resized, where: str) -> None:
    """Give the fresh skeleton ``module`` the blocks and shapes of ``found``; its tensors are then to be filled.

    Raises:
        ModelError: ``found`` speaks of something that is not there.
    """
    try:
        for path, kept in found.kept.items():
            keep_blocks(module, path, kept)
        for path, (out, into) in found.linear.items():
            old = next(module.get_submodule(path).parameters())
            module.set_submodule(path, nn.Linear(into, out, device=old.device, dtype=old.dtype))
        for name, shape in found.shapes.items():
            _reshape(module, name, shape)
        for path, sizes in found.sizes.items():
            part = module.get_submodule(path)
            for key, value in sizes.items():
                if key not in part.__dict__:
                    raise AttributeError(f"{path} has no {key}")
                setattr(part, key, value)
    except (AttributeError, IndexError, KeyError, StopIteration) as error:
        raise ModelError(f"{where}: speaks of layers that the model has not ({error})") from error
    note(module, found)


def _reshape(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, leaf = name.rpartition(".")
    part = module.get_submodule(path)
    old = getattr(part, leaf)
    if tuple(old.shape) != shape:
        # the same object: other layers may share it
        old.data = torch.zeros(shape, dtype=old.dtype, device=old.device)


def keep_blocks(module: nn.Module, path: str, kept: Iterable[int]) -> None:
    """Leave only the blocks ``kept`` in the list at ``path``, and number them anew.

    Raises:
        ModelError: no list of blocks lies there.
    """
    container = module.get_submodule(path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise ModelError(f"{path}: {type(container).__name__} is no list of blocks; nothing can be taken out of it")
    blocks = list(container.children())
    left = [blocks[index] for index in kept]
    container._modules = OrderedDict((str(place), block) for place, block in enumerate(left))
    for inner, key in _counters(blocks):
        for place, block in enumerate(left):
            setattr(block.get_submodule(inner), key, place)


def _counters(blocks: list[nn.Module]) -> list[tuple[str, str]]:
    """Whole numbers inside blocks that are the index of the block: (path inside the block, name)."""
    found = []
    for inner, part in blocks[0].named_modules() if len(blocks) > 1 else ():
        for key, value in vars(part).items():
            if type(value) is int and value == 0:
                others = [_number(block, inner, key) for block in blocks]
                if others == list(range(len(blocks))):
                    found.append((inner, key))
    return found


def _number(block: nn.Module, inner: str, key: str) -> Any:
    try:
        value = vars(block.get_submodule(inner)).get(key)
    except AttributeError:  # blocks need not be alike
        return None
    return value if type(value) is int else None


def is_counter(blocks: list[nn.Module], inner: str, key: str) -> bool:
    """Whether the number ``key`` at ``inner`` of every block is the index of that block."""
    return (inner, key) in _counters(blocks)
