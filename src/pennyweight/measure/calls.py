"""How many calls of the framework a pass makes, and the bytes that all but its products move.

A small model spends more time between products than in them: every norm is six calls, each of which reads and writes
its numbers. Both are counted on passes of a few tokens and carried on along straight lines in tokens and context, which
is exact for what is elementwise.

Shape letters: T tokens, S context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pennyweight.evaluate.forward import accepts, device_of, looking
from pennyweight.measure import probe
from pennyweight.model import anatomy

#: Counted as operations of their own (`pennyweight.measure.operations`).
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "_scaled_dot_product", "linear")
_NO_DATA = ("aten._unsafe_view", "aten.lift_fresh", "aten.alias", "aten.detach", "aten.empty")
_FEW, _MORE = 8, 16


@dataclass(frozen=True)
class Calls:
    """Calls of a pass, and bytes that plain operations move.

    Attributes:
        count: of calls in a pass, whatever its size.
        fixed: bytes of a pass.
        per_token: more for each token read, in all sequences.
        per_context: more for each token seen, in each sequence.
    """

    count: int
    fixed: float
    per_token: float
    per_context: float

    def moved(self, tokens: float, seen: float) -> float:
        """Bytes of a pass that reads ``tokens`` and sees ``seen`` earlier ones, over all sequences."""
        return self.fixed + self.per_token * tokens + self.per_context * seen


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is called inside it.

    Attributes:
        calls: so far.
        moved: bytes of tensors read and written by what is neither a product nor a view.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.moved = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls += 1
        name = str(func)
        if not func.is_view and not name.startswith(_NO_DATA) and not name[5:].startswith(_PRODUCTS):
            self.moved += _bytes(args) + _bytes(found)
        return found


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.nbytes
    return sum(map(_bytes, values)) if isinstance(values, (tuple, list)) else 0


def counted(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Calls and plain bytes of ``run()``, and what it returned."""
    with Counter() as counter:
        found = run()
    return counter.calls, counter.moved, found


def prefill(module: nn.Module) -> Calls:
    """Of a pass that reads tokens, or the sample that ``module`` says it takes."""
    with looking(module):
        if not accepts(module, "input_ids"):
            sample = probe.sample_for(module, anatomy.of(module))
            assert sample is not None
            calls, moved, _ = counted(lambda: probe.call(module, sample))
            return Calls(calls, 0.0, moved / sample.count, 0.0)
        few, more = (_first(module, count) for count in (_FEW, _MORE))
        slope = (more[1] - few[1]) / (_MORE - _FEW)
        return Calls(few[0], few[1] - slope * _FEW, slope, 0.0)


def decode(module: nn.Module) -> Calls:
    """Of a pass that reads one token and sees those in the cache."""
    with looking(module):
        few, more = (_one_more(module, count) for count in (_FEW, _MORE))
        slope = (more[1] - few[1]) / (_MORE - _FEW)
        return Calls(few[0], 0.0, few[1] - slope * _FEW, slope)


def _first(module: nn.Module, count: int) -> tuple[int, int]:
    ids = _ids(module, count)
    return counted(lambda: _read(module, ids))[:2]


def _one_more(module: nn.Module, seen: int) -> tuple[int, int]:
    cache, one = _read(module, _ids(module, seen)).past_key_values, _ids(module, 1)
    calls, moved, _ = counted(lambda: _read(module, one, cache))
    return calls, moved


def _ids(module: nn.Module, count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long, device=device_of(module))


def _read(module: nn.Module, ids: Tensor, cache: Any = None) -> Any:
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return module(ids, **{name: value for name, value in options.items() if accepts(module, name)})
