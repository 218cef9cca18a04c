"""Row 97, progressive gradient flow: masks that fade in beat SR-STE at 1:16, and by more than at 2:4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny, vision
from pennyweight.claims.assets import Assets
from pennyweight.levers.prune.progressive import ProgressiveMasks
from pennyweight.measure import stats
from pennyweight.model import anatomy
from pennyweight.zoo.vit import vit

_SEEDS = (0, 1, 2)
_STEPS = 480
_KINDS: dict[str, dict[str, Any]] = {
    "fading": {"method": "mask-exponential"},
    "hardening": {"method": "structure-halving"},
    "sr-ste": {"method": "sr-ste"},
    "sr-ste at once": {"method": "sr-ste", "dense": 0.0},
}
_MARGIN = 0.01  # of accuracy


def _layers(module: Any) -> list[nn.Linear]:
    """The feed-forward layers, as in the source."""
    maps = anatomy.of(module).layers()
    return [module.get_submodule(one.path) for one in maps if one.role.startswith("ffn")]


def _trained(pattern: str, options: dict[str, Any], seed: int) -> Tensor:
    """(597,) whether each held-out digit is read, by a model that was N:M when it was done."""
    module = vit(width=32, depth=2, seed=seed)
    layers = _layers(module)
    progress = ProgressiveMasks(layers, pattern=pattern, steps=_STEPS, **options)
    vision.train(module, steps=_STEPS, seed=seed, callbacks=[progress])
    progress.finish()
    kept, of = progress.pattern
    assert all(bool(((layer.weight.view(-1, of) != 0).sum(1) <= kept).all()) for layer in layers)
    return vision.held_out_correct(module)


@claim(
    row=97,
    pace="slow",
    headline="up to 2 % better in vision and 5 % in language at high sparsity than earlier N:M training (abstract)",
)
@tiny.one_thread()
def fading_masks_train_better_at_high_sparsity(assets: Assets) -> Outcome:
    """A vision Transformer on digits, its feed-forward layers at 1:16 and at 2:4; the same steps; three seeds."""
    found = {
        pattern: {
            name: torch.stack([_trained(pattern, options, seed) for seed in _SEEDS]).mean(0)  # (images,)
            for name, options in (
                _KINDS if pattern == "1:16" else {one: _KINDS[one] for one in ("fading", "sr-ste")}
            ).items()
        }
        for pattern in ("1:16", "2:4")
    }
    hard, mild = found["1:16"], found["2:4"]
    mean = {name: float(each.mean()) for name, each in hard.items()}
    gain = stats.paired_difference(hard["sr-ste"], hard["fading"])
    small = float(mild["fading"].mean() - mild["sr-ste"].mean())
    return Outcome(
        method=mean["fading"],
        baseline=mean["sr-ste"],
        unit="accuracy on held-out digits at 1:16",
        lower_is_better=False,
        holds=gain.low > 0 and mean["fading"] > mean["sr-ste"] + _MARGIN and small < mean["fading"] - mean["sr-ste"],
        control=("SR-STE from the first step, with no dense phase", mean["sr-ste at once"]),
        interval=(mean["sr-ste"] + gain.low, mean["sr-ste"] + gain.high),
        notes=(
            f"patterns that harden instead {mean['hardening']:.4f}; at 2:4 "
            f"fading {float(mild['fading'].mean()):.4f} against {float(mild['sr-ste'].mean()):.4f}; the interval is of "
            "the difference"
        ),
    )
