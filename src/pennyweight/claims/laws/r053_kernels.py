"""Row 53, more is better: eigenvalues alone predict the error of random-feature regression, and width is free."""

from __future__ import annotations

import math

import numpy as np

from pennyweight import data, laws
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure import kernel_theory

_POINTS, _MODES, _TRIALS, _TEST, _NOISE = 128, 1200, 20, 400, 0.09
_WITHIN = 0.05


def _simulated(features: int, ridge: float, spectrum: np.ndarray, g: np.random.Generator) -> tuple[float, float]:
    """Test error, and what generalized cross-validation says of it from the training points of each trial."""
    found, said = [], []
    for _ in range(_TRIALS):
        modes = g.standard_normal((_POINTS + _TEST, _MODES))
        target = modes @ np.sqrt(spectrum) + math.sqrt(_NOISE) * g.standard_normal(len(modes))
        inner = (modes * np.sqrt(spectrum)) @ g.standard_normal((_MODES, features)) / math.sqrt(features)
        kernel = inner @ inner[:_POINTS].T
        inverse = np.linalg.inv(kernel[:_POINTS] + ridge * np.eye(_POINTS))
        weights = inverse @ target[:_POINTS]
        found.append(float(((kernel[_POINTS:] @ weights - target[_POINTS:]) ** 2).mean()))
        said.append(float((weights**2).mean() / (np.trace(inverse) / _POINTS) ** 2))
    return float(np.mean(found)), float(np.mean(said))


@claim(row=53, pace="quick", headline="theory matches experiment; more width never hurts at the best ridge (abstract)")
def eigenvalues_predict_random_features(assets: Assets) -> Outcome:
    """Simulated regression on power-law modes, and ReLU features of digits at tuned ridges."""
    g = np.random.default_rng(0)
    spectrum = np.arange(1, _MODES + 1) ** -1.5
    misses, infinite, validated = [], [], []
    for width in (64, 128, 512):
        for ridge in (0.2, 1.0):
            real, said = _simulated(width, ridge, spectrum, g)
            theory = kernel_theory.rf(_POINTS, width, spectrum, spectrum, ridge, _NOISE).test
            wide = kernel_theory.krr(_POINTS, spectrum, spectrum, ridge, _NOISE).test
            misses.append(abs(theory / real - 1))
            infinite.append(abs(wide / real - 1))
            validated.append(abs(said / real - 1))
    tuned = [kernel_theory.optimal_ridge(_POINTS, spectrum, spectrum, _NOISE, k).test for k in (64, 128, 256, 1024)]
    digits = data.digits()
    pixels = digits.images.flatten(1).double().numpy()
    project = g.standard_normal((65, 1024))
    features = np.maximum(np.hstack([pixels - 0.3, np.ones((len(pixels), 1))]) @ project, 0)
    wanted = (digits.labels.numpy()[:, None] == np.arange(10)) - 0.1
    report = laws.width_is_free(features[:800], wanted[:800], widths=(16, 64, 256, 1024))
    return Outcome(
        method=float(np.mean(misses)),
        baseline=float(np.mean(infinite)),
        unit="relative error of the predicted test error, mean of six settings",
        holds=bool(max(misses) < _WITHIN and np.mean(misses) < 0.3 * np.mean(infinite)) and report.free
        and sorted(tuned, reverse=True) == tuned,
        control=("cross-validation on the training points, which takes the regressions themselves",
                 float(np.mean(validated))),
        notes=f"worst of six {max(misses):.1%}; {_TRIALS} trials each; the baseline is the theory of infinite width; "
        "test error of tuned ridges on ReLU features of digits by width: "
        + ", ".join(f"{k} {e:.3f}" for k, e in zip(report.widths, report.test, strict=True)),
    )  # fmt: skip
