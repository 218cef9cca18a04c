"""Row 122, staircase quantization: keys and values in few bits cost little, and the young ones deserve more of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.evaluate.forward import looking
from pennyweight.measure import stats
from pennyweight.model.kv_cache import Kept, KVSetting, kv_cache, read

_HEADLINE = "gradual degradation at reasonable quality and cost (abstract; no figure there)"
_LENGTH, _WINDOWS, _GROUP = 512, 6, 32
_FULL = KVSetting(bits=16)


def _setting(
    bits: int, *, residual: int = _GROUP, ladder: tuple[tuple[int, int], ...] = (), nested: bool = False
) -> KVSetting:
    return KVSetting(bits=bits, group_size=_GROUP, residual=residual, ladder=ladder, nested=nested)


def _share(assets: Assets, setting: KVSetting) -> float:
    """Bytes of the cache over those of a 16-bit one, on average over the places of a window."""
    config: Any = assets.smollm2().model.config

    def held(one: KVSetting) -> int:
        kept = Kept(one, config.num_key_value_heads, config.head_dim, config.head_dim, itemsize=2)
        return sum(kept.bytes_at(tokens) for tokens in range(1, _LENGTH + 1))

    return held(setting) / held(_FULL)


@lru_cache(maxsize=1)
def _windows(assets: Assets) -> Tensor:
    return assets.smollm2().windows("wiki", part="heldout", length=_LENGTH + 1, count=_WINDOWS)


def _read(assets: Assets, cache: Cache) -> Tensor:
    """Nats of every token when the text is read as it would be written: (windows, tokens)."""
    module, windows = assets.smollm2().model.module, _windows(assets)
    with looking(module):
        logits = read(module, windows[:, :-1], cache=cache, chunk=_GROUP).logits
    losses: Tensor = logits.logsumexp(-1) - logits.gather(-1, windows[:, 1:, None])[..., 0]
    return losses


@lru_cache(maxsize=16)
def _losses(assets: Assets, setting: KVSetting) -> Tensor:
    cache = kv_cache(assets.smollm2().model, setting)
    assert isinstance(cache, Cache)
    return _read(assets, cache)


def _dearer(assets: Assets, setting: KVSetting) -> stats.Interval:
    """Nats a token more than with the full cache."""
    return stats.paired_difference(_losses(assets, _FULL).mean(1), _losses(assets, setting).mean(1))


@claim(row=122, pace="slow", headline="2-bit keys and values, 2.6x less memory, similar quality (KIVI, abstract)")
def four_bits_of_keys_and_values_cost_a_hundredth_of_a_nat(assets: Assets) -> Outcome:
    """SmolLM2 on held-out text, token by token; the control drops the oldest tokens until the bytes are the same."""
    found = {bits: _dearer(assets, _setting(bits)) for bits in (8, 4, 2)}
    shares = {bits: _share(assets, _setting(bits)) for bits in found}
    config: Any = assets.smollm2().model.config
    # a window of W keeps W - 1 between calls; its mean over the places of the text is to be no smaller
    window = next(
        w
        for w in range(1, _LENGTH)
        if sum(min(t, w) for t in range(1, _LENGTH + 1)) >= shares[4] * _LENGTH * (_LENGTH + 1) / 2
    )
    newest = Cache(
        layers=[DynamicSlidingWindowLayer(sliding_window=window + 1) for _ in range(config.num_hidden_layers)]
    )
    full = _losses(assets, _FULL).mean(1)
    control = stats.paired_difference(full, _read(assets, newest).mean(1))
    return Outcome(
        method=found[4].value,
        baseline=0.0,
        unit="nats a token above a 16-bit cache",
        holds=found[8].high < 0.002
        and found[4].high < 0.02
        and found[2].high < 0.4
        and found[8].value < found[4].value < found[2].value < control.low,
        control=(f"the newest {window} tokens in 16 bits: the bytes of 4 bits", control.value),
        interval=(found[4].low, found[4].high),
        notes="; ".join(
            f"{bits} bits: {one.value:+.4f} nats at {shares[bits]:.0%} of the bytes" for bits, one in found.items()
        )
        + f"; groups of {_GROUP}, {_GROUP} newest tokens or more in 16 bits; texts of {_LENGTH} tokens",
    )


@claim(row=122, pace="slow", headline=_HEADLINE)
def bits_for_the_young_beat_a_longer_full_window(assets: Assets) -> Outcome:
    """4 bits for the next 128 tokens and 2 for the rest, against 2 bits and twice the tokens in 16 bits."""
    stairs, plain = _setting(2, ladder=((128, 4),)), _setting(2, residual=2 * _GROUP)
    three = _setting(3)
    steep = {nested: _setting(2, ladder=((64, 4), (128, 3)), nested=nested) for nested in (False, True)}
    found = {one: _dearer(assets, one) for one in (stairs, plain, three, *steep.values())}
    gain = stats.paired_difference(_losses(assets, plain).mean(1), _losses(assets, stairs).mean(1))
    shares = {one: _share(assets, one) for one in found}
    return Outcome(
        method=found[stairs].value,
        baseline=found[plain].value,
        unit="nats a token above a 16-bit cache",
        holds=shares[stairs] <= shares[plain] and gain.high < -0.01,
        control=(f"3 bits for all, {shares[three]:.1%} of the bytes", found[three].value),
        interval=(found[stairs].low, found[stairs].high),
        notes=(
            f"{shares[stairs]:.1%} of the bytes of a 16-bit cache against {shares[plain]:.1%}; the control is the "
            "better purchase where its width is to be had: two bits are one too few here; three steps, 4, 3 and 2, "
            f"at {shares[steep[True]]:.1%}: {found[steep[False]].value:.3f} quantized again at each, "
            f"{found[steep[True]].value:.3f} with codes cut short"
        ),
    )
