"""Activations round as torch's own fake quantization does, are saved with their layer, and are calibrated on data."""

import copy
import json

import pytest
import torch
from families import build, inputs, run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from pennyweight.errors import DataError, FormError, ModelError, OptionError, ShapeError, UserError
from pennyweight.lever import make
from pennyweight.measure.cost import cost
from pennyweight.model import anatomy, compact, file_bytes, load, parameters, restore, save, saved_bytes
from pennyweight.model.experts import split_experts
from pennyweight.model.loading import of_module
from pennyweight.weights import Activation, CompactConv1d, CompactConv2d, CompactLinear, Dense, Quantized, stored_bytes
from pennyweight.work import Work

HERE = ("llama-tied", "gpt2", "bert", "mixtral", "plain-conv")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def applied(family: str, *, only: object = None, windows: object = None, before: object = None, **options: object):
    """A tiny model of ``family`` with the lever applied; ``before`` changes the module first."""
    module = build(family)
    if before is not None:
        before(module)
    model = of_module(module)
    maps = tuple(found for found in model.anatomy.layers() if only is None or only(found))
    given_ = inputs(family) if windows is None else windows
    if family.startswith("plain"):
        given_ = given_["pixel_values"]
    make("quantize.activations", options).change(model, Work(model=model, windows=given_, maps=maps))
    return model


# --- the grid


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fixed_ranges_round_and_differentiate_as_torch_does(granularity, bits, symmetric):
    x = (3 * normal(0, 4, 7, 6)).requires_grad_()
    low, high = (torch.tensor([-1.5]), torch.tensor([2.0])) if granularity == "tensor" else (-normal(1, 6).abs(), None)
    high = normal(2, 6).abs() if high is None else high
    rounds = Activation.from_range(low, high, bits=bits, symmetric=symmetric, granularity=granularity)
    half = 2 ** (bits - 1) - 1
    zero = torch.zeros_like(rounds.scale, dtype=torch.int32) if symmetric else rounds.zero
    ends = (-half, half) if symmetric else (0, 2**bits - 1)
    expected = torch.fake_quantize_per_channel_affine(x, rounds.scale.expand(6), zero.expand(6), 2, *ends)
    found = rounds(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        torch.autograd.grad(found.sum(), x, retain_graph=True)[0], torch.autograd.grad(expected.sum(), x)[0]
    )
    reached = rounds.scale * (ends[1] - (0 if symmetric else zero))
    torch.testing.assert_close(
        reached, torch.maximum(high, -low) if symmetric else high, rtol=0, atol=rounds.scale.max()
    )


def test_a_scale_that_is_a_parameter_gets_the_gradient_of_lsq():
    x, upstream = 2 * normal(0, 64), normal(1, 64)
    rounds = Activation(
        symmetric=False, granularity="tensor", bits=4, scale=nn.Parameter(torch.tensor([0.2])),
        zero=torch.tensor([7], dtype=torch.int32),
    )  # fmt: skip
    rounds(x).backward(upstream)
    level = x / 0.2 + 7
    inside = (level.round() >= 0) & (level.round() <= 15)
    by_step = torch.where(inside, level.round() - level, level.clamp(0, 15) - 7)  # arXiv:1902.08153, eq. 3
    torch.testing.assert_close(rounds.scale.grad, (by_step * upstream).sum()[None], rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 9),
    symmetric=st.booleans(),
    shape=st.sampled_from([(5,), (3, 4), (2, 3, 8), (1, 1)]),
)
def test_each_token_has_its_own_range_and_errs_by_half_a_step(seed, bits, symmetric, shape):
    x = normal(seed, *shape) * torch.exp(3 * normal(seed + 1, *shape[:-1], 1)) + normal(seed + 2, *shape[:-1], 1)
    rounds = Activation(bits=bits, symmetric=symmetric)
    found = rounds(x)
    for row, out in zip(x.reshape(-1, shape[-1]), found.reshape(-1, shape[-1]), strict=True):
        span = 2 * row.abs().max() / (2**bits - 2) if symmetric else (row.max().clamp_min(0) - row.min().clamp_max(0))
        step = span if symmetric else span / (2**bits - 1)
        # an end may lie half a step outside, as the zero point is whole
        assert float((out - row).abs().max()) <= float(step) * (0.501 if symmetric else 1.001) + 1e-30
        assert len(out.unique()) <= 2**bits
        torch.testing.assert_close(rounds(row), out)  # whatever else is in the batch


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel"])
def test_dynamic_ranges_are_those_of_the_values_they_share(granularity):
    x = normal(0, 2, 5, 6)
    shared = {"token": (-1,), "tensor": (0, 1, 2), "channel": (0, 1)}[granularity]
    step = x.abs().amax(shared, keepdim=True) / 127
    expected = torch.round(x / step) * step
    torch.testing.assert_close(Activation(symmetric=True, granularity=granularity)(x), expected)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_eight_bit_floats_are_those_of_torch(format):
    native = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    x = normal(0, 200, 50) * torch.exp(4 * normal(1, 200, 1))
    largest = torch.finfo(native).max
    scale = x.abs().amax(-1, keepdim=True) / largest
    expected = (x / scale).clamp(-largest, largest).to(native).float() * scale
    torch.testing.assert_close(Activation(format=format)(x), expected, rtol=0, atol=0)
    fixed = Activation(format=format, granularity="tensor", scale=torch.tensor([0.5]))
    assert fixed(torch.tensor([1e9, -1e9])).tolist() == [largest / 2, -largest / 2]


def test_four_bit_floats():
    values = torch.tensor([6.0, 4.9, 2.5, 1.25, 0.75, 0.25, 0.26, 0.0, -3.4])
    assert Activation(bits=4, format="e2m1")(values).tolist() == [6, 4, 2, 1, 1, 0, 0.5, 0, -3]
    assert Activation(bits=4, format="e3m0")(torch.tensor([16.0, 9, 13, 0.1, -0.3])).tolist() == [16, 8, 16, 0, -0.25]


def test_floats_let_gradients_through_where_nothing_was_clipped():
    x = torch.tensor([0.3, 700.0, -1.0], requires_grad=True)
    Activation(format="e4m3", granularity="tensor", scale=torch.ones(1))(x).sum().backward()
    assert x.grad.tolist() == [1, 0, 1]


def test_zero_stays_zero_and_rows_of_zeros_come_back():
    for rounds in (
        Activation(),
        Activation(symmetric=True),
        Activation(format="e5m2"),
        Activation(granularity="channel"),
    ):
        assert rounds(torch.zeros(2, 3)).tolist() == [[0] * 3] * 2
        x = normal(0, 6, 8)
        x[:, 2] = 0
        assert rounds(x)[:, 2].abs().max() == 0
        assert rounds(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    x = normal(0, 3, 8).to(dtype)
    found = Activation()(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), Activation()(x.double()), rtol=1e-2, atol=1e-3)


def test_the_first_token_is_kept_and_has_no_say_in_the_range():
    x = normal(0, 2, 5, 6)
    x[:, 0] *= 1000
    for granularity in ("token", "tensor", "channel"):
        kept = Activation(granularity=granularity, keep_first_token=True)
        found = kept(x)
        assert torch.equal(found[:, 0], x[:, 0])
        assert torch.equal(found[:, 1:], Activation(granularity=granularity)(x[:, 1:]))
        assert torch.equal(kept(x[:, 1:2]), Activation(granularity=granularity)(x[:, 1:2]))  # a step of decoding
    with pytest.raises(ShapeError, match=r"an input \(6,\) has no positions"):
        Activation(keep_first_token=True)(x[0, 0])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 1}, OptionError, "bits = 1; give 2 to 16"),
        ({"format": "e3m4"}, OptionError, "unknown format 'e3m4'; give integer, e4m3"),
        ({"format": "e2m1"}, OptionError, "bits = 8 for format e2m1; give bits = 4"),
        ({"granularity": "row"}, OptionError, "unknown granularity 'row'"),
        ({"scale": torch.ones(1), "zero": torch.zeros(1)}, OptionError, "no token has a fixed range"),
        ({"granularity": "tensor", "scale": torch.ones(1)}, OptionError, "zero is missing for a scale"),
        ({"granularity": "tensor", "zero": torch.ones(1)}, OptionError, "zero is given for no scale"),
        (
            {"granularity": "tensor", "symmetric": True, "scale": torch.ones(3)},
            ShapeError,
            r"scale is \(3,\) for a tensor; give \(1,\)",
        ),
        ({"granularity": "tensor", "symmetric": True, "scale": torch.zeros(1)}, FormError, "not finite and positive"),
    ],
)
def test_what_does_not_go_together_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        Activation(**options)


def test_ranges_of_other_features_are_refused():
    with pytest.raises(ShapeError, match=r"3 ranges for an input \(2, 4\)"):
        Activation(granularity="channel", symmetric=True, scale=torch.ones(3))(torch.ones(2, 4))


# --- in layers


def test_layers_round_what_they_read():
    x, weight = normal(0, 2, 5, 6), Dense(normal(1, 4, 6))
    assert torch.equal(CompactLinear(weight, activation=Activation(bits=3))(x), weight(Activation(bits=3)(x)))
    for dimensions, kind, plain in ((1, CompactConv1d, nn.Conv1d), (2, CompactConv2d, nn.Conv2d)):
        layer = plain(6, 4, 3, padding=1)
        compact_ = kind.of(layer, Dense(layer.weight.detach().flatten(1)))
        compact_.activation = Activation(bits=3)
        image = normal(2, 2, 6, *(5,) * dimensions)
        rounded = Activation(bits=3)(image.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(compact_(image), layer(rounded))
    with pytest.raises(OptionError, match="the positions of a convolution are no tokens"):
        CompactConv1d(Dense(torch.ones(2, 6)), kernel_size=3, activation=Activation(keep_first_token=True))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", HERE)
def test_saved_and_loaded_it_computes_the_same(family, static, tmp_path):
    options = {"granularity": "channel", "static": True} if static else {"format": "e4m3"}
    only = None if family != "mixtral" else lambda found: not found.role.startswith("moe.experts")
    model = applied(family, only=only, before=split_experts if family == "mixtral" else None, **options)
    before = run(model.module, family)
    assert not torch.equal(before, run(build(family), family))
    saved = save(model, tmp_path / "out")
    assert saved.bytes == saved_bytes(tmp_path / "out") == file_bytes(model)
    again = restore(build(family), tmp_path / "out") if family.startswith("plain") else load(tmp_path / "out")
    assert torch.equal(run(again.module, family), before)
    held, there = compact.activations(model.module), compact.activations(again.module)
    assert held
    assert list(held) == list(there)
    for path, one in held.items():
        assert one.settings() == there[path].settings()
        assert one.state_dict().keys() == there[path].state_dict().keys()
    assert compact.layout_of(again.module) == compact.layout_of(model.module)
    assert parameters(again.module) == parameters(build(family))
    assert cost(model, inputs=_given(family)).bytes == stored_bytes(model.module)


def _given(family):
    return inputs(family)["pixel_values"] if family.startswith("plain") else inputs(family)


def test_transformers_opens_it_and_old_files_have_none(tmp_path):
    model = applied("llama-tied", granularity="tensor", static=True)
    save(model, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(run(opened, "llama-tied"), run(model.module, "llama-tied"))
    for layer in compact.activations(model.module):
        model.module.get_submodule(layer).activation = None
    save(model, tmp_path / "plain")
    text = json.loads((tmp_path / "plain" / "weights.json").read_text())
    assert "activations" not in text
    assert not compact.activations(load(tmp_path / "plain").module)


def test_it_costs_what_its_ranges_take(tmp_path):
    plain, ranged = (
        applied("llama", only=lambda found: found.role == "ffn.down", granularity="channel", static=static, bits=8)
        for static in (False, True)
    )
    layers = 2 * 48  # two blocks, 48 features each
    assert cost(ranged).bytes - cost(plain).bytes == layers * (4 + 4)  # a float32 scale and an int32 zero
    assert cost(ranged).params_total - cost(plain).params_total == 2 * layers
    row, without = (next(one for one in cost(model).layers if one.role == "ffn.down") for model in (ranged, plain))
    assert row.bytes - without.bytes == 48 * 8


def test_layers_that_read_the_same_share_one_range_stored_once(tmp_path):
    model = applied("llama", only=lambda found: found.role.startswith("attention."), granularity="channel", static=True)
    block = model.module.model.layers[0].self_attn
    assert block.q_proj.activation is block.k_proj.activation is block.v_proj.activation
    assert cost(model).bytes - cost(of_module(build("llama"))).bytes == 2 * 2 * 32 * 8
    save(model, tmp_path / "out")
    again = load(tmp_path / "out").module.model.layers[0].self_attn
    assert again.q_proj.activation.scale.data_ptr() == again.v_proj.activation.scale.data_ptr()


def test_damaged_and_dense_files_are_refused(tmp_path):
    model = applied("llama", granularity="tensor", static=True)
    with pytest.raises(ModelError, match=r"layers round their inputs .* save without dense"):
        save(model, tmp_path / "dense", dense=True)
    save(model, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "weights.json").read_text())
    for change, words in (({"granularity": "token"}, "no token has a fixed range"), ({"wrong": 1}, "cannot be built")):
        damaged = {**text, "activations": [{**group, **change} for group in text["activations"]]}
        (tmp_path / "out" / "weights.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=words):
            load(tmp_path / "out")
    (tmp_path / "out" / "weights.json").write_text(
        json.dumps({**text, "activations": [{**text["activations"][0], "layers": ["elsewhere"]}]})
    )
    with pytest.raises(ModelError, match="activations or products of a layer that is not there"):
        load(tmp_path / "out")


def test_gradients_reach_the_weights_behind_it():
    layer = CompactLinear(Dense(normal(0, 4, 6)), activation=Activation(bits=4))
    x = normal(1, 3, 6)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.matrix.grad, Activation(bits=4)(x).sum(0).expand(4, 6))


# --- the lever


def test_every_map_but_tables_rounds_its_input():
    model = applied("bert")
    rounding = compact.activations(model.module)
    wanted = {found.path for found in model.anatomy.layers() if found.kind != "embedding"}
    assert set(rounding) == wanted
    assert not any(one.static for one in rounding.values())
    inner = build("bert")
    assert len(wanted) == sum(isinstance(layer, nn.Linear) for layer in inner.modules()) - int(model.anatomy.tied)


def test_weights_may_be_rounded_before_and_after():
    rounded = {"bits": 4, "group_size": 16}

    def weights(module):
        for found in anatomy.of(module).layers():
            if found.kind == "linear":
                matrix = anatomy.matrix(module, found)
                anatomy.replace(module, found.path, make("quantize.rtn", rounded).solve(Dense(matrix), None))

    first = applied("llama", before=weights)
    second = applied("llama")
    weights(second.module)
    assert torch.equal(run(first.module, "llama"), run(second.module, "llama"))
    assert isinstance(second.module.model.layers[0].mlp.up_proj.weight, Quantized)


def seen(family: str, path: str, **given_: torch.Tensor) -> torch.Tensor:
    """What the layer at ``path`` of an untouched model reads."""
    module, kept = build(family), []
    module.get_submodule(path).register_forward_pre_hook(lambda _, x: kept.append(x[0].detach()))
    with torch.no_grad():
        module(**given_)
    return kept[0]


def test_static_ranges_are_those_of_the_data():
    path, given_ = "model.layers.1.mlp.down_proj", inputs("llama")
    x = seen("llama", path, **given_)
    for granularity, dims in (("tensor", (0, 1, 2)), ("channel", (0, 1))):
        model = applied("llama", granularity=granularity, static=True)
        found = model.module.get_submodule(path).activation
        low, high = x.amin(dims).clamp_max(0).reshape(-1), x.amax(dims).clamp_min(0).reshape(-1)
        torch.testing.assert_close(found.scale, (high - low) / 255)
        assert torch.equal(found.zero, (-low / found.scale).round().int())
    model = applied("llama", granularity="tensor", static=True, range="mean", symmetric=True)
    ends = torch.maximum(-x.amin((1, 2)).mean(), x.amax((1, 2)).mean())
    torch.testing.assert_close(model.module.get_submodule(path).activation.scale, ends[None] / 127)


def test_padding_and_first_tokens_have_no_say():
    path, given_ = "model.layers.1.mlp.down_proj", inputs("llama")
    mask = torch.ones_like(given_["input_ids"])
    mask[:, -7:] = 0
    x = seen("llama", path, **given_, attention_mask=mask)
    options = {"granularity": "channel", "static": True, "format": "e5m2"}
    found = applied("llama", windows=given_ | {"attention_mask": mask}, **options)
    scale = found.module.get_submodule(path).activation.scale
    torch.testing.assert_close(scale, x[:, :-7].abs().amax((0, 1)) / 57344)
    found = applied("llama", windows=given_ | {"attention_mask": mask}, keep_first_token=True, **options)
    scale = found.module.get_submodule(path).activation.scale
    torch.testing.assert_close(scale, x[:, 1:-7].abs().amax((0, 1)) / 57344)


@pytest.mark.parametrize("method", ["percentile", "mse", "kl"])
def test_clipped_ranges_lie_inside_the_extremes(method):
    path = "model.layers.1.mlp.down_proj"
    whole = applied("llama", granularity="tensor", static=True)
    options = {"range": method, **({"percentile": 95.0} if method == "percentile" else {})}
    clipped = applied("llama", granularity="tensor", static=True, bits=3 if method == "mse" else 8, **options)
    steps = 7 if method == "mse" else 255
    spans = [model.module.get_submodule(path).activation.scale * s for model, s in ((whole, 255), (clipped, steps))]
    assert float(spans[1]) < 0.95 * float(spans[0])
    if method == "percentile":
        x = seen("llama", path, **inputs("llama"))  # 48 rows: all of them are sampled
        low, high = torch.quantile(x, 0.025), torch.quantile(x, 0.975)
        torch.testing.assert_close(spans[1], (high - low)[None], rtol=1e-4, atol=1e-6)


def test_samples_are_a_fair_draw():
    from pennyweight.levers.quantize.activations import Observer

    observer = Observer(samples=400)
    for index in range(20):
        observer.see(torch.full((1, 100, 1), float(index)))
    share = torch.bincount(observer.rows()[:, 0].long(), minlength=20)
    assert observer.rows().shape == (400, 1)
    assert int(share.min()) >= 8  # 20 on average
    assert int(share.max()) <= 35


def test_the_model_is_left_in_its_mode_and_without_hooks():
    module = build("llama").train()
    model = of_module(build("llama"))
    model.module.train()
    work = Work(model=model, windows=inputs("llama"), maps=model.anatomy.layers())
    make("quantize.activations", {"granularity": "tensor", "static": True}).change(model, work)
    assert model.module.training == module.training
    assert not any(layer._forward_pre_hooks for layer in model.module.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "e2m1"}, "bits = 8 for format e2m1"),
        ({"format": "e4m3", "symmetric": True}, "symmetric has no effect on format e4m3"),
        ({"static": True}, "static ranges of tokens do not exist"),
        ({"range": "mse"}, "range = 'mse' has no effect without static = true"),
        (
            {"range": "kl", "static": True, "granularity": "tensor", "format": "e4m3"},
            "range = 'kl' is defined on integers",
        ),
    ],
)
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        make("quantize.activations", options)


def test_what_cannot_be_done_is_said():
    with pytest.raises(OptionError, match="holds no linear map or convolution"):
        applied("llama", only=lambda found: found.kind == "embedding")
    with pytest.raises(OptionError, match="whose inputs are not a sequence of tokens"):
        applied("mixtral", before=split_experts, keep_first_token=True)
    with pytest.raises(OptionError, match="whose inputs are not a sequence of tokens"):
        applied("plain-conv", keep_first_token=True)
    model = of_module(build("llama"))
    work = Work(model=model, windows=None, maps=model.anatomy.layers())
    with pytest.raises(DataError, match="needs calibration data"):
        make("quantize.activations", {"static": True, "granularity": "tensor"}).change(model, work)


def test_models_that_differ_in_nothing_but_rounding_have_other_fingerprints():
    from pennyweight.finish import Solved

    plain, rounded = of_module(build("llama")), applied("llama")
    eight = of_module(copy.deepcopy(rounded.module))
    for path in compact.activations(rounded.module):
        rounded.module.get_submodule(path).activation.bits = 4
    assert rounded.module.state_dict().keys() == eight.module.state_dict().keys()
    assert len({plain.fingerprint, rounded.fingerprint, eight.fingerprint}) == 3
    made = [
        Solved(slots=(), weights={}, recipe=None, labels={}, spent={}, module=model.module).digest
        for model in (rounded, eight)
    ]
    assert made[0] != made[1]
