"""Laws of generative modeling in several domains, and the reading of their constant as entropy.

Row 50. Source: T. Henighan et al., "Scaling Laws for Autoregressive Generative Modeling", arXiv:2010.14701, Table 1:
L = L_inf + (x0/x)^alpha with L_inf near the entropy of the data and the rest near the divergence of the model from it;
N_opt = (C/C0)^e. N without embeddings, C in PF-days, loss in nats a token.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple

from pennyweight.elementwise import elementwise
from pennyweight.errors import OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.law import Law, Range, law


class Domain(NamedTuple):
    """One row of Table 1; None where the paper prints nothing."""

    n_floor: float
    n_scale: float
    n_alpha: float
    c_floor: float | None
    c_scale: float | None
    c_alpha: float | None
    optimal_scale: float | None
    optimal_exponent: float | None


DOMAINS = {
    "language": Domain(0.0, 1.47e14, 0.07, 0.0, 3.47e8, 0.048, 3.3e-13, 0.73),
    "image_8x8": Domain(3.12, 8.0e1, 0.24, 3.13, 1.8e-8, 0.19, 5.3e-14, 0.64),
    "image_16x16": Domain(2.64, 2.8e2, 0.22, 2.64, 1.6e-8, 0.16, 4.8e-12, 0.75),
    "image_32x32": Domain(2.20, 6.3e1, 0.13, 2.21, 3.6e-9, 0.1, 1.6e-13, 0.65),
    "image_vq_16x16": Domain(3.99, 2.7e4, 0.13, 4.09, 6.1e-7, 0.11, 6.2e-14, 0.64),
    "image_vq_32x32": Domain(3.07, 1.9e4, 0.14, 3.17, 2.6e-6, 0.12, 9.4e-13, 0.7),
    "text_to_im_text": Domain(0.0, 5.6e8, 0.037, None, None, None, None, None),
    "text_to_im_image": Domain(2.0, 5.1e3, 0.16, 1.93, 1.5e-6, 0.15, 9.4e-13, 0.7),
    "im_to_text_text": Domain(0.0, 7.0e8, 0.039, None, None, None, None, None),
    "im_to_text_image": Domain(2.0, 5.5e3, 0.15, 1.97, 1.5e-6, 0.16, 3.3e-12, 0.72),
    "video_vq_16x16x16": Domain(1.01, 3.7e4, 0.24, 0.95, 2.2e-5, 0.14, 1.13e-12, 0.71),
    "math_extrapolate": Domain(0.28, 1.1e4, 0.16, 0.14, 1.4e-5, 0.17, 2.3e-12, 0.69),
}


def _domain(name: str) -> Domain:
    written = re.sub(r"[\s-]+", "_", name.strip().lower().replace("\u00d7", "x"))  # "Image 32x32" as the paper has it
    if written not in DOMAINS:
        raise OptionError(f"no domain is called {name!r}; there are {', '.join(DOMAINS)}")
    return DOMAINS[written]


def curve(domain: str, axis: Literal["N", "C"] = "N") -> Law:
    """The published law of a domain in size (parameters) or compute (PF-days)."""
    row = _domain(domain)
    floor, scale, alpha = (
        (row.n_floor, row.n_scale, row.n_alpha) if axis == "N" else (row.c_floor, row.c_scale, row.c_alpha)
    )
    if floor is None or scale is None or alpha is None:
        raise OptionError(f"the paper prints no law of {axis} for {domain}")
    return law("power_const", source="arXiv:2010.14701 Table 1", axis=axis, L_inf=floor, x0=scale, alpha=alpha)


@elementwise
def nopt(domain: str, C: float) -> float:
    """Compute-optimal size for ``C`` **PF-days** (1 PF-day = 8.64e19 FLOPs; arrays, too): (C/C0)^e."""
    row = _domain(domain)
    if row.optimal_scale is None or row.optimal_exponent is None:
        raise OptionError(f"the paper prints no optimal size for {domain}")
    if not 0 < C < math.inf:
        raise OptionError(f"nopt: C = {C!r}; give PF-days above 0")
    return float((C / row.optimal_scale) ** row.optimal_exponent)


class Entropy(NamedTuple):
    """The floor of a fitted law, in the unit of the loss.

    Attributes:
        value: L_inf.
        interval: 95 % bootstrap interval.
        law: the fit with the floor.
        without: the fit without one; compare their held-out errors in ``report``.
    """

    value: float
    interval: Range | None
    law: Law
    without: Law

    def __float__(self) -> float:
        return self.value


def entropy_estimate(
    points: Any, *, axis: str | None = None, bootstrap: int = 1000, seed: int = 0, **options: Any
) -> Entropy:
    """The entropy of the data, estimated as the floor of loss against size, data or compute.

    Args:
        points: as `pennyweight.laws.fit` takes them.
        axis: the column of the variable.
        bootstrap: resamples for the interval.
        seed: of the bootstrap.
        options: passed to `pennyweight.laws.fit`.
    """
    found = fit(points, "power_const", axis=axis, bootstrap=bootstrap, seed=seed, **options)
    without = fit(points, "power", axis=axis, **options)
    interval = found.report.intervals.get("L_inf") if found.report else None
    return Entropy(float(found.L_inf), interval, found, without)


@elementwise
def size_for_kl(law: Law, nats_per_item: float, tokens_per_item: float) -> float:
    """The size (or compute) at which the reducible loss is ``nats_per_item`` for items of ``tokens_per_item`` tokens.

    The reducible part (x0/x)^alpha is the divergence a token: x = x0 (nats / tokens)^(-1/alpha).
    """
    if law.form.name not in ("power_const", "power"):
        raise OptionError(f"size_for_kl: {law.form.name}; give a power_const or power law")
    if not (0 < nats_per_item < math.inf and 0 < tokens_per_item < math.inf):
        raise OptionError(f"size_for_kl: nats {nats_per_item!r} and tokens {tokens_per_item!r} must be positive")
    return float(law.x0 * (nats_per_item / tokens_per_item) ** (-1 / law.alpha))
