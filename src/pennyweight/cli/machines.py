"""Devices, and what a model takes on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.errors import OptionError


def tune(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the profile there, too.")] = None,
) -> None:
    """Measure this machine once: to predict times for it (`measure --roofline --device here`), and to multiply by codes
    in the way that is faster here."""
    from pennyweight.cli.progress import progress
    from pennyweight.cli.tables import emit
    from pennyweight.measure import kernels
    from pennyweight.measure import tune as tuning
    from pennyweight.weights import one_row

    with progress() as report:
        found = tuning.tune(report=report)
        rows = kernels.rows(report=report)
    print(_words(found))
    for name, most in rows.items():
        print(f"codes of {name}: read as they are packed up to {most} rows")
    print(f"kept in {tuning.place()} and {one_row.keep_limits(rows)}")
    if json:
        emit(found.to_json(), json)


def devices(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """The devices whose published data sheets are here."""
    from pennyweight.cli.tables import emit, table
    from pennyweight.measure.devices import published

    if json:
        emit([device.to_json() for device in published()])
        return
    header = ("device", "also", "memory", "GB/s", "TFLOP/s", "source")
    found = []
    for one in published():
        speeds = ", ".join(f"{name} {speed / 1e12:g}" for name, speed in one.flops_per_second.items())
        size = "" if one.memory_bytes is None else f"{one.memory_bytes / 1e9:g} GB"
        found.append((one.name, ", ".join(one.aliases), size, f"{one.bytes_per_second / 1e9:g}", speeds, one.source))
    table(header, found)


def _words(device: Any) -> str:
    speeds = ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s" for name, speed in device.flops_per_second.items())
    return (
        f"{device.source}: {device.bytes_per_second / 1e9:.1f} GB/s, {speeds}, "
        f"{device.call_seconds * 1e6:.1f} us a call of the framework"
    )


def taken_apart(
    model: str,
    *,
    roofline: bool,
    breakdown: bool,
    idealized: bool,
    device: str | None,
    batch: int,
    context: int,
    precision: str | None,
    json: Path | None,
) -> None:
    """What `measure` does with --roofline, --breakdown or --idealized."""
    from pennyweight.cli.tables import emit, show

    if roofline + breakdown + idealized > 1:
        raise OptionError("measure: give one of --roofline, --breakdown and --idealized at a time")
    if not roofline and (device is not None or precision is not None):
        raise OptionError(
            "measure: --device and --precision are of --roofline; without it, the model runs here as it is"
        )
    if roofline:
        found = _rooflines(model, device, batch, context, precision)
    else:
        found = _breakdowns(model, batch, context) if breakdown else [_idealized(model, context)]
    for one in found:
        show(one.table())
    if json:
        emit([one.to_json() for one in found], json)


def _breakdowns(model: str, batch: int, context: int) -> list[Any]:
    import torch

    from pennyweight.measure import dissect
    from pennyweight.model.loading import load

    loaded = load(model)
    if loaded.anatomy.embedding is None or loaded.anatomy.head is None:
        raise OptionError(f"measure --breakdown: {loaded.name} is no language model; `measure.dissect` takes any loss")
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.anatomy.embedding.shape[0], (batch, context), generator=draws)
    trainings = [dissect.training(loaded, ids, technique=technique) for technique in dissect.TECHNIQUES]
    return [*trainings, dissect.generation(loaded, ids[0])]


def _idealized(model: str, context: int) -> Any:
    from pennyweight.measure.idealized import fit, time_queries
    from pennyweight.model.loading import load

    prompts = sorted({max(1, context // 16), max(1, context // 4), context})
    return fit(time_queries(load(model), prompts=prompts))


def _rooflines(model: str, device: str | None, batch: int, context: int, precision: str | None) -> list[Any]:
    from pennyweight.measure import operations, tune
    from pennyweight.measure.roofline import roofline
    from pennyweight.model.loading import load, read_config

    if device is None:
        raise OptionError("measure --roofline: on what? give --device, see `pennyweight devices`; here after `tune`")
    there, path = tune.find(device), Path(model)
    bare = path.is_dir() and not any(path.glob("*.safetensors*"))
    loaded: Any = operations.bare(read_config(path)) if bare else load(model)
    if there.measured and bare:
        raise OptionError(f"measure --roofline: {path} holds no weights; times are predicted for models that run here")
    found = operations.skeleton(loaded)
    return [
        roofline(
            loaded if there.measured else found, device=there, stage=stage, batch=batch, context=context,
            precision=precision,
        )
        for stage in (("prefill", "decode") if found.costs.cache else ("prefill",))
    ]  # fmt: skip
