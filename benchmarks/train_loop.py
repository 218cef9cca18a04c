"""How fast the training loop is beside a loop written by hand: `python benchmarks/train_loop.py [--seconds 40]`.

The byte GPTs of the claims, AdamW, clipped gradients, a cosine; one model each, the same weights, order and steps. The
two take turns of 25 steps, which of them goes first changes, and each turn is a pair. Prints milliseconds a step of
both, the ratio of every pair's times (median, and its 95 % interval by resampling pairs), and by how much the weights
differ at the end; exits with 1 where the ratio is above 1.05 or the weights differ at all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.train import Samples, Trainer, byte_windows
from pennyweight.train.schedules import cosine
from pennyweight.zoo.gpt import GPT, GPTConfig

TURN, BATCH, LENGTH, LIMIT = 25, 16, 32, 1.05


def gpt(width: int) -> nn.Module:
    config = GPTConfig(width=width, depth=2, num_heads=2, vocabulary=256, context=LENGTH + 1)
    return GPT(config, generator=torch.Generator().manual_seed(0))


class Plain:
    """What anybody would write."""

    def __init__(self, module: nn.Module, windows: Tensor, total: int) -> None:
        self.module, self.windows, self.total, self.steps = module, windows, total, 0
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
        # the trainer's own order, so that both see the same samples
        self.order = Samples(torch.arange(len(windows)), seed=0).take(0, total * BATCH)[0]
        self.module.train()

    def run(self, until: int) -> list[float]:
        losses = []
        while self.steps < until:
            ids = self.windows[self.order[self.steps * BATCH : (self.steps + 1) * BATCH]]
            logits = self.module(ids[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.steps += 1
            rate = 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (self.steps - 20) / (self.total - 20))) / 2)
            self.optimizer.param_groups[0]["lr"] = rate if self.steps >= 20 else 3e-3 * self.steps / 20
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses


def measured(width: int, seconds: float) -> tuple[list[float], list[float], float]:
    """Seconds a step of each turn, of both, and the largest difference of a weight at the end."""
    windows, total = byte_windows("stdlib-code", part="calibration", length=LENGTH + 1), 100_000
    plain = Plain(gpt(width), windows, total)
    module = gpt(width)
    trainer = Trainer(
        module, torch.optim.AdamW(module.parameters(), weight_decay=0.0), Samples(windows, seed=0), batch=BATCH,
        schedule=cosine(total, 20, peak=3e-3), clip=1.0,
    )  # fmt: skip
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    until, began = 0, time.perf_counter()
    while len(times["ours"]) < 8 or time.perf_counter() - began < seconds:
        until += TURN
        pair = [("plain", plain), ("ours", trainer)]
        for name, loop in pair if (until // TURN) % 2 else pair[::-1]:
            start = time.perf_counter()
            loop.run(until)
            times[name].append((time.perf_counter() - start) / TURN)
    here, there = dict(module.named_parameters()), dict(plain.module.named_parameters())
    apart = max(float((here[name] - there[name]).detach().abs().max()) for name in here)
    return times["plain"][2:], times["ours"][2:], apart  # the first pairs warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="for both sizes together")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the claims take 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = True
    for width in (32, 96):
        plain, ours, apart = measured(width, options.seconds / 2)
        ratios = np.array(ours) / np.array(plain)
        drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        ratio = float(np.median(ratios))
        print(
            f"width {width}: plain {1e3 * statistics.median(plain):.2f} ms a step, ours "
            f"{1e3 * statistics.median(ours):.2f}; ratio {ratio:.3f} [{low:.3f}, {high:.3f}] over {ratios.size} pairs; "
            f"weights differ by {apart:.1e}"
        )
        kept = kept and ratio <= LIMIT and apart == 0
    print(f"within 5 % of plain PyTorch, to the same bits: {'yes' if kept else 'NO'}")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
