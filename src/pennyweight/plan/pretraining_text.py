"""A training plan in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pennyweight.laws.law import Range
    from pennyweight.plan.pretraining import Alternative, TrainingPlan

_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def scaled(value: float) -> str:
    """7.32e9 as 7.32B."""
    return next((f"{value / size:.3g}{prefix}" for size, prefix in _PREFIXES if value >= 0.9995 * size), f"{value:.3g}")


def data_size(value: float) -> str:
    """Bytes, scaled."""
    return scaled(value).replace("B", "G") + "B"


def interval(found: Range | None, digits: int = 4) -> str:
    """ " [1.2, 1.4]", or nothing."""
    return f" [{found.low:.{digits}g}, {found.high:.{digits}g}]" if found is not None else ""


def costs(one: Alternative) -> list[str]:
    """The cells of an alternative, in the order of `HEADS`."""
    size = scaled(one.params)
    if one.sparsity:
        size += f" -> {scaled(one.stored_params)}"
    score = "" if one.score is None else f"{one.score:.3f}{interval(one.score_interval, 3)}"
    return [
        one.name,
        size,
        f"{one.bits:g}",
        f"{one.qat_share:.0%}" if one.qat_share else "",
        scaled(one.tokens),
        f"{one.train_flops:.3g}",
        f"{one.lifetime_flops:.3g}",
        data_size(one.stored_bytes),
        f"{one.loss:.4f}{interval(one.loss_interval)}",
        score,
        "" if one.hours is None else scaled(one.hours),
        "" if one.money is None else f"{one.money:,.0f}",
        "yes" if one.fits else "no",
        one.why,
    ]


HEADS = (
    "alternative", "params", "bits", "QAT", "tokens", "training FLOPs", "lifetime FLOPs", "stored", "loss", "score",
    "hours", "money", "fits", "remark",
)  # fmt: skip


def text(plan: TrainingPlan) -> str:
    """The plan as lines."""
    return "\n".join(_lines(plan))


def _lines(plan: TrainingPlan) -> Iterator[str]:
    one = plan.chosen
    yield f"Budget: {plan.budget['compute']}"
    yield f"Plan: {one.name}: {plan.reason} (law: {plan.law})"
    yield (
        f"  {scaled(one.params)} parameters, {scaled(one.tokens)} tokens, {one.bits:g} bits"
        + (f", {one.qat_share:.0%} of the tokens quantization-aware" if one.qat_share else "")
        + (f", pruned to {one.sparsity:.0%} zeros between 25 and 75 % of training" if one.sparsity else "")
    )
    yield f"  expected loss {one.loss:.4f}{interval(one.loss_interval)} nats a token"
    if one.score is None:
        yield "  downstream score: no score curve was given (score=)"
    else:
        yield f"  expected score {one.score:.3f}{interval(one.score_interval, 3)}"
    shape = plan.shape
    yield (
        f"  shape: width {shape.d_model}, {shape.layers} layers, {shape.heads} heads, feed-forward {shape.d_ff}: "
        f"{shape.nonvocab_params:,} parameters without vocabulary"
    )
    yield "  vocabulary: " + ", ".join(f"{size:,} ({method})" for method, size in plan.vocabulary.items())
    yield "  batch, tokens: " + ", ".join(f"{scaled(size)} ({law})" for law, size in plan.batches.items())
    yield "  peak rate: " + ", ".join(f"{rate:.3g} ({law})" for law, rate in plan.rates.items())
    yield f"  schedule: {plan.steps:,} steps; {plan.schedule}"
    yield ""
    yield "What each law says of this compute:"
    rows = [
        (
            answer.law,
            scaled(answer.N) + _scaled_interval(answer.intervals.get("N")),
            scaled(answer.D) + _scaled_interval(answer.intervals.get("D")),
            f"{answer.ratio:.3g}",
            "" if answer.loss is None else f"{answer.loss:.4f}{interval(answer.intervals.get('loss'))}",
        )
        for answer in plan.answers
    ]
    yield from _table(("law", "params", "tokens", "tokens/param", "loss, its own"), rows)
    low, high = plan.spread["N"]
    yield f"spread of size: {scaled(low)} to {scaled(high)}, a factor of {high / low:.2f}"
    yield ""
    yield "Alternatives:"
    cells = [costs(alternative) for alternative in plan.alternatives]
    used = [at for at, _ in enumerate(HEADS) if any(row[at] for row in cells)]
    yield from _table([HEADS[at] for at in used], [[row[at] for at in used] for row in cells])
    for warning in plan.warnings:
        yield f"note: {warning}"


def _scaled_interval(found: Range | None) -> str:
    return f" [{scaled(found.low)}, {scaled(found.high)}]" if found is not None else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
    for row in [heads, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
