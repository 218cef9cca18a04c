"""Row 15, essential sparsity: the smallest weights go at little cost up to a knee, random ones far less far."""

from __future__ import annotations

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.essential import Curve, essential
from pennyweight.job import Settings

_TEXT = Settings(length=40, heldout=12)
_MARGIN = 0.1  # of sparsity, between the intervals


def _worse(one: Curve, other: Curve) -> bool:
    """``one`` does worse at every sparsity of 0.2 and more, short of the end, where both have collapsed."""
    pairs = zip(one.points, other.points, strict=True)
    return all(a.effect < b.effect for a, b in pairs if 0.2 <= a.sparsity < 0.85)


@claim(
    row=15,
    pace="quick",
    headline="a sharp dropping point exists, for N:M as well (abstract; no figure there)",
)
def the_smallest_weights_are_free_up_to_a_knee(assets: Assets) -> Outcome:
    """MiniLM, the cosine of its embeddings to the dense model's, no training after pruning."""
    model = assets.minilm().model
    smallest = essential(model, criteria=("magnitude",), scopes=("global", "layer"), groups=(8,), settings=_TEXT)
    random = essential(model, criteria=("random",), settings=_TEXT)
    whole, even, pattern = smallest.curves
    (drawn,) = random.curves
    starts = all(curve.points[0].effect > 1 - 1e-6 for curve in (*smallest.curves, drawn))
    apart = whole.knee.low > drawn.knee.high + _MARGIN and pattern.knee.at > drawn.knee.high
    sharp = whole.knee.turns and whole.knee.after > 3 * max(whole.knee.before, 0.0)
    points = ", ".join(f"{point.sparsity:.0%} {point.effect:.3f}" for point in whole.points)
    return Outcome(
        method=whole.knee.at,
        baseline=drawn.knee.at,
        unit="share of zeros at the knee",
        lower_is_better=False,
        holds=starts and apart and sharp and _worse(drawn, whole),
        control=("the same share in every layer", even.knee.at),
        interval=(whole.knee.low, whole.knee.high),
        notes=f"random {drawn.knee.words}, N:8 {pattern.knee.words}; cosine over zeros: {points}; the slope grows "
        f"from {whole.knee.before:.2f} to {whole.knee.after:.2f}",
    )
