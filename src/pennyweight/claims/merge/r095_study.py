"""Row 95, MergeAtScale: merged experts keep much of what each gained, and do better elsewhere than single experts.

Two of the paper's findings: merging generalizes, and more experts keep less of each (averaging byte-level experts does
not show that). That stronger bases and larger models merge better, and that methods then differ less, is not run here:
a weak base (bytes) and a strong one (MiniLM) have other tasks.
"""

from __future__ import annotations

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.encoders import studied
from pennyweight.claims.experts import experts, losses, parameters
from pennyweight.claims.tiny import one_thread
from pennyweight.merge.study import Study, study

_HEADLINE = "merging improves generalization; more experts cost held-in quality (abstract)"


def _fewer(found: Study) -> tuple[int, int]:
    """Of how many methods four experts keep less of their gains than two, and how many there are."""
    methods = {one.method for one in found.merges}
    return sum(found.of(name, 4).held_in < found.of(name, 2).held_in for name in methods), len(methods)


#: What an average of four keeps of each one's gain where they do not help one another.
_ALONE = 1 / 4


def _generalizes(found: Study, margin: float) -> bool:
    """The average of four is ahead of single experts and of the base elsewhere, and keeps more than its part of gains.

    So a merge next to the base, which loses nothing elsewhere and keeps nothing, would not do.
    """
    average = found.of("average", 4)
    return average.held_out < min(found.experts, found.base) - margin and average.held_in > _ALONE


def _notes(found: Study) -> str:
    fewer, methods = _fewer(found)
    lines = found.table().replace("\n", "; ").replace("\t", ", ")
    return f"four experts keep less than two in {fewer} of {methods} methods; {lines}"


@claim(row=95, pace="slow", headline=_HEADLINE)
def merged_experts_generalize_better_than_single_ones(assets: Assets) -> Outcome:
    """Two and four of four byte-level experts, four methods, six tasks; the figure is that of averaging all four."""
    with one_thread():
        known = experts()
        found = study(parameters(known.base), [parameters(one) for one in known.models], losses)
    average = found.of("average", 4)
    return Outcome(
        method=average.held_out,
        baseline=found.experts,
        unit="nats a byte on tasks that no expert saw",
        holds=_generalizes(found, 0.01),
        control=("the base", found.base),
        notes=_notes(found),
    )


@claim(row=95, pace="slow", headline=_HEADLINE)
def merged_encoders_generalize_better_than_single_ones(assets: Assets) -> Outcome:
    """Two and four of four copies of MiniLM tuned on moods, reviews, code and articles; eight methods, six tasks."""
    found = studied()
    average, (fewer, methods) = found.of("average", 4), _fewer(found)
    return Outcome(
        method=average.held_out,
        baseline=found.experts,
        unit="nats a piece on tasks that no expert saw",
        holds=_generalizes(found, 0.02) and fewer >= 0.75 * methods,
        control=("the base", found.base),
        notes=_notes(found),
    )
