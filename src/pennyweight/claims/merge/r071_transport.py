"""Row 71, fusion by optimal transport: a permuted copy fuses to the function it had, where plain averaging ruins it."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.experts import losses, parameters, trained, windows
from pennyweight.claims.tiny import gpt, one_thread
from pennyweight.evaluate.perplexity import token_losses
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


def _shrunk(wide: GPT, narrow: GPT) -> GPT:
    """The wide one in the narrow one's shape: neighboring channels and neurons as one, their mean, or sum as inputs."""
    made, big = copy.deepcopy(narrow), dict(wide.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            found = big[name]
            for side, size in enumerate(parameter.shape):
                parts = found.unflatten(side, (size, -1))  # type: ignore[no-untyped-call]  # torch leaves it untyped
                found = parts.sum(side + 1) if side and name != "embedding.weight" else parts.mean(side + 1)
            parameter.copy_(found)
        # the one table is the head, too: what its means lack there, the last norm makes up for, as in fusion
        made.norm.weight.mul_(wide.config.width / narrow.config.width)
    return made


@cache
def _widths() -> tuple[dict[str, float], dict[str, float]]:
    """Held-out nats a byte of a narrow GPT, a wide one, and what becomes of both; as they are, and tuned alike."""
    with one_thread():
        narrow, _ = trained(gpt(width=64, seed=0), "wiki", steps=400, peak=3e-3)
        wide, _ = trained(gpt(width=128, num_heads=4, seed=1), "wiki", steps=400, peak=3e-3, seed=1)
        seen, held = windows("wiki", "calibration", 4096)[:32], windows("wiki", "heldout", 192)
        shrunk = _shrunk(wide, narrow)
        made = {
            "narrow": narrow,
            "wide": wide,
            "matched": fuse(wide, narrow, seen),
            "softly matched": fuse(wide, narrow, seen, solver="sinkhorn"),
            "unmatched": _average(shrunk, narrow),
            "the wide one carried over": fuse(wide, narrow, seen, alpha=0.0),
            "its neighbors averaged": shrunk,
            "matched, into the wide": fuse(narrow, wide, seen),
        }
        found, tuned = {}, {}
        for name, one in made.items():
            assert isinstance(one, GPT)
            found[name] = float(token_losses(one, held, batch=96).mean())
            after, _ = trained(one, "wiki", steps=60, peak=1e-3, seed=5)
            tuned[name] = float(token_losses(after, held, batch=96).mean())
    return found, tuned


def _said(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


@claim(row=71, pace="slow", headline=_HEADLINE)
def models_of_different_widths_average_better_matched(assets: Assets) -> Outcome:
    """A GPT of width 128 and one of 64, into the narrow one; unmatched: any two that are neighbors become one."""
    found, tuned = _widths()
    return Outcome(
        method=found["matched"],
        baseline=found["unmatched"],
        unit="held-out nats a byte, untuned",
        holds=found["matched"] < found["unmatched"] - 0.05
        and tuned["matched"] < tuned["unmatched"]
        # the narrow one alone would pass for a fusion of both
        and tuned["the wide one carried over"] < tuned["its neighbors averaged"] - 0.01,
        control=("the narrow parent", found["narrow"]),
        notes=f"untuned: {_said(found)}; after 60 steps: {_said(tuned)}",
    )


@claim(row=71, pace="slow", headline=_HEADLINE)
def a_wide_model_lends_to_a_narrow_one(assets: Assets) -> Outcome:
    """The same, tuned for 60 steps, against the narrow parent tuned alike; the plain average does not exist."""
    tuned = _widths()[1]
    return Outcome(
        method=tuned["matched"],
        baseline=tuned["narrow"],
        unit="held-out nats a byte after 60 steps",
        holds=tuned["matched"] < tuned["narrow"],
        control=("the average without matching, tuned alike", tuned["unmatched"]),
        notes=f"into the wide one {tuned['matched, into the wide']:.3f}, where the wide parent has {tuned['wide']:.3f}",
    )
