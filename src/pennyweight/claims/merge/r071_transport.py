"""Row 71, fusion by optimal transport: a permuted copy fuses to the function it had, where plain averaging ruins it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.experts import losses, parameters, trained, windows
from pennyweight.claims.tiny import gpt, one_thread
from pennyweight.merge.transport import fuse
from pennyweight.zoo.gpt import GPT

_HEADLINE = "outperforms vanilla fusion consistently, and both parents after a short fine-tuning (abstract)"


def _average(one: nn.Module, two: nn.Module) -> nn.Module:
    found, other = copy.deepcopy(two), dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_((other[name] + parameter) / 2)
    return found


@claim(row=71, pace="slow", headline=_HEADLINE)
def a_permuted_copy_of_smollm2_fuses_to_the_same_function(assets: Assets) -> Outcome:
    """Logits of the average of SmolLM2-135M and its permuted copy, matched or not, against the original's."""
    one, two = assets.smollm2(), assets.smollm2(permuted=True)
    seen, fresh = one.windows(count=1, length=128, part="calibration"), one.windows(count=1, length=64, part="heldout")

    @torch.inference_mode()
    def logits(module: nn.Module) -> Tensor:
        found: Tensor = module(fresh).logits
        return found

    wanted = logits(one.model.module)

    def error(module: nn.Module) -> float:
        return float((logits(module) - wanted).norm() / wanted.norm())

    permuted = error(two.model.module)
    plain = error(_average(one.model.module, two.model.module))
    found = error(fuse(one.model.module, two.model.module, seen))
    # the second model alone would pass for a fusion of both: so fuse one that is off, too, whose average is known
    noisy, g = copy.deepcopy(one.model.module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=g))
    wanted = logits(_average(noisy, one.model.module))
    both, alone = error(fuse(noisy, two.model.module, seen)), error(two.model.module)
    return Outcome(
        method=found,
        baseline=plain,
        unit="relative error of held-out logits",
        holds=found < 1e-5 and plain > 0.1 and both < 1e-5 < 0.01 * alone,
        control=("the permuted copy itself: the order of sums alone", permuted),
        notes=f"the first 2 % off: {both:.2g} from the average of matched weights, the copy alone {alone:.2g}",
    )


@claim(row=71, pace="slow", headline=_HEADLINE)
def matched_models_of_different_seeds_average_better_than_unmatched_ones(assets: Assets) -> Outcome:
    """Two byte-level GPTs of different seeds, averaged with and without matching, as they are and tuned alike."""
    with one_thread():
        parents = [trained(gpt(width=64, seed=n), "wiki", steps=400, peak=3e-3, seed=n)[0] for n in (0, 1)]
        seen = windows("wiki", "calibration", 4096)[:32]
        fused = {
            "matched": fuse(parents[0], parents[1], seen),
            "softly matched": fuse(parents[0], parents[1], seen, solver="sinkhorn"),
            "plain": _average(parents[0], parents[1]),
        }
        found = {name: losses(parameters(one), ["wiki"])[0] for name, one in fused.items()}
        # all of the first in the places of the second is the first, and not the second
        carried = losses(parameters(fuse(parents[0], parents[1], seen, alpha=0.0)), ["wiki"])[0]
        alone = [losses(parameters(one), ["wiki"])[0] for one in parents]
        tuned = {}
        for name, one in {**fused, "parent": parents[0]}.items():
            assert isinstance(one, GPT)
            tuned[name] = losses(parameters(trained(one, "wiki", steps=60, peak=1e-3, seed=5)[0]), ["wiki"])[0]
    return Outcome(
        method=found["matched"],
        baseline=found["plain"],
        unit="held-out nats a byte, untuned",
        holds=found["matched"] < found["plain"] - 0.05
        and tuned["matched"] < tuned["plain"]
        and abs(carried - alone[0]) < 1e-4 < abs(carried - alone[1]),
        control=("a parent", alone[0]),
        notes=(
            f"the first carried over: {carried:.4f}, the second {alone[1]:.4f}; softly: {found['softly matched']:.3f}; "
            "after 60 steps: " + ", ".join(f"{name} {value:.3f}" for name, value in tuned.items())
        ),
    )
