"""Row 90, loss trajectory: constants of two small sizes predict the whole loss curve of a third at every batch."""

from __future__ import annotations

import numpy as np

from pennyweight import laws
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.laws import bench, trajectory

_WIDTHS, _BATCHES, _WARMUP = (16, 32, 56), (4, 16, 64), 100


@claim(row=90, pace="slow", headline="attributes of models up to 33B from ones of 1M to 60M (abstract)")
def small_runs_predict_a_whole_curve(assets: Assets) -> Outcome:
    """Byte GPTs at a constant rate; the largest is held out and its curves are compared point by point."""
    runs = [
        bench.Run(width=width, batch=batch, steps=600, schedule="constant", lr=3e-3, warmup=30,
                  evaluations=12, held_out=192)
        for width in _WIDTHS for batch in _BATCHES
    ]  # fmt: skip
    records = bench.sweep(runs, workers=1)
    largest = max(record.run.params for record in records)
    small = [record for record in records if record.run.params < largest]
    columns = bench.points(small, curve=True)
    law = trajectory.fit({name: columns[name] for name in ("N", "steps", "B", "loss")}, warmup_steps=_WARMUP)
    # the rival: each small size's last loss, a power law in N at every batch, and no curve
    mine, rival, steady = [], [], []
    for record in records:
        if record.run.params < largest:
            continue
        each = record.run.batch * record.run.length
        same = [one for one in small if one.run.batch == record.run.batch]
        line = laws.fit([(one.run.params, one.loss) for one in same] * 2, "power", holdout=False)
        for step, loss in record.curve:
            if step < _WARMUP:
                continue
            mine.append(abs(law.loss(record.run.params, step, each) / loss - 1))
            rival.append(abs(float(line(record.run.params)) / loss - 1))
            # the curve of the next smaller size, as it is
            near = max(same, key=lambda one: one.run.params)
            steady.append(abs(dict(near.curve)[step] / loss - 1))
    fitted = np.abs(law.loss(columns["N"], columns["steps"], columns["B"]) / np.array(columns["loss"]) - 1)
    late = np.array(columns["steps"]) >= _WARMUP
    return Outcome(
        method=float(np.mean(mine)),
        baseline=float(np.mean(rival)),
        unit="relative error along the held-out curves, mean",
        holds=bool(float(np.mean(mine)) < 0.8 * min(float(np.mean(rival)), float(np.mean(steady)))),
        control=("the curve of the next smaller size, unchanged", float(np.mean(steady))),
        notes=(
            f"sizes {', '.join(str(n) for n in sorted({r.run.params for r in records}))}; batches {_BATCHES}; error on "
            f"the fitted curves {float(fitted[late].mean()):.2%}, worst held-out point {max(mine):.2%}"
            "; the 2 % hoped for is not reached"
        ),
    )
