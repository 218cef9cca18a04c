"""Packed keys and values: bytes to the last one, errors within half a step, and no change where nothing is packed."""

import math

import pytest
import torch
from families import VOCABULARY, build
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, sampled_from
from transformers import DynamicCache, GenerationConfig

import pennyweight
from pennyweight.errors import FormError, ModelError, OptionError
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.lever import make
from pennyweight.measure.cost import cost
from pennyweight.measure.decoding import greedy
from pennyweight.model import kv_cache as room
from pennyweight.model.kv_cache import KVCache, KVSetting, Packed, PackedLayer, kept_setting, kv_cache
from pennyweight.model.loading import load, of_module
from pennyweight.model.saving import save
from pennyweight.work import Work
from pennyweight.zoo.gpt import GPT, GPTConfig

SMALL = {"group_size": 4, "residual": 8}
STAIRS = KVSetting(bits=2, ladder=((8, 8), (16, 4)), **SMALL)


def states(tokens, *, heads=2, dim=8, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, tokens, dim, generator=g)


def ids(tokens, batch=1, seed=0):
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def fed(setting, keys, values, chunk):
    layer = PackedLayer(setting)
    for start in range(0, keys.shape[-2], chunk):
        layer.update(keys[..., start : start + chunk, :], values[..., start : start + chunk, :])
    return layer


def holds(layer):
    """All keys and values held, as they are read."""
    empty = layer.keys[..., :0, :]
    return layer.update(empty, layer.values[..., :0, :])


@given(
    bits=integers(2, 8), rows=integers(1, 3), columns=sampled_from([1, 4, 12]), share=sampled_from([1, 2, 4]),
    size=sampled_from([1e-6, 1.0, 1e3]), offset=sampled_from([-50.0, 0.0, 3.0]), seed=integers(0, 2**31),
)  # fmt: skip
def test_no_number_is_further_off_than_half_a_step(bits, rows, columns, share, size, offset, seed):
    share = share if columns % share == 0 else columns
    x = size * (torch.randn(1, 2, 3, rows, columns, generator=torch.Generator().manual_seed(seed)) + offset)
    found = Packed.nearest(x, bits, share)
    error = (found.values() - x).abs().unflatten(-1, (-1, share)).amax(-1)
    step = found.scale.float()
    assert bool((error <= 0.5 * step + 4e-7 * x.abs().max()).all())
    low, high = x.unflatten(-1, (-1, share)).aminmax(dim=-1)
    # the step is that of the range, but for ends rounded outward to float16
    spare = 2**-9 * (low.abs() + high.abs()) + 2**-22
    assert bool((step <= (high - low + spare) / (2**bits - 1) * (1 + 2**-9) + 2**-22).all())
    assert found.codes.nbytes == 6 * rows * math.ceil(columns * bits / 8)


def test_equal_numbers_and_zeros_come_back():
    for value in (0.0, 1.0, -2.5, 1 / 3):
        x = torch.full((1, 1, 1, 2, 4), value)
        torch.testing.assert_close(Packed.nearest(x, 2, 4).values(), x, rtol=2**-10, atol=0)


def test_what_float16_scales_cannot_hold_is_refused():
    for wrong in (float("nan"), float("inf"), 1e9):
        with pytest.raises(FormError, match=r"beyond float16 scales; keep this model's cache in 16 bits"):
            Packed.nearest(torch.tensor([1.0, wrong]).view(1, 1, 1, 1, 2), 4, 2)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_stepping_down_is_as_near_as_quantizing_at_once(seed, nested):
    x = torch.randn(1, 2, 3, 4, 32, generator=torch.Generator().manual_seed(seed))
    down = Packed.nearest(x, 8, 32).narrowed(4, nested=nested).narrowed(2, nested=nested)
    at_once = Packed.nearest(x, 2, 32)
    step = at_once.scale.float()
    assert bool(((down.values() - at_once.values()).abs().amax(-1, keepdim=True) <= 1.001 * step).all())
    # rounding twice is off by half of either step at most; short codes by half of their own, wider or not
    allowed = 0.5 * (1 / 255 + 1 / 15 + 1 / 3) * 1.01 if not nested else 0.5 * 64 / 255 * 1.01
    reach = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    assert bool(((down.values() - x).abs() <= allowed * reach).all())


def test_short_codes_do_not_depend_on_the_steps_between():
    x = torch.randn(1, 1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    first = Packed.nearest(x, 8, 16)
    direct, by_steps = first.narrowed(2, nested=True), first.narrowed(4, nested=True).narrowed(2, nested=True)
    assert torch.equal(direct.codes, by_steps.codes)
    torch.testing.assert_close(direct.values(), by_steps.values(), rtol=0, atol=4e-3)


@settings(max_examples=25)
@given(tokens=integers(1, 70), chunk=integers(1, 70), nested=booleans())
def test_what_is_held_depends_on_the_tokens_and_not_on_how_they_came(tokens, chunk, nested):
    setting = KVSetting(bits=2, ladder=((8, 8), (16, 4)), nested=nested, **SMALL)
    keys, values = states(tokens)
    by_one, by_chunk = fed(setting, keys, values, 1), fed(setting, keys, values, chunk)
    assert by_one.get_seq_length() == by_chunk.get_seq_length() == tokens
    for a, b in zip(by_one.tensors, by_chunk.tensors, strict=True):
        assert torch.equal(a, b)
    assert by_one.kept.bytes_at(tokens) == sum(tensor.nbytes for tensor in by_one.tensors)
    # by hand: 8 newest and what fills no group, then 2 groups of 8 bits, 4 of 4, the rest of 2
    packed = max(0, tokens - 8) // 4
    counts = [min(packed, 2), min(max(packed - 2, 0), 4), max(packed - 6, 0)]
    each = [2 * (8 * (math.ceil(4 * b / 8) + 4) + 4 * (b + 4)) for b in (8, 4, 2)]
    plain = tokens - 4 * packed
    assert by_one.kept.bytes_at(tokens) == sum(c * e for c, e in zip(counts, each, strict=True)) + plain * 2 * 16 * 4


def test_the_newest_tokens_are_as_they_came_and_older_ones_are_worse_with_age():
    keys, values = states(60, dim=16)
    layer = fed(STAIRS, keys, values, 7)
    got_keys, got_values = holds(layer)
    assert torch.equal(got_keys[..., -8:, :], keys[..., -8:, :])
    assert torch.equal(got_values[..., -8:, :], values[..., -8:, :])
    for got, true in ((got_keys, keys), (got_values, values)):
        error = (got - true).abs().amax((0, 1, 3))
        oldest, middle, young = error[:28].max(), error[28:44].max(), error[44:52].max()
        assert oldest > 3 * middle > 9 * young > 0


def test_sequences_are_chosen_repeated_and_cut():
    keys, values = states(30, batch=3)
    layer = fed(STAIRS, keys, values, 30)
    whole = holds(layer)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([5, 0]))
    for got, before in zip(holds(layer), whole, strict=True):
        assert torch.equal(got, before[[2, 0]])
    for removed in (3, 10, 17):
        layer = fed(STAIRS, keys, values, 30)
        layer.crop(-removed)
        assert layer.get_seq_length() == 30 - removed
        for got, before in zip(holds(layer), whole, strict=True):
            assert torch.equal(got, before[..., : 30 - removed, :])
    with pytest.raises(OptionError, match=r"crop\(2\); give minus"):
        layer.crop(2)
    with pytest.raises(OptionError, match=r"crop\(-90\) of 13 tokens"):
        layer.crop(-90)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.tensors


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "falcon-multi-query", "gemma2"])
def test_sixteen_bits_and_short_texts_change_nothing(family):
    module, prompt = build(family), ids(9, batch=2)
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = module.generate(prompt, past_key_values=DynamicCache(config=module.config), **options)
    for setting in (KVSetting(bits=16), KVSetting(bits=2, group_size=4, residual=20)):
        assert torch.equal(module.generate(prompt, past_key_values=kv_cache(module, setting), **options), plain)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_generates_through_it_and_its_bytes_are_those_it_holds(family):
    module = build(family)
    cache = kv_cache(module, STAIRS)
    module.generate(ids(20, batch=2), past_key_values=cache, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    seen = cache.get_seq_length()
    assert seen == 49  # the last token written was not read
    assert cache.nbytes == cache.kv_bytes(seen)
    plain = DynamicCache(config=module.config)
    module(ids(49, batch=2), past_key_values=plain)
    assert cache.nbytes < 0.5 * sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)


def test_beams_are_reordered():
    module = build("llama")
    cache = kv_cache(module, bits=8, group_size=4, residual=4)
    found = module.generate(ids(20), past_key_values=cache, num_beams=3, max_new_tokens=12, do_sample=False)
    same = module.generate(ids(20), num_beams=3, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, same)  # eight bits do not change the order of beams here


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reading_by_groups_is_reading_token_by_token(family):
    module, text = build(family), ids(45, batch=2)
    with torch.no_grad():
        by_one = room.read(module, text, cache=kv_cache(module, STAIRS), chunk=1).logits
        by_group = room.read(module, text, cache=kv_cache(module, STAIRS), chunk=4).logits
        exact = module(text).logits
    torch.testing.assert_close(by_group, by_one, rtol=1e-5, atol=1e-5)
    assert float((by_group - exact).abs().max()) > 1e-2  # and it is not the exact text that is read


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits behind the head
def test_a_kept_setting_is_saved_and_is_what_quality_speed_and_bytes_are_measured_with(family, tmp_path):
    model = of_module(build(family))
    windows = ids(40, batch=3)
    plain, dense = token_losses(model.module, windows), cost(model)
    options = {"bits": 2, "group_size": 4, "residual": 4, "ladder": ((8, 8),), "value_group": 4}
    make("infer.kv_cache", options).change(model, Work(model=model, windows=None, maps=()))
    setting = KVSetting(**options)
    assert kept_setting(model) == setting
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert kept_setting(again) == setting
    packed = token_losses(again.module, windows)
    assert float((packed - plain).abs().max()) > 1e-3
    assert torch.equal(packed, token_losses(model.module, windows))
    with torch.no_grad():
        through = room.read(model.module, windows, cache=pennyweight.kv_cache(again), chunk=1).logits[:, :-1]
    expected = -through.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    held = pennyweight.kv_cache(again)
    again.module(windows[:1], past_key_values=held)
    found = cost(again)
    sliding = sum(layer.window is not None for layer in found.cache)
    assert sliding == (1 if family == "gemma2" else 0)
    if not sliding:
        assert found.kv_bytes(40) == held.nbytes == held.kv_bytes(40)
        assert found.kv_bytes_per_token == (found.kv_bytes(4000) - found.kv_bytes(3600)) // 400
        assert 3 * found.kv_bytes_per_token < dense.kv_bytes_per_token
    run = greedy(again.module, windows[0, :30], tokens=8)
    wanted = again.module.generate(
        windows[:1, :30], past_key_values=pennyweight.kv_cache(again), max_new_tokens=8, min_new_tokens=8,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(run.ids, wanted[0, 30:])


def test_plain_transformers_carries_the_setting_along(tmp_path):
    module = build("llama")
    room.keep(module, STAIRS)
    module.generation_config.save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert getattr(found, room.KEY) == {
        "bits": 2, "group_size": 4, "residual": 8, "ladder": [[8, 8], [16, 4]],
    }  # fmt: skip
    module.generation_config = found
    assert kept_setting(module) == STAIRS
    assert module.generate(ids(5), max_new_tokens=2).shape == (1, 7)


def test_an_encoder_decoder_packs_what_its_decoder_wrote():
    module = build("t5")
    cache = kv_cache(module, bits=4, group_size=4, residual=4)
    module.generate(
        ids(9), past_key_values=cache, max_new_tokens=15, min_new_tokens=15, do_sample=False, decoder_start_token_id=0
    )
    own = cache.self_attention_cache
    assert isinstance(own, KVCache)
    assert own.nbytes == own.kv_bytes(15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"residual": 100}, "residual = 100 for groups of 32; give a multiple of 32, or 0"),
        ({"ladder": ((48, 8),)}, "every step takes a multiple of group_size 32"),
        ({"ladder": ((64, 4),)}, "the ladder goes 4 -> 4 bits; give fewer bits at each step, from 8"),
        ({"ladder": ((64, 16),)}, "the ladder goes 16 -> 4 bits; give fewer bits at each step, from 8"),
        ({"bits": 9}, "infer.kv_cache: bits = 9 is out of range; give between 2 and 8"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options, words):
    with pytest.raises(OptionError, match=words):
        make("infer.kv_cache", options)


def test_what_keeps_no_such_cache_is_refused():
    plain = GPT(GPTConfig(width=8, depth=1, num_heads=1, vocabulary=8, context=8))
    with pytest.raises(ModelError, match="GPT keeps no cache of transformers"):
        kv_cache(plain, bits=4)
    with pytest.raises(ModelError, match="no layer of a gemma3_text keeps all its keys and values"):
        kv_cache(build("gemma3"), bits=4)  # two layers, both of a sliding window
    with pytest.raises(ModelError, match="was saved without a setting; give one, such as bits=4"):
        kv_cache(build("llama"))
    with pytest.raises(OptionError, match="a setting and bits; give one or the other"):
        kv_cache(build("llama"), STAIRS, bits=4)
    with pytest.raises(OptionError, match="value_group 3 does not divide the 8 numbers of a value"):
        build("llama")(
            ids(9), past_key_values=kv_cache(build("llama"), bits=4, group_size=4, residual=0, value_group=3)
        )
    with pytest.raises(OptionError, match="unknown 'colour'; a setting has bits"):
        KVSetting.of({"bits": 4, "colour": 1})
    with pytest.raises(ModelError, match="empty, so that the shapes of keys and values are unknown"):
        kv_cache(build("llama"), bits=4).kv_bytes(10)
