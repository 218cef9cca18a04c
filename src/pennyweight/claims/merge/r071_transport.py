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
    return Outcome(
        method=found,
        baseline=plain,
        unit="relative error of held-out logits",
        holds=found < 1e-5 and plain > 0.1,
        control=("the permuted copy itself: the order of sums alone", permuted),
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
        tuned = {}
        for name, one in {**fused, "parent": parents[0]}.items():
            assert isinstance(one, GPT)
            tuned[name] = losses(parameters(trained(one, "wiki", steps=60, peak=1e-3, seed=5)[0]), ["wiki"])[0]
    return Outcome(
        method=found["matched"],
        baseline=found["plain"],
        unit="held-out nats a byte, untuned",
        holds=found["matched"] < found["plain"] - 0.05 and tuned["matched"] < tuned["plain"],
        control=("a parent", losses(parameters(parents[0]), ["wiki"])[0]),
        notes=(
            f"softly: {found['softly matched']:.3f}; after 60 steps: "
            + ", ".join(f"{name} {value:.3f}" for name, value in tuned.items())
        ),
    )
