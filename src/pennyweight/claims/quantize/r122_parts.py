"""Row 122, four smaller ideas: elite draws, cuts by likelihood, positions that decay, attention to some blocks."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.data import segmentation
from pennyweight.data.segmentation import Pieces
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.measure import stats
from pennyweight.plan.cem import cross_entropy
from pennyweight.plan.choose import Offer, Problem, choose
from pennyweight.statistics import NO_STATISTICS
from pennyweight.train import byte_windows
from pennyweight.train.schedules import wsd
from pennyweight.weights import Dense
from pennyweight.zoo.block_attention import allowed_blocks, block_attention, by_distance, by_mass, expected_share
from pennyweight.zoo.gpt import GPT, GPTConfig
from pennyweight.zoo.positions import Distance, Series

_HEADLINE = "none quantitative (abstract)"


@claim(row=122, pace="quick", headline=_HEADLINE)
def elite_draws_come_near_the_optimum(assets: Assets) -> Outcome:
    """Bits for MiniLM's 36 matrices under a budget of bytes: 8,000 settings drawn, out of 5^36."""
    offers: dict[str, list[Offer]] = {}
    minilm = assets.minilm()
    for one, matrix in zip(minilm.maps("encoder"), minilm.matrices("encoder"), strict=True):
        offers[one.name] = []
        for bits in (2, 3, 4, 5, 6):
            weight = RTN(bits=bits, group_size=64).solve(Dense(matrix), NO_STATISTICS)
            lost = float((weight.dense().detach() - matrix).square().sum())
            offers[one.name].append(Offer(f"{bits} bits", {"bytes": weight.cost().bytes}, lost))
    problem = Problem(offers)
    three, four = (problem.total((place,) * len(offers), "bytes") for place in (1, 2))
    limit = (three + four) // 2

    def loss(setting: dict[str, Any]) -> float:
        pick = tuple(setting.values())
        return problem.damage(pick) * (1 + 100 * max(0, problem.total(pick, "bytes") / limit - 1))

    space = {name: range(len(each)) for name, each in offers.items()}
    found = cross_entropy(space, loss, evaluations=8000, samples=400, elite=0.05)
    assert problem.total(tuple(found.best.values()), "bytes") <= limit
    exact = choose(problem, {"bytes": limit}).damage
    draw = random.Random(0)
    drawn = [tuple(draw.randrange(5) for _ in space) for _ in range(found.evaluations)]
    blind = min(problem.damage(pick) for pick in drawn if problem.total(pick, "bytes") <= limit)
    uniform = problem.damage((1,) * len(offers))
    return Outcome(
        method=found.loss / exact,
        baseline=blind / exact,
        unit="squared rounding error / the least possible (integer program)",
        holds=found.loss < 1.05 * exact and found.loss < 0.9 * blind and found.loss < uniform,
        control=("3 bits everywhere, the most that fit", uniform / exact),
        notes=f"{found.evaluations} evaluations; the baseline draws as many blindly, and counts what fits",
    )


def _words(documents: list[str]) -> Counter[str]:
    return Counter(re.findall("[a-z]+", " ".join(documents).lower()))


def _by_use(pieces: Pieces, words: dict[str, int], cut: Callable[[str], list[str]]) -> Pieces:
    """The same pieces with the shares that ``cut`` uses them in; a trace for those it never does."""
    used = Counter(dict.fromkeys(pieces.logs, 0.01))
    for word, count in words.items():
        for piece in cut(word):
            used[piece] += count
    return Pieces({piece: math.log(count / used.total()) for piece, count in used.items()})


@claim(row=122, pace="quick", headline=_HEADLINE)
def cuts_by_likelihood_take_fewer_bits(assets: Assets) -> Outcome:
    """600 pieces for the words of Wikipedia texts; every way to cut has the probabilities of its own use."""
    text = assets.text("wiki")
    seen = dict(_words(text.calibration).most_common(2500))
    fresh = {word: count for word, count in _words(text.heldout).items() if set(word) <= set("".join(seen))}
    pieces = segmentation.fit(seen, size=600)
    best, greedy = (
        segmentation.bits_per_character(_by_use(pieces, seen, getattr(pieces, cut)), fresh, cut)
        for cut in ("segment", "longest_match")
    )
    # the control: pieces that were merged by frequency, cut as their merges say
    rival = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=sorted(set("".join(seen))))
    rival.train_from_iterator((word for word, count in seen.items() for _ in range(count)), trainer)
    merged = _by_use(Pieces(dict.fromkeys(rival.get_vocab(), -1.0)), seen, lambda word: rival.encode(word).tokens)
    characters = sum(len(word) * count for word, count in fresh.items())
    costs = sum(merged.nats(rival.encode(word).tokens) * count for word, count in fresh.items())
    pairs = costs / math.log(2) / characters
    return Outcome(
        method=best,
        baseline=greedy,
        unit="bits a character of held-out words",
        holds=best < 0.99 * greedy and best < pairs,
        control=("byte-pair encoding, as many pieces", pairs),
        notes=f"{len(fresh)} different words of {characters} characters",
    )


_TRAINED, _LONG, _STEPS, _SEEDS = 33, 129, 600, (0, 1)


@tiny.one_thread()
def _far(distance: Distance, series: Series, seed: int) -> tuple[float, float]:
    """Held-out nats a byte at the length of training, and at four times that."""
    config = GPTConfig(
        width=48, depth=2, num_heads=4, vocabulary=tiny.VOCABULARY, context=_LONG, distance=distance, slopes=series
    )
    module = GPT(config, generator=torch.Generator().manual_seed(seed))
    tiny.trainer(module, wsd(_STEPS, _STEPS // 20, 0.3, "linear", peak=6e-3), batch=32, seed=seed).run(_STEPS)
    held = byte_windows("stdlib-code", part="heldout", length=_LONG, count=96).clamp_(max=tiny.VOCABULARY - 1)
    return float(tiny.held_out_losses(module).mean()), float(token_losses(module, held, batch=32)[:, _TRAINED:].mean())


@claim(row=122, pace="slow", headline=_HEADLINE)
def harmonic_slopes_read_texts_longer_than_those_trained_on(assets: Assets) -> Outcome:
    """Tiny GPTs trained on 32 bytes at a time read 128; two seeds each."""
    kinds: dict[str, tuple[Distance, Series]] = {
        "the turn alone": ("none", "harmonic"),
        "harmonic slopes": ("linear", "harmonic"),
        "ALiBi's slopes": ("linear", "geometric"),
        "harmonic distances": ("harmonic", "harmonic"),
    }
    found = {name: torch.tensor([_far(*kind, seed) for seed in _SEEDS]) for name, kind in kinds.items()}
    near, far = ({name: float(table[:, column].mean()) for name, table in found.items()} for column in (0, 1))
    alone, both, alibi, other = kinds
    every = bool((found[both][:, 1] < found[alone][:, 1] - 0.1).all())
    return Outcome(
        method=far[both],
        baseline=far[alone],
        unit="held-out nats a byte beyond the trained length",
        holds=every and near[both] < near[alone] + 0.01 and far[both] < far[alibi],
        control=("the turn with ALiBi's slopes", far[alibi]),
        notes=f"the series in the distances instead: {far[other]:.3f}; at the trained length: "
        + ", ".join(f"{name} {value:.3f}" for name, value in near.items()),
    )


_BLOCK, _BLOCKS, _TOKENS = 32, 4, 512


@contextmanager
def _attending(module: nn.Module, choose_blocks: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """For a while the attention of a ``transformers`` model sees the chosen blocks only."""

    def attend(
        layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        keep = choose_blocks(query, key)
        return block_attention(query, key, value, keep, block=_BLOCK, scale=scaling).output.transpose(1, 2), None

    config: Any = module.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["pennyweight_blocks"] = attend
    module.set_attn_implementation("pennyweight_blocks")  # type: ignore[operator]
    try:
        yield
    finally:
        module.set_attn_implementation(before)  # type: ignore[operator]
        del ALL_ATTENTION_FUNCTIONS["pennyweight_blocks"]  # type: ignore[no-untyped-call]


def _nearest(count: int) -> Tensor:
    apart = torch.arange(count)[:, None] - torch.arange(count)
    return (apart >= 0) & (apart < _BLOCKS)


@claim(row=122, pace="slow", headline=_HEADLINE)
def blocks_by_mass_beat_blocks_by_chance(assets: Assets) -> Outcome:
    """SmolLM2 attends to 4 of up to 16 blocks of 32 keys; by chance they are as many, the nearer the likelier."""
    smollm2 = assets.smollm2()
    module = smollm2.model.module
    windows = smollm2.windows("wiki", part="heldout", length=_TOKENS, count=2)
    count = _TOKENS // _BLOCK
    everything = allowed_blocks(_TOKENS, _TOKENS, _BLOCK)
    share = float(_nearest(count).sum() / everything.sum())

    def law(rate: float) -> Tensor:
        return torch.exp(-rate * torch.arange(count))

    # the decay of the probability that makes as many pairs take part
    low, high = 0.0, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        above = expected_share(_TOKENS, _TOKENS, _BLOCK, law(middle)) > share
        low, high = (middle, high) if above else (low, middle)
    draws = torch.Generator().manual_seed(0)
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        # a head may also be tried on one token
        "all": lambda query, key: allowed_blocks(query.shape[2], key.shape[2], _BLOCK),
        "mass": lambda query, key: by_mass(query, key, block=_BLOCK, count=_BLOCKS),
        "chance": lambda query, key: by_distance(
            query.shape[2],
            key.shape[2],
            _BLOCK,
            law(high)[: -(-key.shape[2] // _BLOCK)],
            heads=query.shape[1],
            generator=draws,
        ),
        "nearest": lambda query, key: _nearest(-(-key.shape[2] // _BLOCK)),
    }
    plain = token_losses(module, windows, batch=1)
    losses = {}
    for name, rule in rules.items():
        with _attending(module, rule):
            losses[name] = token_losses(module, windows, batch=1)
    exact = float((losses["all"] - plain).abs().max())
    more = {name: float((loss - plain).mean()) for name, loss in losses.items()}
    gain = stats.paired_difference(losses["chance"].mean(1), losses["mass"].mean(1))
    return Outcome(
        method=more["mass"],
        baseline=more["chance"],
        unit="nats a token above full attention",
        holds=exact < 1e-3 and gain.high < 0 and more["mass"] < 0.5 * more["chance"] and more["mass"] < more["nearest"],
        control=("the nearest blocks, as many", more["nearest"]),
        notes=f"{share:.0%} of the pairs of blocks; with all of them no token's loss moves by more than {exact:.1e}",
    )
