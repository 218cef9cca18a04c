"""Row 172, MixDQ: widths planned by two metrics beat one width on both, and the first token stays out of quantization.

A diffusion transformer trained here draws digits in four steps from a text of two tokens; weights are rounded row by
row around zero. Content: SSIM to the original's images. Quality: Frechet distance of a reader's features to those of
the original's images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.evaluate.images import frechet_distance, sqnr, ssim
from pennyweight.levers.quantize.activations import Activations
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model.loading import of_module
from pennyweight.plan.allocation import Layers, average, bits, width_offer
from pennyweight.plan.decoupled import metric_decoupled
from pennyweight.plan.widths import Widths
from pennyweight.statistics import NO_STATISTICS
from pennyweight.work import Work

_HEADLINE = "W8A8 without loss, W4A8 negligible degradation; 3-4x smaller, 1.45x faster (abstract)"
_WIDTHS = (8, 6, 5, 4, 3, 2)


class _Bench:
    """The trained model at every width, with two metrics of what it draws."""

    def __init__(self) -> None:
        from pennyweight.claims import digits

        self.digits = digits
        self.model = of_module(copy.deepcopy(digits.dit()))
        maps = [one for one in self.model.anatomy.layers() if one.kind != "embedding"]
        self.counts = {one.name: one.shape[0] * one.shape[1] for one in maps}
        # cross-attention and feed-forward decide what is drawn, the rest how well (the paper's split)
        self.groups = {n: "content" if "cross_attn" in n or "ffn" in n else "quality" for n in self.counts}
        levers = [RTN(bits=b, group_size=None, zero="none") for b in _WIDTHS]
        self.widths = Widths.solve(self.model, maps, levers, dict.fromkeys(self.counts, NO_STATISTICS))

    def setting(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Texts and noise."""
        noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        return self.digits.texts(torch.arange(count) % 10), noise

    def draw(self, texts: Tensor, noise: Tensor) -> Tensor:
        from pennyweight.zoo.dit import draw

        return draw(self.model.module, texts, noise)

    def scores(self) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
        """Of every offer alone: 1 - SSIM of images; noise over signal of the velocity; the same in decibels."""
        texts, noise = self.setting(60, 1)
        images = self.draw(texts, noise)
        times = torch.rand(60, generator=torch.Generator().manual_seed(2))
        at = times[:, None, None, None]

        @torch.no_grad()
        def velocity() -> Tensor:
            found: Tensor = self.model.module((1 - at) * images + at * noise, times, texts)
            return found

        clean = velocity()
        content = self.widths.alone(lambda: float(1 - _ssim(images, self.draw(texts, noise))))
        decibels = self.widths.alone(lambda: -sqnr(clean, velocity()))
        return self._named(content), self._named(10 ** (decibels / 10)), self._named(decibels)

    def _named(self, flat: object) -> dict[str, list[float]]:
        rows = torch.as_tensor(flat).view(len(self.counts), len(_WIDTHS)).tolist()
        return dict(zip(self.counts, rows, strict=True))

    def layers(self, content: Mapping[str, list[float]], quality: Mapping[str, list[float]] | None) -> Layers:
        """Scores of two groups, or of one metric for all."""
        offers = {}
        for name, count in self.counts.items():
            by = content if quality is None or self.groups[name] == "content" else quality
            offers[name] = [width_offer(s, b, count=count) for s, b in zip(by[name], _WIDTHS, strict=True)]
        return Layers(offers, groups=None if quality is None else self.groups)

    def judged(self, pick: Mapping[str, int], count: int, seed: int) -> tuple[float, float]:
        """1 - SSIM and Frechet distance of what is drawn with ``pick`` to what the original draws."""
        texts, noise = self.setting(count, seed)
        clean = self.draw(texts, noise)
        with self.widths.standing(pick):
            images = self.draw(texts, noise)
        features = self.digits.features
        return float(1 - _ssim(clean, images)), frechet_distance(features(clean), features(images))


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    return ssim(one, other, data_range=2.0, window=7).mean()


@claim(row=172, pace="slow", headline=_HEADLINE)
def two_metrics_plan_better_than_one_width(assets: Assets) -> Outcome:
    """Mean widths of 4 and of 3 bits: both metrics on noise that no plan has seen."""
    with one_thread():
        bench = _Bench()
        content, quality, decibels = bench.scores()
        found = {}
        for mean in (4, 3):
            budget = {"bits": average(mean, bench.counts)}

            def figure(pick: Mapping[str, int]) -> float:
                unlike, distance = bench.judged(pick, 200, 3)
                return unlike * distance  # ranks as the sum of their logarithms: neither metric has a unit

            best, _ = metric_decoupled(
                bench.layers(content, quality), bench.counts, float(mean), figure, targets=(1.0, 0.975)
            )
            assert best.allocation.cost["bits"] <= budget["bits"]
            plans = {
                "decoupled": best.allocation.pick,
                "uniform": dict.fromkeys(bench.counts, _WIDTHS.index(mean)),
                "content only": bits(bench.layers(content, None), budget).pick,
                "decibels only": bits(bench.layers(decibels, None), budget).pick,
            }
            found[mean] = {name: bench.judged(pick, 500, 7) for name, pick in plans.items()}
    better = all(
        ours < theirs
        for each in found.values()
        for ours, theirs in zip(each["decoupled"], each["uniform"], strict=True)
    )
    spoiled = all(each["decibels only"][0] > 2 * each["decoupled"][0] for each in found.values())
    notes = "; ".join(
        f"{mean} bits: " + ", ".join(f"{name} {s:.3f}/{d:.2f}" for name, (s, d) in each.items())
        for mean, each in found.items()
    )
    return Outcome(
        method=found[4]["decoupled"][0],
        baseline=found[4]["uniform"][0],
        unit="1 - SSIM to the original's digits at a mean of 4 bits a weight",
        holds=better and spoiled,
        control=("all layers planned by SSIM alone", found[4]["content only"][0]),
        notes=f"1 - SSIM/Frechet distance at {notes}",
    )


@cache
def _smol_error(assets: Assets, lever: Activations) -> float:
    """Mean squared error of SmolLM2's scores, over their own mean square, with rounded inputs."""
    smol = assets.smollm2()
    fresh = smol.windows("wiki", part="heldout", length=96, count=3)
    model = smol.fresh()
    with torch.no_grad():
        clean = model.module(input_ids=fresh).logits[:, 1:].double()
        chosen = tuple(one for one in model.anatomy.layers() if one.block is not None)
        seen = smol.windows("wiki", part="calibration", length=96, count=3)
        lever.change(model, Work(model=model, windows=seen, maps=chosen))
        rounded = model.module(input_ids=fresh).logits[:, 1:].double()
    return float((rounded - clean).square().mean() / clean.square().mean())


@claim(row=172, pace="slow", headline=_HEADLINE)
def the_first_token_is_what_spoils_a_range(assets: Assets) -> Outcome:
    """SmolLM2, inputs of all layers in blocks at 8 bits, one range a layer from calibration text."""
    method, baseline = (
        _smol_error(assets, Activations(bits=8, granularity="tensor", static=True, keep_first_token=keep))
        for keep in (True, False)
    )
    by_token = _smol_error(assets, Activations(bits=8, granularity="token"))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="squared error of the scores over their own square, held-out text, first position left out",
        holds=2 * method <= baseline,
        control=("a range for each token, found as it comes: dearer to run", by_token),
        notes=f"{baseline / method:.3g} times smaller with the first token kept",
    )
