"""Row 114, embedding compression: fourteen methods under one budget of bytes, on words of tweets and their mood."""

from __future__ import annotations

from dataclasses import replace

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.embeddings.bench import FOURTEEN, bench, recommend, run
from pennyweight.embeddings.words import word_bags

_HEADLINE = "14 methods, 4 criteria: which to take depends on the budget and the use (no figure in the abstract)"
_STEPS = 60


_BUDGETS = (0.5, 0.1, 0.02)


@claim(row=114, pace="slow", headline=_HEADLINE)
def which_compressor_is_best_depends_on_the_budget(assets: Assets) -> Outcome:
    """28,995 words at 50, 10 and 2 %: the best of fourteen at 10 %, chosen on other tweets; control: narrow rows."""
    whole = word_bags("tweets")
    half = len(whole.held_ids) // 2
    choose, judge = (
        replace(whole, held_ids=whole.held_ids[part], held_labels=whole.held_labels[part])
        for part in (slice(half), slice(half, None))
    )
    with one_thread():
        results = bench(choose, budgets=_BUDGETS, steps=_STEPS)
        best = {budget: recommend(results, "quality", budget=budget) for budget in _BUDGETS}
        method, baseline, control, dense = (
            run(name, judge, 0.1, steps=_STEPS).auc for name in (best[0.1].method, "hash", "narrow", "dense")
        )
        eight, sixteen = (run("int", judge, budget, steps=_STEPS).auc for budget in (0.5, 0.51))
    small = {one.method for one in results if one.budget == 0.02 and not one.why}
    size = choose.table(16).bytes
    learned = next(one for one in results if (one.method, one.budget) == ("alpt", 0.5))
    uses = ", ".join(f"{use} {recommend(results, use, budget=0.1).method}" for use in ("lookup", "training"))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="area under the curve on held-out tweets, tables at 10 % of their bytes",
        lower_is_better=False,
        holds=method > baseline + 0.003
        and all(one.bytes <= one.budget * size for one in results if not one.why)
        and {one.method for one in results if not one.why and one.budget == 0.5} == set(FOURTEEN)
        and small == {"compo", "tt", "dhe", "robe", "adapt", "dedup"}
        and dense - eight < 0.005
        and dense - sixteen < 0.002
        and learned.training_bytes < 0.25 * 4 * size
        and len({one.method for one in best.values()}) > 1,
        control=("all rows narrower, behind one projection", control),
        notes=f"best: {', '.join(f'{budget:.0%} {one.method}' for budget, one in best.items())}; baseline: rows by the "
        f"remainder of their number; at 10 % for {uses}; the whole table {dense:.4f}, at 8 bits {eight:.4f}, at "
        f"16 {sixteen:.4f}; learned steps {learned.auc:.4f} (the others' half), trained in "
        f"{learned.training_bytes / size:.2f} of the table's bytes, not 4",
    )
