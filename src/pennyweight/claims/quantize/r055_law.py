"""Row 55, the law of quantization-aware training: fitted to runs made here, it predicts cells it has not seen."""

from __future__ import annotations

from functools import cache

import numpy as np

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.quantize.r055_qat import SHARES, STEPS, TOKENS, table, trained

_HEADLINE = "one law of size, tokens, share and bits over 757 runs (abstract; its coefficients are not published)"
#: (width, bits, steps, shares) of the runs beside `table`, which are of width 32 at 2 bits.
_FITTED = (
    (32, 3, 200, (0.1, 0.3, 0.7)), (32, 3, 600, (0.1, 0.7)), (32, 4, 200, (0.1, 0.3, 0.7)), (32, 4, 600, (0.1, 0.3)),
    (16, 2, 200, (0.1, 0.3, 0.7)), (16, 2, 600, (0.1, 0.7)), (16, 3, 200, (0.3,)), (16, 4, 200, (0.1, 0.7)),
    (16, 4, 600, (0.1, 0.7)),
)  # fmt: skip
#: Cells no fit sees.
_HELD_OUT = (
    (32, 3, 600, (0.3,)), (32, 4, 600, (0.7,)), (32, 4, 1000, (0.3,)), (16, 2, 600, (0.3,)), (16, 3, 600, (0.1,)),
    (16, 4, 600, (0.3,)),
)  # fmt: skip


def _row(params: int, steps: int, share: float, bits: int, loss: float) -> dict[str, float]:
    late = max(1, round(share * steps))
    return {"N": params, "D_fp": (steps - late) * TOKENS, "D_qat": late * TOKENS, "bits": bits, "loss": loss}


def _rows(cells: tuple[tuple[int, int, int, tuple[float, ...]], ...]) -> list[dict[str, float]]:
    found = []
    for width, bits, steps, shares in cells:
        for share in shares:
            loss, params = trained(steps, share, width=width, bits=bits)
            found.append(_row(params, steps, share, bits, loss))
    return found


@cache
def _errors() -> tuple[dict[str, list[float]], int]:
    """Relative errors on the held-out cells of the law, of it without the coupling, and of size and tokens alone."""
    losses, params = table()
    rows = [
        _row(params, steps, share, 2, loss)
        for steps in STEPS
        for share, loss in zip(SHARES, losses[steps], strict=True)
    ] + _rows(_FITTED)
    unseen = _rows(_HELD_OUT)
    law = laws.fit_qat(rows, holdout=False)
    plain = {
        "N": [r["N"] for r in rows],
        "D": [r["D_fp"] + r["D_qat"] for r in rows],
        "loss": [r["loss"] for r in rows],
    }
    blind = laws.fit(plain, "chinchilla", holdout=False)
    found: dict[str, list[float]] = {"law": [], "uncoupled": [], "size and tokens": []}
    for r in unseen:
        size, stored, tokens = r["N"], r["N"] * r["bits"] / 8, r["D_fp"] + r["D_qat"]
        guesses = {
            "law": law.loss(size, r["D_fp"], r["D_qat"], r["bits"]),
            "uncoupled": law.plain(N=size, D=tokens, S_qat=r["D_qat"] / stored, bits=r["bits"]),
            "size and tokens": blind(N=size, D=tokens),
        }
        for name, guess in guesses.items():
            found[name].append(abs(float(guess) / r["loss"] - 1))
    return found, len(rows)


def _said(errors: dict[str, list[float]], runs: int) -> str:
    cells = [f"width {w}, {b} bits, {s} steps, {share:.0%}" for w, b, s, shares in _HELD_OUT for share in shares]
    each = "; ".join(
        f"{cell}: " + ", ".join(f"{errors[name][at]:.2%}" for name in errors) for at, cell in enumerate(cells)
    )
    return f"fitted to {runs} runs of one seed; errors of the law, of it uncoupled, of size and tokens: {each}"


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def bits_and_share_are_predicted(assets: Assets) -> Outcome:
    """The fitted law beside Chinchilla's of the same runs, which sees neither bits nor tokens a parameter byte."""
    errors, runs = _errors()
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return Outcome(
        method=means["law"],
        baseline=means["size and tokens"],
        unit="relative error of the loss, mean of six held-out cells",
        holds=means["law"] < 0.7 * means["size and tokens"],
        control=("the same law without the term that couples the phases", means["uncoupled"]),
        notes=_said(errors, runs),
    )


@claim(row=55, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def coupling_of_the_phases_predicts_better(assets: Assets) -> Outcome:
    """The law beside itself without the term in which tokens of both phases meet."""
    errors, runs = _errors()
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return Outcome(
        method=means["law"],
        baseline=means["uncoupled"],
        unit="relative error of the loss, mean of six held-out cells",
        holds=means["law"] < means["uncoupled"],
        control=("size and tokens alone", means["size and tokens"]),
        notes=f"worst cell {max(errors['law']):.2%} against {max(errors['uncoupled']):.2%}; {runs} runs of one seed",
    )
