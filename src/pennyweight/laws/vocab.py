"""Compute-optimal vocabulary size.

Row 74. Source: C. Tao et al., "Scaling Laws with Vocabulary: Larger Models Deserve Larger Vocabularies",
arXiv:2407.13623, constants of the authors' code (sail-sg/scaling-with-vocab). Three methods: IsoFLOPs envelope, the
derivative of FLOPs at fixed characters, a parametric loss.

Trap kept as published: the parametric constants were fitted with the tokens-per-character curve evaluated at V / 1000.
They predict well only through that reading (`published_loss`); `fit_loss` refits in true units.

Letters: V vocabulary, d width, H training characters, F FLOPs; N_v = V d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from pennyweight.elementwise import elementwise, numbers
from pennyweight.errors import DataError, OptionError
from pennyweight.laws.fitter import fit
from pennyweight.laws.forms import Array
from pennyweight.laws.law import Law

#: tokens a character = a ln^2 V + b ln V + c, V no larger than 200,000
COMPRESSION = (0.00639222, -0.15811069, 1.20470122)
LARGEST = 200_000.0
_ISO_SIZE = -2.4846510161625193  # N_nv = e^this * F^0.5
_ISO_VOCABULARY = (-1.589031299255507, 0.4163622634135234)  # N_v = e^first * F^second
_ANCHOR_SIZE, _ANCHOR_VOCABULARY, _GAMMA = 33e6, 3_145_728.0, 0.8353974035228025
_A1, _A2, _B, _E = 1.8313851559554126, 0.19584238398665638, 2.1241123120064955, 5.5327846803337435
_ALPHA1, _ALPHA2, _BETA = 0.44660634152009615, 0.6707374679896795, 0.44660634152009615
_WIDTHS = (
    (50e6, 512), (200e6, 768), (500e6, 1024), (1e9, 1536), (2e9, 2048), (5e9, 3200), (10e9, 4096), (20e9, 5120),
    (50e9, 6048), (100e9, 8192), (200e9, 12288), (500e9, 16384), (1000e9, 20480),
)  # fmt: skip


def default_width(nonvocab_params: float) -> int:
    """The embedding width that the authors give a model of that many non-vocabulary parameters."""
    return next((d for limit, d in _WIDTHS if nonvocab_params <= limit), 24576)


def tokens_per_character(vocab_size: Any) -> Any:
    """f(V): tokens that a byte-pair tokenizer of ``vocab_size`` makes of one character."""
    log_v = np.log(np.minimum(vocab_size, LARGEST))
    a, b, c = COMPRESSION
    return a * log_v**2 + b * log_v + c


def flops(nonvocab_params: Any, vocab_size: Any, characters: Any, *, embed_dim: Any) -> Any:
    """6 (N_nv + V d) H f(V)."""
    return 6 * (nonvocab_params + vocab_size * embed_dim) * characters * tokens_per_character(vocab_size)


def optimal_flops(nonvocab_params: float) -> float:
    """Training FLOPs at which a model of that size is compute-optimal, after the IsoFLOPs fit."""
    return float((nonvocab_params / math.exp(_ISO_SIZE)) ** 2)


@elementwise
def optimal(
    nonvocab_params: float,
    flops: float | None = None,
    method: Literal["isoflops", "derivative", "parametric"] = "isoflops",
    width: int | None = None,
) -> int:
    """The compute-optimal vocabulary size.

    Args:
        nonvocab_params: parameters outside embedding and head; arrays, too.
        flops: training FLOPs; only ``parametric`` can use others than the compute-optimal ones.
        method: "isoflops", "derivative" (the fitted slope, anchored at 33M) or "parametric".
        width: embedding width; the authors' table when None.

    Raises:
        OptionError: a method that is unknown, or ``flops`` where it has no effect.
    """
    if not (nonvocab_params > 0 and math.isfinite(nonvocab_params)):
        raise OptionError(f"vocab.optimal: nonvocab_params = {nonvocab_params!r}; give a positive number")
    given = {name: value for name, value in (("flops", flops), ("width", width)) if value is not None}
    numbers("vocab.optimal", **given)
    d = default_width(nonvocab_params) if width is None else width
    if not 0 < d < math.inf:
        raise OptionError(f"vocab.optimal: width = {width!r}; give a positive number")
    if flops is not None and not 0 < flops < math.inf:
        raise OptionError(f"vocab.optimal: flops = {flops!r}; give a positive number")
    if method == "isoflops":
        first, second = _ISO_VOCABULARY
        return int(math.exp(first) * (optimal_flops(nonvocab_params) if flops is None else flops) ** second / d)
    if method == "derivative":
        if flops is not None:
            raise OptionError("vocab.optimal: flops has no effect on the derivative method; leave it out")
        return int(_ANCHOR_VOCABULARY * (nonvocab_params / _ANCHOR_SIZE) ** _GAMMA / d)
    if method == "parametric":
        return int(_parametric(nonvocab_params, optimal_flops(nonvocab_params) if flops is None else flops, d))
    raise OptionError(f"vocab.optimal: method = {method!r}; give isoflops, derivative or parametric")


def _parametric(nonvocab_params: float, train_flops: float, d: float) -> float:
    size, wide, budget = nonvocab_params / 1e6, d / 1e3, train_flops / 1e15

    def slope(log_v: float) -> float:
        vocabulary = math.exp(log_v)
        tokens = budget / (6 * (size + vocabulary * wide))
        gain = -_ALPHA2 * _A2 * wide / (vocabulary * wide) ** (_ALPHA2 + 1)
        cost = _BETA * _B * budget * wide / (6 * (size + vocabulary * wide) ** 2) / tokens ** (_BETA + 1)
        return float(gain + cost)

    low, high = math.log(1e-3), math.log(1e6)  # one token to a billion
    if slope(low) > 0 or slope(high) < 0:
        raise DataError(f"vocab.optimal: no optimum between 1 and 1e9 for {nonvocab_params:g} parameters")
    return float(math.exp(brentq(slope, low, high, xtol=1e-12)) * 1e3)


def derivative_root(nonvocab_params: float, width: int) -> float:
    """The V at which FLOPs at fixed characters are least: d f(V) + (N_nv + d V)/V (2 a ln V + b) = 0."""
    a, b, _ = COMPRESSION

    def slope(log_v: float) -> float:
        vocabulary = math.exp(log_v)
        shrink = (2 * a * log_v + b) / vocabulary if vocabulary < LARGEST else 0.0
        return float(width * tokens_per_character(vocabulary) + (nonvocab_params + width * vocabulary) * shrink)

    low, high = math.log(2.0), math.log(LARGEST)
    if slope(low) > 0:
        raise DataError(
            f"vocab.derivative_root: FLOPs only rise with V for {nonvocab_params:g} parameters of width {width}"
        )
    if slope(high - 1e-12) < 0:
        return LARGEST  # the curve is not known beyond: FLOPs rise from there by its clip
    return float(math.exp(brentq(slope, low, high, xtol=1e-13)))


def published_tokens_per_character(vocab_size: Any) -> Any:
    """f(V / 1000): the reading of the curve under which the published constants were fitted."""
    return tokens_per_character(np.asarray(vocab_size, float) / 1e3)


def published_loss(nonvocab_params: Any, vocab_size: Any, characters: Any, *, embed_dim: Any) -> Array:
    """The published parametric loss, in its units (1e6 parameters, 1e3 tokens, 1e9 characters) and its reading of f."""
    vocabulary, wide = np.asarray(vocab_size, float) / 1e3, np.asarray(embed_dim, float) / 1e3
    tokens = np.asarray(characters, float) / 1e9 * published_tokens_per_character(vocab_size)
    return np.asarray(
        -_E
        + _A1 / (np.asarray(nonvocab_params, float) / 1e6) ** _ALPHA1
        + _A2 / (vocabulary * wide) ** _ALPHA2
        + _B / tokens**_BETA
    )


def fit_loss(
    rows: Mapping[str, Any],
    *,
    tied: bool = True,
    per_character: Callable[[Any], Any] = tokens_per_character,
    **options: Any,
) -> Law:
    """Refit the parametric loss: N_nv and N_v = V d in parameters, D = H * per_character(V) in tokens.

    On the authors' own table the vocabulary term keeps its sign only under `published_tokens_per_character`; in true
    units its exponent comes out negative, and the report says so.

    Args:
        rows: columns vocab_size, embed_dim, nonvocab_params, num_characters, loss_unigram_normalised.
        tied: one exponent for size and tokens, as the authors do.
        per_character: tokens a character, as a function of V.
        options: passed to `pennyweight.laws.fit`.
    """
    wanted = ("vocab_size", "embed_dim", "nonvocab_params", "num_characters", "loss_unigram_normalised")
    if missing := [name for name in wanted if name not in rows]:
        raise DataError(f"vocab.fit_loss: no column {', '.join(missing)}")
    v, d, size, characters, loss = (np.array([float(x) for x in rows[name]]) for name in wanted)
    table = {"N_nv": size, "N_v": v * d, "D": characters * per_character(v), "loss_unigram_normalised": loss}
    law = fit(table, "vocab_tied" if tied else "vocab", **options)
    if law.alpha2 > 0 or law.report is None:
        return law
    note = "alpha2 is negative: under this reading of tokens a larger vocabulary only hurts; no optimum follows from it"
    return replace(law, report=replace(law.report, notes=(*law.report.notes, note)))


def optimal_under(law: Law, nonvocab_params: float, train_flops: float, *, embed_dim: float) -> float:
    """The V of least predicted loss for a size and compute, under a law of `fit_loss`.

    Raises:
        DataError: the law has no optimum between 64 and 1e8.
    """

    def loss(log_v: float) -> float:
        vocabulary = math.exp(log_v)
        tokens = train_flops / (6 * (nonvocab_params + vocabulary * embed_dim))
        return float(law(N_nv=nonvocab_params, N_v=vocabulary * embed_dim, D=tokens))

    grid = np.linspace(math.log(64.0), math.log(1e8), 400)
    at = int(np.argmin([loss(value) for value in grid]))
    if at in (0, grid.size - 1):
        raise DataError(f"vocab.optimal_under: the loss only {'rises' if at == 0 else 'falls'} with V from 64 to 1e8")
    bounds = (grid[at - 1], grid[at + 1])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x))


def unigram_normalized(log_probs: Any, unigram_log_probs: Any) -> float:
    """L_u = -mean(log p(w | context) - log p(w)): comparable across vocabularies, usually negative.

    Args:
        log_probs: log probability the model gave each token.
        unigram_log_probs: log frequency of each of those tokens.
    """
    model, unigram = np.asarray(log_probs, float), np.asarray(unigram_log_probs, float)
    if model.shape != unigram.shape or not model.size:
        raise DataError(
            f"unigram_normalized: {model.shape} log probabilities and {unigram.shape} unigram ones; give one each"
        )
    return float((unigram - model).mean())
