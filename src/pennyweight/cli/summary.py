"""A receipt in a few lines."""

from __future__ import annotations

from pathlib import Path

from pennyweight.receipt import BudgetLine, Receipt
from pennyweight.units import show_bytes, show_count, show_seconds


def of(receipt: Receipt, directory: Path | None) -> str:
    """What came out of a fit: figures before and after, budgets, floor, and where it lies."""
    lines = [f"{receipt.model.name}: {show_bytes(receipt.model.bf16_bytes)} in bf16"]
    for figure in receipt.figures:
        before = f"{figure.before} -> " if figure.before else ""
        ratio = f", ratio {figure.ratio}" if figure.ratio else ""
        predicted = f", predicted {figure.predicted:.5g}" if figure.predicted is not None else ""
        unit = f" {figure.unit}" if figure.unit else ""
        lines.append(f"{figure.name}: {before}{figure.after}{unit}{ratio}{predicted}")
    lines += [_budget(line) for line in receipt.budgets]
    if receipt.floor is not None:
        floor = receipt.floor
        said = "holds" if floor.holds else "is not shown to hold"
        lines.append(f"floor {floor.asked}: {said} (upper 95 % limit {floor.upper:.5g}, {floor.n} windows)")
    lines += list(receipt.notes)
    seconds = sum(stage.seconds for stage in receipt.run.stages)
    where = f"; written to {directory}" if directory is not None else ""
    lines.append(f"{show_seconds(seconds)}{where}")
    return "\n".join(lines)


def _budget(line: BudgetLine) -> str:
    said = "kept" if line.holds else "NOT KEPT"
    return f"budget {line.asked}: {said}, {_show(line.resource, line.spent)} of {_show(line.resource, line.allowed)}"


def _show(resource: str, value: float) -> str:
    if resource in ("params", "flops"):
        return f"{show_count(value)}{'FLOPs' if resource == 'flops' else 'params'}"
    if resource == "latency":
        return show_seconds(value)
    return f"{value:.4g} J" if resource == "energy" else f"{int(value):,} bytes ({show_bytes(value)})"
