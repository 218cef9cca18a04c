"""Row 248, DSL: sparse embedding tables whose places move while they are trained beat fixed ones of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.data import split
from pennyweight.data.interactions import Interactions, of_texts
from pennyweight.measure import stats
from pennyweight.train import Samples, Trainer
from pennyweight.train.dynamic import DynamicSparsity
from pennyweight.zoo.recommender import LightGCN, ranking_loss, recall

_SEEDS = (0, 1, 2)
_STEPS, _EVERY = 600, 30
_WIDTH, _DENSITY = 40, 0.5  # the density is the default of the official code
_COMPARABLE = 0.9  # of the dense model's recall


@dataclass
class _Counted:
    """The most weights that were not zero after any step."""

    sparse: DynamicSparsity
    most: int = 0

    def step(self) -> None:
        self.most = max(self.most, self.sparse.nonzero())


def _trained(data: Interactions, seed: int, width: int, rate: float | None) -> tuple[Tensor, int, int]:
    """Recall by user, the most weights not zero at any step, and those allowed."""
    module = LightGCN(data, width=width, generator=torch.Generator().manual_seed(seed))
    adam = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    sparse = counted = None
    if rate is not None:
        sparse = DynamicSparsity(
            [module.users, module.items], adam, density=_DENSITY, total=_STEPS, every=_EVERY, rate=rate,
            final_rate=min(rate, 0.005), seed=seed,
        )  # fmt: skip
        counted = _Counted(sparse)
    loss = ranking_loss(data, torch.Generator().manual_seed(seed))
    pairs = Samples(data.seen[:, 0], data.seen[:, 1], seed=seed)
    Trainer(module, adam, pairs, batch=2048, loss=loss, callbacks=[one for one in (sparse, counted) if one]).run(_STEPS)
    size = (data.users + data.items) * width
    if sparse is None or counted is None:
        return recall(module, data), size, size
    return recall(module, data), counted.most, sparse.budget


@claim(
    row=248,
    pace="slow",
    headline="lower cost of training and inference at comparable recommendation quality (abstract; no figure there)",
)
@tiny.one_thread()
def moving_places_make_better_sparse_tables(assets: Assets) -> Outcome:
    """LightGCN on passages of Wikipedia as users and their words as items; recall of what they hold back."""
    data = of_texts(split("wiki").calibration)
    kinds = {
        "dsl": (_WIDTH, 0.5),
        "static": (_WIDTH, 0.0),
        "small": (round(_WIDTH * _DENSITY), None),
        "dense": (_WIDTH, None),
    }
    found: dict[str, list[Tensor]] = {}
    within = True
    for name, (width, rate) in kinds.items():
        runs = [_trained(data, seed, width, rate) for seed in _SEEDS]
        found[name] = [by_user for by_user, _, _ in runs]
        within &= all(most <= budget for _, most, budget in runs)
    users = {name: torch.stack(runs).mean(0) for name, runs in found.items()}
    mean = {name: float(one.mean()) for name, one in users.items()}
    gain = stats.paired_difference(users["static"], users["dsl"])
    over_small = stats.paired_difference(users["small"], users["dsl"])
    return Outcome(
        method=mean["dsl"],
        baseline=mean["static"],
        unit="recall at 20",
        lower_is_better=False,
        holds=within and gain.low > 0 and over_small.low > 0 and mean["dsl"] >= _COMPARABLE * mean["dense"],
        control=("a dense model of as many weights", mean["small"]),
        interval=(mean["static"] + gain.low, mean["static"] + gain.high),
        notes=(
            f"{data.users:,} passages, {data.items:,} words, {len(data.seen):,} pairs; {_DENSITY:.0%} of the weights, "
            f"the whole dense model has {mean['dense']:.4f}; by seed "
            + "; ".join(
                " against ".join(f"{float(one.mean()):.4f}" for one in pair)
                for pair in zip(found["dsl"], found["static"], strict=True)
            )
        ),
    )
