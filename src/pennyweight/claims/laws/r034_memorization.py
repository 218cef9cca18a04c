"""Row 34, PaLM: larger models give back more of what they were trained on, and what was seen more often."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.evaluate import memorisation
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine

_WIDTHS, _REPEATS, _CANARIES, _STEPS, _BATCH = (8, 16, 48), (1, 4, 16), 48, 500, 32
_PROMPT, _GEN = 16, 8


def _canaries(seed: int) -> Tensor:
    """Random bytes, which nothing but having seen them tells."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(32, 127, (_CANARIES, tiny.LENGTH), generator=g)


@claim(row=34, pace="slow", headline="matches of 50 tokens: 1.6 % at 8B, 2.4 % at 540B (section 10; from memory)")
@tiny.one_thread()
def memorization_rises_with_size_and_repetition(assets: Assets) -> Outcome:
    """Byte GPTs of three widths, equal steps, on source code with random lines strewn in 1, 4 and 16 times."""
    planted = {repeats: _canaries(repeats) for repeats in _REPEATS}
    unseen = _canaries(0)
    corpus = torch.cat([tiny.text()[0][:600], *(lines.repeat(repeats, 1) for repeats, lines in planted.items())])
    found: dict[tuple[int, int], float] = {}
    for width in _WIDTHS:
        module = tiny.gpt(width=width)
        schedule = cosine(_STEPS, _STEPS // 10, peak=8e-3, floor=0.0)
        optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
        Trainer(module, optimizer, Samples(corpus, seed=0), batch=_BATCH, schedule=schedule, clip=1.0).run(_STEPS)
        for repeats, lines in ((0, unseen), *planted.items()):
            found[width, repeats] = float(memorisation(module, lines, prompt=_PROMPT, gen=_GEN))
    often, small, large = _REPEATS[-1], _WIDTHS[0], _WIDTHS[-1]
    by_size = [found[width, often] for width in _WIDTHS]
    by_count = [found[large, repeats] for repeats in (0, *_REPEATS)]
    return Outcome(
        method=found[large, often],
        baseline=found[small, often],
        unit=f"share of lines seen {often} times whose {_GEN} bytes come back",
        lower_is_better=False,
        holds=bool(by_size == sorted(by_size) and by_count == sorted(by_count) and by_size[-1] > by_size[0] + 0.2),
        control=("lines never seen, the largest model", by_count[0]),
        notes=(
            f"widths {', '.join(map(str, _WIDTHS))}: " + ", ".join(f"{share:.2f}" for share in by_size)
            + f"; the largest after 0, {', '.join(map(str, _REPEATS))} times: "
            + ", ".join(f"{share:.2f}" for share in by_count)
        ),
    )  # fmt: skip
