"""Row 67, MassiveDS: the loss of a language model with retrieved passages falls as the datastore grows."""

from __future__ import annotations

from itertools import pairwise

import torch

from pennyweight import data, retrieval
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.measure import stats

_SHARES = (0.0, 0.1, 0.3, 1.0)
_WORDS, _QUERIES = 64, 120


@claim(row=67, pace="quick", headline="monotone gains up to 1.4 trillion tokens, no obvious saturation (abstract)")
def larger_datastores_lower_the_loss(assets: Assets) -> Outcome:
    """Wikipedia passages found by BM25; held-out halves of passages of the same articles are predicted."""
    texts = data.documents("wiki")
    model_text, pairs, kept = texts[::3], [], []
    for text in texts[1::3]:
        parts = text.split()
        if len(parts) < 4 * _WORDS:
            continue
        # the last passage of an article is asked for; the rest of it is in the datastore
        query, answer = parts[-2 * _WORDS : -_WORDS], parts[-_WORDS:]
        pairs.append((" ".join(query), " ".join(answer)))
        kept.append(" ".join(parts[: -2 * _WORDS]))
    step = max(1, len(pairs) // _QUERIES)
    store = retrieval.datastore([*kept, *texts[2::3]], chunk_words=_WORDS)
    model = retrieval.CacheModel(model_text)
    curve = retrieval.scaling_curve(
        store, _SHARES, seeds=2, K=len(store.passages), k=3, queries=pairs[::step][:_QUERIES], loss=model.loss
    )
    losses = [point.loss for point in curve]
    steps = [stats.paired_difference(torch.tensor(a.losses), torch.tensor(b.losses)) for a, b in pairwise(curve)]
    whole = stats.paired_difference(torch.tensor(curve[0].losses), torch.tensor(curve[-1].losses))
    shuffled = retrieval.scaling_curve(
        store, (1.0,), K=len(store.passages), k=3, queries=[(q[::-1], a) for q, a in pairs[::step][:_QUERIES]],
        loss=lambda passages, query, answer: model.loss(passages, query[::-1], answer),
    )  # fmt: skip
    return Outcome(
        method=losses[-1],
        baseline=losses[0],
        unit="nats a word",
        holds=bool(whole.high < 0 and all(step.low < 0 for step in steps) and losses[-1] < shuffled[0].loss),
        interval=(losses[0] + whole.low, losses[0] + whole.high),
        control=("the whole datastore, searched for the query spelled backwards", shuffled[0].loss),
        notes=(
            f"{len(store.passages)} passages of {_WORDS} words; loss at shares {', '.join(f'{p.p:g}' for p in curve)}: "
            + ", ".join(f"{p.loss:.3f} +- {p.standard_error:.3f}" for p in curve)
            + "; the model is a unigram mixed with a cache of what was retrieved; paired interval"
        ),
    )  # fmt: skip
