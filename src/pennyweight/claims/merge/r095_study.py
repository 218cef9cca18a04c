"""Row 95, MergeAtScale: merged experts keep much of what each gained, and do better elsewhere than single experts.

One of the paper's findings. That stronger bases and larger models merge better, and that methods then differ less, is
not run here (one base, one size); that more experts keep less of each is in the notes, and averaging does not show it.
"""

from __future__ import annotations

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.experts import experts, losses, parameters
from pennyweight.claims.tiny import one_thread
from pennyweight.merge.study import study


@claim(row=95, pace="slow", headline="merging improves generalization; more experts cost held-in quality (abstract)")
def merged_experts_generalize_better_than_single_ones(assets: Assets) -> Outcome:
    """Two and four of four byte-level experts, four methods, six tasks; the figure is that of averaging all four."""
    with one_thread():
        known = experts()
        found = study(parameters(known.base), [parameters(one) for one in known.models], losses)
    average, methods = found.of("average", 4), {one.method for one in found.merges}
    fewer = sum(found.of(name, 4).held_in < found.of(name, 2).held_in for name in methods)
    return Outcome(
        method=average.held_out,
        baseline=found.experts,
        unit="nats a byte on tasks that no expert saw",
        holds=average.held_out < found.experts - 0.01 and average.held_in > 0.1,
        control=("the base", found.base),
        notes=f"four experts keep less than two in {fewer} of {len(methods)} methods; "
        + found.table().replace("\n", "; ").replace("\t", ", "),
    )
