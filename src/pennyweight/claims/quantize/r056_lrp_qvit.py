"""Row 56, LRP-QViT: a clipped range for each channel behind LayerNorms, and bits that follow relevance."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.claims import Outcome, claim, tiny, vision
from pennyweight.claims.assets import Assets
from pennyweight.damage import damage
from pennyweight.lever import make
from pennyweight.levers.quantize.layernorm import reparametrize
from pennyweight.levers.quantize.relevance_bits import RelevanceBits
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.levers.quantize.softmax import quantized
from pennyweight.measure import stats
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense
from pennyweight.work import Work
from pennyweight.zoo.vit import vit

_SEEDS = (0, 1, 2)
_HEADLINE = "fixed-bit and mixed-bit quantization above prior methods at 4 and 6 bits (abstract; no figure there)"


@lru_cache(maxsize=3)
def _trained(seed: int) -> nn.Module:
    return vision.train(vit(width=32, seed=seed), steps=800, seed=seed)


def _fresh(module: nn.Module) -> Model:
    changed = copy.deepcopy(module)
    return Model(changed, tokenizer=None, name="vit", kind="image-classifier", config=changed.config)  # type: ignore[arg-type]


def _inner(model: Model) -> tuple[Map, ...]:
    """The layers inside blocks; patches and head keep their width, as in the paper."""
    return tuple(one for one in model.anatomy.layers() if one.block is not None)


def _apply(model: Model, name: str, maps: Sequence[Map], **options: object) -> None:
    make(name, options).change(model, Work(model=model, windows=vision.digits()[0][:128], maps=tuple(maps)))


# -- clipped ranges ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _uneven(module: nn.Module, spread: float, seed: int) -> nn.Module:
    """The same function with channels behind LayerNorms that differ as those of large pretrained models do.

    Scales are log-normal with deviation ``spread``: what training on 1,200 small images does not bring about.
    """
    model = _fresh(module)
    g = torch.Generator().manual_seed(seed)
    for block in model.anatomy.blocks:
        at = model.module.get_submodule(block.path)
        for norm, paths in (("layernorm_before", ("query", "key", "value")), ("layernorm_after", ("up",))):
            maps = [one for one in block.maps if one.role.rpartition(".")[2] in paths]
            for one in maps:
                anatomy.replace(model.module, one.path, Dense(anatomy.matrix(model.module, one).clone()))
            layers = [model.module.get_submodule(one.path) for one in maps]
            ratio = (spread * torch.randn(maps[0].shape[1], generator=g)).exp()
            reparametrize(at.get_submodule(norm), layers, ratio, torch.zeros_like(ratio))
    return model.module


def _narrow(module: nn.Module, granularity: str, percentile: float) -> Tensor:
    """(597,) what is right of the held-out digits at 4-bit weights and 4-bit activations, attention included."""
    model = _fresh(module)
    maps = _inner(model)
    behind = [one for one in maps if one.role.rpartition(".")[2] in ("query", "key", "value", "up")]
    rest = [one for one in maps if one not in behind]
    _apply(model, "quantize.layernorm", behind, bits=4, granularity=granularity, percentile=percentile)
    _apply(model, "quantize.activations", rest, bits=4, static=True, granularity="tensor")
    for one in maps:
        matrix = Dense(anatomy.matrix(model.module, one))
        weight = RTN(bits=4, group_size=None, search=16).solve(matrix, NO_STATISTICS)
        anatomy.replace(model.module, one.path, weight)
    with quantized(model.module, 4):
        return vision.held_out_correct(model.module)


@claim(row=56, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def clipped_channels_beat_one_range_where_channels_differ(assets: Assets) -> Outcome:
    """W4A4 with log-sqrt2 attention weights; channels made uneven by a change that leaves the function alone."""
    right: dict[str, list[Tensor]] = {}
    same = True
    for seed in _SEEDS:
        even = _trained(seed)
        uneven = _uneven(even, 1.0, seed)
        images = vision.digits()[2]
        with torch.no_grad():
            logits = vision.logits_of(even, images)
            same &= bool((vision.logits_of(uneven, images) - logits).abs().max() < 1e-4 * logits.abs().max())
        for name, module, granularity, percentile in (
            ("clipped", uneven, "channel", 99.9), ("whole", uneven, "channel", 100.0), ("one", uneven, "tensor", 99.9),
            ("clipped, even", even, "channel", 99.9), ("one, even", even, "tensor", 99.9),
        ):  # fmt: skip
            right.setdefault(name, []).append(_narrow(module, granularity, percentile))
        right.setdefault("float", []).append(vision.held_out_correct(even))
    table = {name: torch.stack(found).mean(0) for name, found in right.items()}  # (597,) shares of seeds
    gain = stats.paired_difference(table["one"], table["clipped"])
    method, baseline = float(table["clipped"].mean()), float(table["one"].mean())
    return Outcome(
        method=method,
        baseline=baseline,
        unit="accuracy on held-out digits at W4A4, three transformers",
        lower_is_better=False,
        holds=same and gain.low > 0.05,
        control=("a range for each channel, not clipped", float(table["whole"].mean())),
        interval=(baseline + gain.low, baseline + gain.high),
        notes=(
            f"float {float(table['float'].mean()):.3f}; where channels are even, as training left them here: clipped "
            f"{float(table['clipped, even'].mean()):.3f}, one range {float(table['one, even'].mean()):.3f}"
        ),
    )


# -- bits by relevance -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _losses(module: nn.Module) -> Tensor:
    images, labels = vision.digits()[2:]
    return functional.cross_entropy(vision.logits_of(module, images), labels, reduction="none")


def _allocated(module: nn.Module, lever: RelevanceBits, scores: dict[str, float]) -> Tensor:
    model = _fresh(module)
    lever.allocate(model, _inner(model), scores)
    return _losses(model.module)


def _uniform(module: nn.Module, bits: int) -> tuple[Tensor, float]:
    """Losses at one width for all, and its stored bits a weight."""
    model = _fresh(module)
    stored, count = 0, 0
    for one in _inner(model):
        matrix = anatomy.matrix(model.module, one)
        weight = RTN(bits=bits, group_size=None, search=16).solve(Dense(matrix), NO_STATISTICS)
        stored, count = stored + 8 * weight.cost().bytes, count + matrix.numel()
        anatomy.replace(model.module, one.path, weight)
    return _losses(model.module), stored / count


def _curvature(model: Model) -> dict[str, float]:
    """The Hessian score of each layer for its relative rounding error: K-FAC damage of the error at 3 bits."""
    work = Work(model=model, windows=vision.digits()[0][:256], maps=_inner(model))
    known, found = work.statistics({"second_moment", "gradient"}), {}
    for one in work.maps:
        matrix = anatomy.matrix(model.module, one)
        lost = RTN(bits=3, group_size=None, search=16).solve(Dense(matrix), NO_STATISTICS).dense().detach() - matrix
        found[one.name] = damage(lost, known[one.name]) / float(lost.square().sum() / matrix.square().sum())
    return found


def _compared(bits: int, draws: int) -> dict[str, Tensor]:
    """Losses by way of allocating the bytes of ``bits`` bits for all: (597,), means over transformers (and draws)."""
    found: dict[str, list[Tensor]] = {}
    for seed in _SEEDS:
        module = _trained(seed)
        model = _fresh(module)
        plain, spent = _uniform(module, bits)
        lever = RelevanceBits(average_bits=spent, least_bits=1, most_bits=8)
        work = Work(model=model, windows=vision.digits()[0][:128], maps=_inner(model))
        relevance = lever.scores(model, work)
        g = torch.Generator().manual_seed(seed)
        chance = [
            _allocated(module, lever, {name: float(torch.rand((), generator=g)) for name in relevance})
            for _ in range(draws)
        ]
        for name, losses in (
            ("relevance", _allocated(module, lever, relevance)),
            ("uniform", plain),
            ("error", _allocated(module, lever, dict.fromkeys(relevance, 1.0))),
            ("hessian", _allocated(module, lever, _curvature(model))),
            ("random", torch.stack(chance).mean(0)),
            ("float", _losses(module)),
        ):
            found.setdefault(name, []).append(losses)
    return {name: torch.stack(losses).mean(0) for name, losses in found.items()}


@claim(row=56, pace="slow", headline=_HEADLINE)
@tiny.one_thread()
def bits_that_follow_relevance_beat_uniform_and_random_bits(assets: Assets) -> Outcome:
    """The bytes of 2-bit weights inside blocks; 20 random scores a transformer, the Hessian score as rival."""
    table = _compared(2, draws=20)
    means = {name: float(losses.mean()) for name, losses in table.items()}
    over_uniform = stats.paired_difference(table["uniform"], table["relevance"])
    wider = {name: float(losses.mean()) for name, losses in _compared(3, draws=1).items()}
    over_random = stats.paired_difference(table["random"], table["relevance"])
    return Outcome(
        method=means["relevance"],
        baseline=means["uniform"],
        unit="nats on held-out digits at the bytes of 2-bit weights, three transformers",
        holds=over_uniform.high < 0 and over_random.high < 0,
        control=("random scores, 20 draws each", means["random"]),
        interval=(means["uniform"] + over_uniform.low, means["uniform"] + over_uniform.high),
        notes=(
            f"Hessian score {means['hessian']:.4f}, rounding error alone {means['error']:.4f}, "
            f"float {means['float']:.4f}; at the bytes of 3-bit weights relevance {wider['relevance']:.4f}, uniform "
            f"{wider['uniform']:.4f}, Hessian {wider['hessian']:.4f}, rounding error alone {wider['error']:.4f}"
        ),
    )
