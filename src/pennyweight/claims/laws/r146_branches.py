"""Row 146, MiniCPM: a law fitted to decayed branches of small stable runs predicts a larger model at every length."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.train.schedules import constant

_WIDTHS, _LARGEST, _LENGTHS, _BATCH = (12, 16, 24, 32), 56, (200, 400, 800, 1600), 16


def _size(width: int) -> int:
    return sum(p.numel() for n, p in tiny.gpt(width=width).named_parameters() if not n.startswith(("embed", "lm_head")))


def _branches(width: int) -> list[dict[str, float]]:
    """The held-out loss at each length, decayed from the checkpoints of one stable run."""
    schedule = constant(40, peak=4e-3)
    run, rows = tiny.trainer(tiny.gpt(width=width), schedule, batch=_BATCH), []
    each = _BATCH * (tiny.LENGTH - 1.0)
    with tempfile.TemporaryDirectory() as folder:
        for length in _LENGTHS:
            over = length // 10
            run.run(length - over)
            run.save(Path(folder) / str(length))
            tail = schedule.decayed(length - over, over, "linear")
            branch = tiny.trainer(tiny.gpt(width=width), tail, batch=_BATCH)
            branch.resume(Path(folder) / str(length))
            branch.run(length)
            loss = float(tiny.held_out_losses(branch.module).mean())
            rows.append({"N": _size(width), "D": length * each, "decay_tokens": over * each, "loss": loss})
    return rows


@claim(row=146, pace="slow", headline="one run a size gives the law of size and data at linear cost (section 4.5)")
@tiny.one_thread()
def branches_of_small_runs_predict_a_larger_model(assets: Assets) -> Outcome:
    """Byte GPTs of four sizes, four lengths each from one stable run; a fifth size is predicted at every length."""
    rows = [row for width in _WIDTHS for row in _branches(width)]
    truth = _branches(_LARGEST)
    each = _BATCH * (tiny.LENGTH - 1.0)
    runs = [{"N": _size(width), "tokens": _LENGTHS[-1] * each} for width in _WIDTHS]
    fitted = laws.fit_from_wsd(runs, rows, bootstrap=200, holdout=False)
    compute = laws.fit(
        {"C": [6 * r["N"] * r["D"] for r in rows], "loss": [r["loss"] for r in rows]}, "power_const", axis="C",
        holdout=False,
    )  # fmt: skip
    near = {row["D"]: row["loss"] for row in rows if row["N"] == runs[-1]["N"]}
    guesses = {
        "law": [fitted.law(N=row["N"], D=row["D"]) for row in truth],
        "compute": [compute(C=6 * row["N"] * row["D"]) for row in truth],
        "next": [near[row["D"]] for row in truth],
    }
    losses = np.array([row["loss"] for row in truth])
    errors = {name: np.abs(np.array(guess) / losses - 1) for name, guess in guesses.items()}
    mean = {name: float(found.mean()) for name, found in errors.items()}

    def shown(found: np.ndarray) -> str:
        return ", ".join(f"{one:.2%}" for one in found)

    return Outcome(
        method=mean["law"],
        baseline=mean["compute"],
        unit="relative error of the loss of a size three times the largest fitted, mean of four lengths",
        holds=mean["law"] < min(mean["compute"], mean["next"]),
        control=("the loss of the largest fitted size", mean["next"]),
        notes=(
            f"{fitted.law}; {fitted.saving:.2f} times cheaper than separate runs; baseline: a power law of compute "
            "with a floor, the same 16 points; " + ", ".join(f"{r['D']:.0f}: {r['loss']:.3f}" for r in truth)
            + f"; by length {shown(errors['law'])} against {shown(errors['compute'])}"
        ),
    )  # fmt: skip
