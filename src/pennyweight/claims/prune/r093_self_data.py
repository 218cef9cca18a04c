"""Row 93, self-data distillation: a pruned model forgets less when it recovers on what the original itself wrote."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.data.windowing import Part
from pennyweight.evaluate.agreement import agreement
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.measure import stats
from pennyweight.measure.drafting import speculate
from pennyweight.merge import Slerp, merge_tensors
from pennyweight.solvers.depth import redundant, streams
from pennyweight.surgery import remove_blocks
from pennyweight.train import Samples, Trainer, byte_windows
from pennyweight.train.schedules import cosine, wsd
from pennyweight.train.self_data import response_loss, rewrite
from pennyweight.zoo.gpt import GPT

_DEPTH, _REMOVED = 8, 2  # a quarter, as 32 to 24 layers and about the paper's 32 to 26
_STEPS, _RECOVERY = 800, 120
_PROMPT, _PAIRS = 16, 768
_ARTICLES: tuple[tuple[Part, int], ...] = (("calibration", _PAIRS), ("heldout", 512))
_MARGIN = 0.95


def _recovered(pruned: GPT, prompts: Tensor, responses: Tensor) -> GPT:
    module = copy.deepcopy(pruned)
    Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=0.0),
        Samples(torch.cat([prompts, responses], 1), seed=0),
        batch=32,
        loss=response_loss(_PROMPT),
        schedule=cosine(_RECOVERY, _RECOVERY // 10, peak=1e-3, floor=0.0),
        clip=1.0,
    ).run(_RECOVERY)
    return module.eval()


def _without(original: GPT, blocks: list[int], windows: Tensor) -> GPT:
    module = copy.deepcopy(original)
    remove_blocks(module, blocks, (windows[:2],))
    return module


def _drafted(original: nn.Module, draft: nn.Module, held: Tensor) -> float:
    runs = [speculate(original, draft, window[:_PROMPT], tokens=16) for window in held]
    return sum(run.accepted for run in runs) / sum(run.proposed for run in runs)


@claim(
    row=93,
    pace="slow",
    headline="32 to 26 layers: 91.2 % of the accuracy kept, against 81.7 % with plain fine-tuning (abstract)",
)
@tiny.one_thread()
def recovery_on_own_answers_forgets_less(assets: Assets) -> Outcome:
    """A byte GPT of code loses a quarter of its blocks and is tuned on another kind of text: encyclopedia articles."""
    original = tiny.gpt(width=64, depth=_DEPTH)
    tiny.trainer(original, wsd(_STEPS, _STEPS // 20, 0.3, "linear", peak=4e-3), batch=32).run(_STEPS)
    original.eval()
    code, held = (part[:, : tiny.LENGTH - 1] for part in tiny.text())
    wiki, fresh = (
        byte_windows("wiki", part=part, length=tiny.LENGTH, count=count).clamp_(max=tiny.VOCABULARY - 1)
        for part, count in _ARTICLES
    )

    def divergence(module: nn.Module) -> Tensor:  # (C,), one figure a held-out window of code
        return agreement(original, module, held, batch=128).kl.mean(1)

    chosen = redundant(streams(original, (code[:256],)), _REMOVED)
    runs = [list(range(first, first + _REMOVED)) for first in range(_DEPTH - _REMOVED + 1)]
    cut = {first: float(divergence(_without(original, run, code)).mean()) for first, run in enumerate(runs)}
    others = [value for first, value in cut.items() if first != chosen[0]]

    pruned = _without(original, chosen, code)
    found = {}
    for name, text in (("wiki", wiki), ("code", code[torch.randperm(len(code), generator=_seed())[:_PAIRS]])):
        prompts, gold = text[:, :_PROMPT], text[:, _PROMPT : tiny.LENGTH - 1]
        own = rewrite(original, prompts, gold)
        found[name, "own"] = _recovered(pruned, prompts, own.responses)
        found[name, "gold"] = _recovered(pruned, prompts, gold)
    harm = {key: divergence(module) for key, module in found.items()}
    merged = copy.deepcopy(pruned)
    ends = [found["wiki", "own"].state_dict(), found["code", "own"].state_dict()]
    merged.load_state_dict(merge_tensors(Slerp(t=0.5), ends))
    harm["merged", "own"] = divergence(merged)

    gain = stats.paired_difference(harm["wiki", "gold"], harm["wiki", "own"])
    # forgetting nothing is easy for who learns nothing: nats of other articles, before and after, and of code's pupil
    unread, read, elsewhere, gold_read = (
        token_losses(module, fresh, batch=128)[:, _PROMPT - 1 :].mean(1)
        for module in (pruned, found["wiki", "own"], found["code", "own"], found["wiki", "gold"])
    )
    learned, beyond = (stats.paired_difference(rival, read) for rival in (unread, elsewhere))
    method, baseline, control = (
        float(harm[key].mean()) for key in (("wiki", "own"), ("wiki", "gold"), ("code", "gold"))
    )
    between, worse = (float(harm[key].mean()) for key in (("merged", "own"), ("wiki", "own")))
    before, after = (_drafted(original, draft, held[:24]) for draft in (pruned, merged))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="KL from the original on held-out code, nats a byte",
        holds=(
            method < _MARGIN * baseline
            and gain.high < 0
            and max(learned.high, beyond.high) < 0
            and cut[chosen[0]] < sum(others) / len(others)
            and between <= max(worse, float(harm["code", "own"].mean()))
            and after > before
        ),
        control=("the same steps on the text that the original was trained on", control),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"blocks {chosen} of {_DEPTH} went: {cut[chosen[0]]:.3f} before recovery, other runs "
            f"{min(others):.3f} to {max(others):.3f}, mean {sum(others) / len(others):.3f}; own answers to prompts of "
            f"code {float(harm['code', 'own'].mean()):.3f}, merged half-way (SLERP) with those to articles "
            f"{between:.3f}; nats a byte of other articles {float(read.mean()):.3f}, before recovery "
            f"{float(unread.mean()):.3f}, tuned on articles as they are {float(gold_read.mean()):.3f}, on own answers "
            f"to code {float(elsewhere.mean()):.3f} (difference [{beyond.low:+.3f}, {beyond.high:+.3f}]); of a "
            f"draft's tokens {before:.0%} stand before recovery, {after:.0%} of the merged one's"
        ),
    )


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
