"""Row 142, DSEE: an update of low rank with a few free entries tunes a pruned model as well as a plain adapter.

With weights pruned it is (0.009 nats ahead of a plain adapter of as many numbers). What does not hold is the second
part, set before the run: with half of the heads gone it stays behind the model whose weights were pruned and not tuned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.claims import Outcome, adapting, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.dsee import DSEE
from pennyweight.model import anatomy
from pennyweight.solvers.sparse_tuning import Adapted
from pennyweight.weights import Dense

_SEEDS = (0, 1)
_STEPS, _AGAIN, _RATE = 150, 100, 2e-3
_MARGIN = 0.01  # nats


def _lever(samples: int, **options: object) -> DSEE:
    given = {"samples": samples, "steps": _STEPS, "retune_steps": _AGAIN, "batch": 16, "rate": _RATE, "alpha": 8.0}
    return DSEE(**{**given, "dtype": "float32", **options})  # type: ignore[arg-type]


@claim(row=142, pace="slow", headline="25 % of inference FLOPs saved at 0.5 % trainable parameters on BERT (abstract)")
@tiny.one_thread()
def free_entries_beside_a_low_rank_tune_a_pruned_model(assets: Assets) -> Outcome:
    """Half of the weights go between two rounds of tuning queries and values; the same with two of four heads."""
    source, (seen, held) = adapting.pretrained(), adapting.articles()
    # width 64: rank 4 and 128 free entries are as many numbers as rank 5
    rivals = {
        "dsee": _lever(len(seen), rank=4, free=128),
        "lora": _lever(len(seen), rank=5, free=0, alpha=10.0),
        "random": _lever(len(seen), rank=4, free=128, support="random"),
    }
    counts = {name: lever.layer(torch.randn(64, 64), torch.Generator(), 0).learned for name, lever in rivals.items()}
    assert len(set(counts.values())) == 1
    found: dict[str, list[Tensor]] = {name: [] for name in rivals}
    for seed in _SEEDS:
        for name, lever in rivals.items():
            model = adapting.copied(source)
            lever.change(model, adapting.work(model, seen, seed))
            found[name].append(adapting.losses(model, held))
    untuned, heads = adapting.copied(source), adapting.copied(source)
    for one in untuned.anatomy.layers():
        if one.block is not None:
            layer = Adapted(anatomy.matrix(untuned.module, one))
            rivals["dsee"].prune_weights(layer)
            anatomy.replace(untuned.module, one.path, Dense(layer.dense().detach()))
    _lever(len(seen), rank=4, free=128, prune="heads").change(heads, adapting.work(heads, seen, 0))
    before, after = (sum(m.shape[0] * m.shape[1] for m in anatomy.of(one.module).layers()) for one in (source, heads))
    gain = adapting.gain(found["lora"], found["dsee"])
    alone = float(adapting.losses(untuned, held).mean())
    method, baseline, control = (float(torch.stack(one).mean()) for one in found.values())
    narrow = float(adapting.losses(heads, held).mean())
    return Outcome(
        method=method,
        baseline=baseline,
        unit="held-out nats a byte at 50 % zeros",
        holds=gain.high < _MARGIN and method < alone - 0.2 and narrow < alone and after < before,
        control=("the free entries at random places", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"{counts['dsee']} numbers tuned in each query and value; pruned and not tuned: {alone:.3f}; half of the "
            f"heads gone: {narrow:.3f} with {1 - after / before:.0%} fewer weights"
        ),
    )
