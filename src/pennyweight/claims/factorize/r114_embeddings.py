"""Row 114, embedding compression: fourteen methods under one budget of bytes, on words of tweets and their mood."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import torch

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.data.tables import labelled_text
from pennyweight.embeddings.bench import FOURTEEN, Bags, bench, recommend, run

_HEADLINE = "14 methods, 4 criteria: which to take depends on the budget and the use (no figure in the abstract)"
_LENGTH, _HELD_OUT, _STEPS = 24, 3000, 60


@lru_cache(maxsize=1)
def tweets() -> Bags:
    """Tweets that are positive or negative as bags of their first 24 words, words numbered by how often they occur."""
    found = labelled_text("tweets")
    good, bad = (found.classes.index(name) for name in ("positive", "negative"))
    pairs = [
        (text, label == good) for text, label in zip(found.texts, found.labels, strict=True) if label in (good, bad)
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    words = [re.findall(r"[a-z0-9'@#]+", pairs[n][0].lower())[:_LENGTH] for n in order]
    labels = torch.tensor([int(pairs[n][1]) for n in order])
    counts = Counter(word for text in words[_HELD_OUT:] for word in text)
    number = {word: n for n, (word, _) in enumerate(counts.most_common())}
    ids = torch.full((len(words), _LENGTH), -1)
    for row, text in enumerate(words):
        known = [number[word] for word in text if word in number]
        ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
    return Bags(ids[_HELD_OUT:], labels[_HELD_OUT:], ids[:_HELD_OUT], labels[:_HELD_OUT], len(number))


_BUDGETS = (0.5, 0.1, 0.02)


@claim(row=114, pace="slow", headline=_HEADLINE)
def which_compressor_is_best_depends_on_the_budget(assets: Assets) -> Outcome:
    """28,995 words at 50, 10 and 2 %: the best of fourteen at 10 %, chosen on other tweets; control: narrow rows."""
    whole = tweets()
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
        eight = run("int", judge, 0.5, steps=_STEPS).auc
    small = {one.method for one in results if one.budget == 0.02 and not one.why}
    size = choose.table(16).bytes
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
        and len({one.method for one in best.values()}) > 1,
        control=("all rows narrower, behind one projection", control),
        notes=f"best: {', '.join(f'{budget:.0%} {one.method}' for budget, one in best.items())}; baseline: rows by the "
        f"remainder of their number; at 10 % for {uses}; the whole table {dense:.4f}, at 8 bits {eight:.4f}",
    )
