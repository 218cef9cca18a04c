"""Row 65, projektor: pilots and optimal transport against a plane in the ratios, which predicts as well here."""

from __future__ import annotations

import numpy as np

from pennyweight import data
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.data.transport import centroid_accuracy, project

_PILOTS, _SIZE, _DRAWS = (100, 200), 400, 20
#: every mixture in steps of a quarter
_GRID = [(a / 4, b / 4, (4 - a - b) / 4) for a in range(5) for b in range(5 - a)]


def _sources() -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, np.ndarray]]:
    """Digits: clean ones, ones with 60 % of labels wrong, upside-down ones; and clean ones to judge by."""
    found = data.digits()
    g = np.random.default_rng(0)
    order = g.permutation(len(found.labels))
    x, y = found.images.double().numpy()[order], found.labels.numpy()[order]
    noisy = np.where(g.random(400) < 0.6, g.integers(0, 10, 400), y[400:800])
    parts = [(x[:400], y[:400]), (x[400:800], noisy), (x[800:1200, ::-1], y[800:1200])]
    return [(a.reshape(len(a), -1), b) for a, b in parts], (x[1200:].reshape(-1, 64), y[1200:])


def _true(sources: list[tuple[np.ndarray, np.ndarray]], valid: tuple[np.ndarray, np.ndarray], q: np.ndarray) -> float:
    g, found = np.random.default_rng(1), []
    for _ in range(_DRAWS):
        counts = np.floor(q * _SIZE).astype(int)
        counts[np.argmax(q)] += _SIZE - counts.sum()
        taken = [g.permutation(len(x))[:n] for (x, _), n in zip(sources, counts, strict=True)]
        x = np.concatenate([x[at] for (x, _), at in zip(sources, taken, strict=True)])
        y = np.concatenate([y[at] for (_, y), at in zip(sources, taken, strict=True)])
        found.append(centroid_accuracy(x, y, *valid))
    return float(np.mean(found))


@claim(row=65, pace="quick", headline="predicts at larger sizes and chooses better mixtures than its rivals (abstract)")
def pilots_predict_unseen_mixtures_better_than_a_plane(assets: Assets) -> Outcome:
    """Three sources of digits; a ridge classifier; 14 mixtures at twice the larger pilot."""
    sources, valid = _sources()
    model = data.projektor(sources, valid, pilot_sizes=_PILOTS, ratios=_GRID, draws=_DRAWS)
    g = np.random.default_rng(2)
    mixtures = [g.dirichlet(np.ones(3)) for _ in range(14)]
    truth = np.array([_true(sources, valid, q) for q in mixtures])
    mine = np.array([model(q, _SIZE) for q in mixtures])
    # the plain rival: accuracy linear in the ratios at each pilot size, the same line in log n
    grid = np.stack(model.pilots)
    rows = []
    for size in _PILOTS:
        values = np.array([np.mean([_pilot(sources, valid, q, size, s) for s in range(_DRAWS)]) for q in grid])
        rows.append((np.linalg.lstsq(grid, values, rcond=None)[0], values.mean()))
    linear = np.array([project(_SIZE, *_PILOTS, *(float(q @ w) for w, _ in rows)) for q in mixtures])
    constant = project(_SIZE, *_PILOTS, *(float(mean) for _, mean in rows))
    errors = [float(np.abs(guess - truth).mean()) for guess in (mine, linear, np.full(truth.size, constant))]
    best = model.best_q(_SIZE)
    chosen, uniform = (_true(sources, valid, q) for q in (best, np.full(3, 1 / 3)))
    return Outcome(
        method=errors[0],
        baseline=errors[1],
        unit="mean absolute error of predicted accuracy",
        holds=bool(errors[0] < min(errors[1:]) and chosen > uniform + 0.05),
        control=("one accuracy for all mixtures", errors[2]),
        notes=(
            f"chosen mixture {', '.join(f'{share:.2f}' for share in best)}: accuracy {chosen:.3f}, "
            f"uniform {uniform:.3f}; baseline: accuracy linear in the ratios, from the same pilots"
        ),
    )


def _pilot(
    sources: list[tuple[np.ndarray, np.ndarray]], valid: tuple[np.ndarray, np.ndarray], q: np.ndarray, n: int, seed: int
) -> float:
    g = np.random.default_rng(100 + seed)
    counts = np.floor(q * n).astype(int)
    counts[np.argmax(q)] += n - counts.sum()
    taken = [g.permutation(len(x))[:k] for (x, _), k in zip(sources, counts, strict=True)]
    x = np.concatenate([x[at] for (x, _), at in zip(sources, taken, strict=True)])
    y = np.concatenate([y[at] for (_, y), at in zip(sources, taken, strict=True)])
    return centroid_accuracy(x, y, *valid)
