"""Row 239, continual inference: steps give what whole clips give, at the cost of the new step alone.

Streams of digits, pixel after pixel: a clip is the last 64 of them, an image where one ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.claims.vision import digits, train
from pennyweight.stream import continual
from pennyweight.zoo.retroactive import Retroactive

_HEADLINE = "order-of-magnitude lower cost of each online prediction with reused weights (abstract)"
_WINDOW = 64
_STEPS = 500


class _Clips(nn.Module):
    """A network of sequences (B, 1, 64) that reads images (B, 1, 8, 8)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        first, then = width, 2 * width
        self.body = nn.Sequential(
            nn.Conv1d(1, first, 9), nn.BatchNorm1d(first), nn.ReLU(), nn.Conv1d(first, then, 9, dilation=2),
            nn.BatchNorm1d(then), nn.ReLU(), nn.Conv1d(then, then, 5, dilation=4), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
            nn.Flatten(), nn.Linear(then, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images.flatten(2))
        return found


def _flops(call: Callable[[Tensor], object], x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        call(x)
    return int(counter.get_total_flops())


def _seconds(call: Callable[[Tensor], object], x: Tensor) -> float:
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        call(x)
        best = min(best, time.perf_counter() - start)
    return best


def _times_faster(width: int, stream: Tensor) -> float:
    body = _Clips(width).eval().body
    stepwise = continual(body, window=_WINDOW)
    stepwise.forward_steps(stream[:, :, :_WINDOW])
    return _seconds(body, stream[:, :, :_WINDOW]) / _seconds(stepwise.forward_step, stream[:, :, 0])


@claim(row=239, pace="quick", headline=_HEADLINE)
@one_thread()
@torch.no_grad()
def steps_give_what_clips_give_for_a_share_of_the_cost(assets: Assets) -> Outcome:
    """A trained convolutional network and retroactive attention, 500 steps of held-out digits each."""
    torch.manual_seed(0)
    with torch.enable_grad():
        clips = train(_Clips(), steps=300)
    images, labels = digits()[2:]
    stream = images[: _STEPS // _WINDOW + 2].flatten()[: _STEPS + _WINDOW - 1].view(1, 1, -1)
    body = clips.get_submodule("body")
    stepwise = continual(body, window=_WINDOW)
    found = stepwise.forward_steps(stream)
    assert found is not None
    wanted = body(stream.unfold(2, _WINDOW, 1)[0, 0][:, None])  # every window as a clip of its own: (500, 10)
    network = float((found[0].mT - wanted).abs().max() / wanted.abs().max())
    attention = Retroactive(nn.MultiheadAttention(32, 4, batch_first=True), _WINDOW)
    tokens = torch.nn.functional.conv1d(stream, torch.randn(32, 1, 5), padding=2)
    again = attention.forward_steps(tokens)
    assert again is not None
    whole = attention(tokens)
    attended = float((again - whole).abs().max() / whole.abs().max())
    step, clip = _flops(stepwise.forward_step, stream[:, :, 0]), _flops(body, stream[:, :, :_WINDOW])
    # at the trained width a step takes the time of its calls, whatever it computes
    narrow, wide = (_times_faster(width, stream) for width in (16, 128))
    # what as many FLOPs a step buy the plain way: a clip now and then, its answer held in between
    rare = -(-clip // step)
    held = wanted[torch.arange(len(wanted)) // rare * rare].argmax(1)
    stale = float((held != wanted.argmax(1)).float().mean())
    right = float((clips(images).argmax(1) == labels).float().mean())
    ratio = clip / step
    return Outcome(
        method=step / 1e6,
        baseline=clip / 1e6,
        unit="MFLOPs a prediction, each step of the stream",
        holds=max(network, attended) < 1e-6 and ratio > _WINDOW / 4 and wide > 1 and right > 0.8,
        control=(
            f"a clip every {rare} steps, its answer held: other classes at {stale:.0%} of the steps",
            clip / rare / 1e6,
        ),
        notes=(
            f"{ratio:.3g} times fewer; outputs off by {network:.1e} of the largest over {_STEPS} steps, those of "
            f"retroactive attention by {attended:.1e}; a clip takes {wide:.3g} times a step at 8 times the width, "
            f"{narrow:.2g} times at this one; {right:.1%} of held-out digits right"
        ),
    )
