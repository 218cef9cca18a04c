"""What no structure tells: how long a candidate takes on this machine, and what it holds in memory once it has run.

A candidate is solved and run once for each shape of matrix; long matrices by a share of their rows, for both grow with
them. What a whole model takes is measured on the whole model (`observe`): the difference is what every plan has beside
its matrices, and the next round plans with it.

Shape letters: M out features, N in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.damage import Prediction, sample
from pennyweight.evaluate.forward import accepts, looking
from pennyweight.lever import options_of
from pennyweight.measure import decoding, energy, latency, memory
from pennyweight.measure.cost import cost
from pennyweight.measure.measurement import run_once
from pennyweight.model.model import Model
from pennyweight.model.saving import save
from pennyweight.plan.slots import Slot, matrix_of
from pennyweight.units import Resource, whole
from pennyweight.weights import Dense, Weight

#: Resources that are measured on this machine, rather than read off the structure.
MEASURED = frozenset({"latency", "memory"})
_ROWS = 4096  # of a matrix that is tried
_PROMPT, _WRITTEN = 64, 16  # tokens read and written to time a whole model
_REPEATS = 7


@dataclass(frozen=True)
class Probe:
    """What one matrix takes.

    Attributes:
        nanoseconds: to multiply one token's row.
        resident: bytes of the tensors it holds once it has run.
    """

    nanoseconds: int
    resident: int

    def cost(self, resources: Collection[str]) -> dict[str, int]:
        """By resource."""
        return {n: v for n, v in (("latency", self.nanoseconds), ("memory", self.resident)) if n in resources}


def probe(weight: Weight, *, tokens: int, dtype: torch.dtype) -> Probe:
    """Run ``weight`` on ``tokens`` rows at a time."""
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        found = latency.time(lambda: weight(x), repeats=_REPEATS, warmup=2)
    held = {id(tensor): tensor.nbytes for tensor in (*weight.parameters(), *weight.buffers())}
    return Probe(int(1e9 * found.seconds.value / tokens), sum(held.values()))


def kind_of(slot: Slot, lever: Any) -> dict[str, Any]:
    """What tells probes apart: shape, lever and options."""
    name = None if lever is None else lever.lever_name
    return {"shape": list(slot.map.shape), "lever": name, "options": {} if lever is None else options_of(lever)}


def try_out(model: Model, slot: Slot, lever: Any, ids: Tensor) -> Probe:
    """Solve ``slot`` with ``lever`` (None: leave it) and run it as ``model`` would on ``ids``."""
    module = model.module
    matrix = matrix_of(module, slot)
    weight, statistics = sample(Dense(matrix), slot.statistics, _ROWS, 0)
    solved = weight if lever is None else lever.solve(weight, statistics)
    found = probe(solved, tokens=tokens_a_time(module, ids), dtype=matrix.dtype)
    share = matrix.shape[0] / weight.shape[0]
    return Probe(int(found.nanoseconds * share) if _is_read(model, slot) else 0, int(found.resident * share))


def priced(
    model: Model, slots: Sequence[Slot], offers: Mapping[str, Sequence[Prediction]], resources: Collection[str],
    probes: Mapping[Any, Probe],
) -> dict[str, list[Prediction]]:  # fmt: skip
    """``offers`` with what probes and the energy model say of them.

    Args:
        model: the original.
        slots: all of it.
        offers: by slot name.
        resources: what is budgeted.
        probes: by slot shape and lever, see `key_of`; empty unless something `MEASURED` is budgeted.
    """
    found: dict[str, list[Prediction]] = {}
    for slot in slots:
        made = []
        for offer in offers[slot.name]:
            extra = dict(probes[key_of(slot, offer.lever)].cost(resources)) if probes else {}
            if "energy" in resources:
                spent = energy.model(offer.cost.flops, offer.cost.bytes if _is_read(model, slot) else 0)
                extra["energy"] = whole("energy", spent.joules)
            made.append(replace(offer, extra=extra))
        found[slot.name] = made
    return found


def _is_read(model: Model, slot: Slot) -> bool:
    """Whether a token reads the whole matrix: a table that is only looked up gives one row."""
    return slot.map.kind != "embedding" or model.anatomy.tied


def key_of(slot: Slot, lever: Any) -> tuple[Any, ...]:
    """A key of the probes: shape and lever."""
    return (*slot.map.shape, lever)


def observe(model: Model, resource: Resource, ids: Tensor) -> float:
    """What the whole model takes of ``resource``, in its base unit.

    Args:
        model: as it is to be used.
        resource: "latency": seconds a token (decoding a text, batch 1; for models that do not write, a window's time
            over its tokens); "memory": bytes resident at most in a process that loads it and runs one window; "energy":
            joules a token by the stated model.
        ids: (W, T) windows.
    """
    if resource == "latency":
        return _seconds(model.module, ids)
    if resource == "energy":
        costs = cost(model)
        assert costs.flops_per_token is not None
        assert costs.bytes_read_per_token is not None
        context = min(_PROMPT, ids.shape[1]) + _WRITTEN // 2
        flops = costs.flops_per_token + costs.attention_flops(context)
        return energy.model(flops, costs.bytes_read_per_token + costs.kv_bytes(context)).joules
    assert resource == "memory"
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        return memory.peak(run_once, str(Path(folder) / "model"), ids[:1].tolist(), None).bytes


def tokens_a_time(module: nn.Module, ids: Tensor) -> int:
    """How many rows a matrix gets at a time where latency is measured."""
    return 1 if accepts(module, "past_key_values") else ids.shape[1]


def _seconds(module: nn.Module, ids: Tensor) -> float:
    if tokens_a_time(module, ids) == 1:
        found = decoding.speed(module, ids[0, :_PROMPT], tokens=_WRITTEN, repeats=_REPEATS)
        return 1 / found.decode.value
    with looking(module, None):
        timed = latency.time(lambda: module(input_ids=ids[:1]), repeats=_REPEATS)
    return timed.seconds.value / ids.shape[1]
