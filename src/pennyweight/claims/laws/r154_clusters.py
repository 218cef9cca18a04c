"""Row 154, COD: items clustered by difficulty extrapolate to a model ten times larger; their mean does not."""

from __future__ import annotations

import numpy as np

from pennyweight import laws
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets

_COMPUTE = np.geomspace(1.0, 100.0, 8)
_SAMPLES, _TARGET = 100, 1000.0
#: of items: (a, b, guess level). Each rises where another has settled, so that their mean has no simple shape; two more
#: families never rise, or only beyond every model fitted.
_FAMILIES = ((1.0, 0.8, 0.25), (4.0, 0.8, 0.25), (16.0, 0.8, 0.25), (48.0, 0.8, 0.25))


def _rates(compute: np.ndarray, g: np.random.Generator) -> np.ndarray:
    """(600, models) pass rates of 100 samples each."""
    rows = []
    for a, b, guess in _FAMILIES:
        spread = a * np.exp(0.08 * g.standard_normal((110, 1)))
        rows.append(guess + (1 - guess) * np.exp(-spread * compute**-b - 0.02))
    rows.append(np.full((80, compute.size), 0.25))  # flat: the key is wrong
    rows.append(0.25 + 0.75 / (1 + (3e4 / compute) ** 3) + np.zeros((80, 1)))  # emerges beyond everything
    return g.binomial(_SAMPLES, np.concatenate(rows)) / _SAMPLES


@claim(row=154, pace="quick", headline="1.36 % mean deviation on 8 benchmarks for a 70B model (abstract)")
def clusters_extrapolate_where_the_mean_does_not(assets: Assets) -> Outcome:
    """Twelve simulated benchmarks of 600 items and eight models; the target has ten times the largest budget."""
    errors: dict[str, list[float]] = {"clusters": [], "one curve": [], "through the loss": []}
    for seed in range(12):
        g = np.random.default_rng(seed)
        every = _rates(np.append(_COMPUTE, _TARGET), g)
        rates, truth = every[:, :-1], float(every[:, -1].mean())
        found = laws.cod.fit(rates, _COMPUTE)
        errors["clusters"].append(abs(found.predict(_TARGET) - truth))
        mean = rates.mean(0)
        whole = laws.fit({"C": _COMPUTE, "accuracy": mean}, "acc_exp", holdout=False)
        errors["one curve"].append(abs(float(whole(C=_TARGET)) - truth))
        loss = laws.fit((_COMPUTE, -np.log(mean)), "power_const", holdout=False)
        errors["through the loss"].append(abs(float(np.exp(-loss(_TARGET))) - truth))
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    spread = float(np.std(errors["clusters"], ddof=1) / len(errors["clusters"]) ** 0.5)
    return Outcome(
        method=means["clusters"],
        baseline=means["one curve"],
        unit="absolute error of predicted accuracy, mean of 12 benchmarks",
        holds=bool(means["clusters"] < 0.7 * min(means["one curve"], means["through the loss"])),
        control=("a power law of -log accuracy", means["through the loss"]),
        interval=(means["clusters"] - 1.96 * spread, means["clusters"] + 1.96 * spread),
        notes="items are simulated: four families of difficulty, one flat, one that emerges beyond every model",
    )
