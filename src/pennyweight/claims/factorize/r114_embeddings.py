"""Row 114, embedding compression: fourteen methods under one budget of bytes, on words of tweets and their mood."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.embeddings.bench import FOURTEEN, bench, recommend, run
from pennyweight.embeddings.words import word_bags
from pennyweight.measure import stats

_HEADLINE = "14 methods, 4 criteria: which to take depends on the budget and the use (no figure in the abstract)"
_STEPS = 60
_BUDGETS = (0.5, 0.1, 0.02)
_FLIP = _BUDGETS[:2]  # where the best is another one
_SEEDS = range(1, 7)


@claim(row=114, pace="slow", headline=_HEADLINE)
def which_compressor_is_best_depends_on_the_budget(assets: Assets) -> Outcome:
    """28,995 words at 50, 10 and 2 %: the best of fourteen at 10 %, chosen on other tweets, by six seeds."""
    whole = word_bags("tweets")
    half = len(whole.held_ids) // 2
    choose, judge = (
        replace(whole, held_ids=whole.held_ids[part], held_labels=whole.held_labels[part])
        for part in (slice(half), slice(half, None))
    )
    with one_thread():
        results = bench(choose, budgets=_BUDGETS, steps=_STEPS)
        best = {budget: recommend(results, "quality", budget=budget) for budget in _BUDGETS}

        def areas(name: str, budget: float) -> list[float]:  # by seed
            return [run(name, judge, budget, steps=_STEPS, seed=seed).auc for seed in _SEEDS]

        large, small = (best[budget].method for budget in _FLIP)
        table = {(name, budget): areas(name, budget) for name in {large, small} for budget in _FLIP}
        hashed, narrow = (areas(name, _FLIP[1]) for name in ("hash", "narrow"))
        dense = run("dense", judge, 1.0, steps=_STEPS).auc
        eight, sixteen = (run("int", judge, budget, steps=_STEPS).auc for budget in (0.5, 0.51))
    leads = [
        stats.paired_difference(table[loser, budget], table[winner, budget])
        for winner, loser, budget in ((large, small, _FLIP[0]), (small, large, _FLIP[1]))
    ]
    lead = stats.paired_difference(hashed, table[small, _FLIP[1]])
    baseline = fmean(hashed)
    tiny = {one.method for one in results if one.budget == 0.02 and not one.why}
    size = choose.table(16).bytes
    learned = next(one for one in results if (one.method, one.budget) == ("alpt", 0.5))
    uses = ", ".join(f"{use} {recommend(results, use, budget=0.1).method}" for use in ("lookup", "training"))
    return Outcome(
        method=fmean(table[small, _FLIP[1]]),
        baseline=baseline,
        unit="area under the curve on held-out tweets, tables at 10 % of their bytes",
        lower_is_better=False,
        holds=lead.value > 0.003
        and lead.low > 0
        and large != small
        and all(one.low > 0 for one in leads)
        and all(one.bytes <= one.budget * size for one in results if not one.why)
        and {one.method for one in results if not one.why and one.budget == 0.5} == set(FOURTEEN)
        and tiny == {"compo", "tt", "dhe", "robe", "adapt", "dedup"}
        and dense - eight < 0.005
        and dense - sixteen < 0.002
        and learned.training_bytes < 0.25 * 4 * size,
        control=("all rows narrower, behind one projection", fmean(narrow)),
        interval=(baseline + lead.low, baseline + lead.high),
        notes=f"best: {', '.join(f'{budget:.0%} {one.method}' for budget, one in best.items())}; on the judging "
        f"tweets, with {len(_SEEDS)} other seeds, {large} is ahead of {small} at 50 % by [{leads[0].low:+.4f}, "
        f"{leads[0].high:+.4f}] and behind at 10 % by [{leads[1].low:+.4f}, {leads[1].high:+.4f}]; baseline: rows by "
        f"the remainder of their number; at 10 % for {uses}; the whole table {dense:.4f}, at 8 bits {eight:.4f}, at "
        f"16 {sixteen:.4f}; learned steps {learned.auc:.4f} (the others' half), trained in "
        f"{learned.training_bytes / size:.2f} of the table's bytes, not 4",
    )
