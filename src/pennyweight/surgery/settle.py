"""Say new sizes in the configuration, where it has the words: then plain ``transformers`` opens the saved model."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pennyweight.errors import ModelError
from pennyweight.model.loading import build
from pennyweight.model.resized import Resized, lay, note, resized_of
from pennyweight.surgery.trace import run

_TRIALS = 512


def settle(
    module: nn.Module,
    pairs: Collection[tuple[int, int]],
    inputs: Mapping[str, Any] | Sequence[Any],
    rest: Resized | None = None,
) -> bool:
    """Change ``module.config`` so that its class makes a model of these shapes that gives the same; whether it could.

    Args:
        module: shrunk.
        pairs: (old size, new size) of what changed.
        inputs: to compare on.
        rest: sizes that the configuration need not say, since they are saved beside it.
    """
    rest = rest or Resized()
    if not isinstance(module, PreTrainedModel) or not resized_of(module):
        return False
    wanted = _shapes(module)
    for change in itertools.islice(changes(module.config, pairs), _TRIALS):
        config = copy.deepcopy(module.config)
        if not _set(config, change):
            continue
        skeleton = _skeleton(type(module), config, rest)
        if skeleton is None or _shapes(skeleton) != wanted:
            continue
        if rest or _same(module, config, change, inputs):
            _set(module.config, change)
            note(module, rest)
            if not rest:
                _number(module, skeleton)
            return True
    return False


def _number(module: nn.Module, skeleton: nn.Module) -> None:
    """Give every part the whole numbers that its class takes from the configuration; some are read for few inputs."""
    made = dict(skeleton.named_modules())
    for path, part in module.named_modules():
        for key, value in vars(made[path]).items() if path in made else ():
            if type(value) is int and type(vars(part).get(key)) is int:
                setattr(part, key, value)


@contextmanager
def changed(module: nn.Module, change: Mapping[str, Any]) -> Iterator[None]:
    """``module.config`` with other settings, for as long as this lasts; those that it refuses are left."""
    config: Any = getattr(module, "config", None)
    before = copy.copy(config.__dict__) if change and config is not None else {}
    try:
        if before:
            _set(config, change)
        yield
    finally:
        if before:
            config.__dict__.clear()
            config.__dict__.update(before)


def _set(config: PreTrainedConfig, change: Mapping[str, Any]) -> bool:
    """Change settings; whether the configuration takes them."""
    try:
        for key, value in change.items():
            setattr(config, key, copy.copy(value))
    except Exception:  # of the wrong type for that setting, which every class says in its own way
        return False
    return True


def changes(config: PreTrainedConfig, pairs: Collection[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Settings that may say the new sizes, few changes first."""
    ways: dict[str, list[Any]] = {}
    for key, value in config.to_dict().items():
        for old, new in sorted(pairs):
            if type(value) is int and value == old:
                ways.setdefault(key, []).append(new)
            elif isinstance(value, list) and old in value and all(type(one) is int for one in value):
                ways.setdefault(key, []).append([new if one == old else one for one in value])
    options = [[*((key, new) for new in found), None] for key, found in ways.items()]
    every = itertools.islice(itertools.product(*options), 4096)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    for chosen in sorted(every, key=lambda one: sum(part is not None for part in one)):
        found = dict(part for part in chosen if part is not None)
        yield found
        if type(width) is int and type(heads) is int and getattr(config, "head_dim", None) is None:
            yield {**found, "head_dim": width // heads}  # most classes read it where it is there
    for key in (key for key, value in config.to_dict().items() if value is None):
        for _, new in sorted(pairs):
            yield {key: new}  # a size that follows from another one until it is said


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig, rest: Resized) -> PreTrainedModel | None:
    """The model that a file of ``config`` would make, on the meta device; None where it is refused."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial may ask for layers of no channels
            skeleton = cls(type(config).from_dict(config.to_dict()))
        lay(skeleton, rest, "surgery")
    except Exception:  # a configuration that makes no model may fail in any way
        return None
    return skeleton


def _same(
    module: PreTrainedModel,
    config: PreTrainedConfig,
    change: Mapping[str, Any],
    inputs: Mapping[str, Any] | Sequence[Any],
) -> bool:
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__]
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    try:
        built = build(config, tensors, next(module.parameters()).dtype, "surgery")
        found = run(built, inputs)
        with changed(module, change):  # some read their sizes from it
            wanted = run(module, inputs)
    except (ModelError, RuntimeError, ValueError):
        return False
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max() + 1))
        for one, other in zip(found, wanted, strict=True)
    )
