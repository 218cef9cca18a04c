"""L-Mul against an integer adder of 8-bit numbers, closed forms, and torch's own attention."""

import numpy as np
import pytest
import torch
from families import build, inputs, run
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from torch import nn
from transformers import AutoModelForCausalLM

from pennyweight.errors import FormError, ModelError, OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.measure import energy
from pennyweight.measure.cost import cost
from pennyweight.model import anatomy, compact, load, restore, save
from pennyweight.model.loading import of_module
from pennyweight.model.products import attention_arithmetic, use_in_attention
from pennyweight.weights import CompactLinear, Dense, LowRank, Quantized
from pennyweight.weights.l_mul import LMul, Products, offset_bits
from pennyweight.work import Work


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the arithmetic


def test_all_pairs_of_eight_bit_numbers_are_an_integer_addition():
    """4 bits of exponent, 4 of mantissa: the adder, the formula with the carry, and what we compute, on 2^16 pairs."""
    code = np.arange(256)

    def value(codes):
        return (1 + (codes & 15) / 16) * np.exp2((codes >> 4) - 7.0)

    x, y = np.meshgrid(code, code, indexing="ij")
    added = x + y - (7 << 4) + (1 << (4 - 3))  # l(4) = 3
    adder = value(added)  # python's shift of negative numbers keeps the exponent right
    total = (x & 15) / 16 + (y & 15) / 16 + 1 / 8
    formula = np.where(total < 1, 1 + total, 2 * total) * np.exp2((x >> 4) + (y >> 4) - 14.0)
    np.testing.assert_array_equal(adder, formula)
    operands = [torch.tensor(value(codes), dtype=torch.float32) for codes in (x, y)]
    np.testing.assert_array_equal(LMul(4).times(*operands).numpy(), adder)
    printed = (1 + total) * np.exp2((x >> 4) + (y >> 4) - 14.0)
    np.testing.assert_array_equal(LMul(4, carry=False).times(*operands).numpy(), printed)


@pytest.mark.parametrize(
    ("offset", "carry", "mean", "relative"),
    [
        (0.0, True, -1 / 12, 0.0385),
        (1 / 16, True, 0.0123, 0.0265),
        (1 / 8, True, 0.112, 0.0509),
        (0.0, False, -0.25, None),
        (1 / 16, False, -0.1875, None),
    ],
)
def test_errors_over_uniform_mantissas(offset, carry, mean, relative):
    """In units of 2^(i + j); -1/12 is Mitchell's, -1/4 + offset that of the formula without the carry."""
    x = 1 + (torch.arange(1000) + 0.5) / 1000
    found = LMul(23, carry=carry).times(x[:, None], x, offset=offset)
    exact = x[:, None] * x
    assert float((found - exact).double().mean()) == pytest.approx(mean, abs=1e-3)
    if relative is not None:
        assert float(((found - exact).abs() / exact).mean()) == pytest.approx(relative, rel=0.01)


def test_corrections_are_those_of_the_source():
    assert [offset_bits(bits) for bits in (1, 2, 3, 4, 5, 7, 10)] == [1, 2, 3, 3, 4, 4, 4]


@pytest.mark.parametrize(("bits", "dtype"), [(7, torch.bfloat16), (10, torch.float16)])
def test_operands_are_rounded_as_torch_rounds(bits, dtype):
    x = normal(0, 5000)
    by_one = LMul(bits).times(x, torch.ones(1), offset=0.0)
    assert torch.equal(by_one, x.to(dtype).float())


@pytest.mark.parametrize("carry", [True, False])
def test_signs_zeros_and_the_ends_of_the_range(carry):
    times = LMul(4, carry=carry).times
    x, y = torch.tensor([1.5, -1.5, -1.5, 0.0, -0.0]), torch.tensor([1.25, 1.25, -1.25, 3.0, 3.0])
    assert times(x, y).tolist() == [1.875, -1.875, 1.875, 0, 0]
    tiny, huge = torch.tensor(2.0**-140), torch.tensor(2.0**127)
    assert times(tiny, torch.ones(())) == 0
    assert times(torch.tensor(2.0**-100), torch.tensor(2.0**-100)) == 0
    assert times(huge, torch.tensor(-4.0)) == -torch.finfo(torch.float32).max or not carry
    assert bool(times(torch.tensor(torch.nan), torch.ones(())).isnan())
    assert times(torch.tensor(torch.inf), -torch.ones(())) == -torch.inf


SHAPES = [
    ((4, 5), (5, 3)), ((5,), (5, 3)), ((4, 5), (5,)), ((5,), (5,)), ((2, 4, 5), (5, 3)), ((2, 4, 5), (2, 5, 3)),
    ((2, 1, 4, 5), (3, 5, 6)), ((1, 1), (1, 1)), ((0, 4), (4, 2)),
]  # fmt: skip


@given(shapes=sampled_from(SHAPES), bits=integers(1, 6), carry=booleans(), seed=integers(0, 2**31))
def test_matrix_products_are_sums_of_products(shapes, bits, carry, seed):
    a, b = normal(seed, *shapes[0]) * 4, normal(seed + 1, *shapes[1])
    a = torch.where(normal(seed + 2, *shapes[0]) > 1, torch.zeros_like(a), a)
    arithmetic = LMul(bits, carry=carry)
    left = a[None] if a.ndim == 1 else a
    right = b[:, None] if b.ndim == 1 else b
    each = arithmetic.times(left[..., :, :, None], right[..., None, :, :])
    expected = each.double().sum(-2)
    expected = expected.reshape(torch.matmul(a, b).shape)
    found = arithmetic.matmul(a, b)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if len(shapes[0]) > 1 < len(shapes[1]):
        torch.testing.assert_close(arithmetic._by_pairs(a, b), arithmetic._by_table(a, b), rtol=1e-5, atol=1e-5)


def test_dtypes_devices_and_blocks():
    a, b = normal(0, 3, 40).bfloat16(), normal(1, 40, 2)
    found = LMul().matmul(a, b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), LMul().matmul(a.float(), b), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            LMul().matmul(a.float(), b), LMul().matmul(a.float(), b.bfloat16().float()), rtol=0.1, atol=0.1
        )
    with pytest.raises(ShapeError, match=r"L-Mul: no product of \(3, 40\) and \(2, 40\)"):
        LMul().matmul(a, b.T)
    for bits in (0, 24):
        with pytest.raises(OptionError, match="give 1 to 23"):
            LMul(bits)


def test_backward_products_are_exact():
    a, b = normal(0, 3, 5).requires_grad_(), normal(1, 5, 2).requires_grad_()
    upstream = normal(2, 3, 2)
    LMul().matmul(a, b).backward(upstream)
    torch.testing.assert_close(a.grad, upstream @ b.T)
    torch.testing.assert_close(b.grad, a.T @ upstream)
    torch.testing.assert_close(LMul().matmul(a, b), LMul().matmul(a.detach(), b.detach()))


def test_inside_every_product_is_one_and_nothing_else_changes():
    x, w, bias = normal(0, 3, 5), normal(1, 4, 5), normal(2, 4)
    arithmetic = LMul(3)
    expected = arithmetic.matmul(x, w.T)
    with Products(arithmetic):
        assert torch.equal(x @ w.T, expected)
        assert torch.equal(torch.matmul(x, w.T), expected)
        assert torch.equal(torch.bmm(x[None], w.T[None])[0], expected)
        assert torch.equal(nn.functional.linear(x, w, bias), expected + bias)
        assert torch.equal(x * 2 + 1, 2 * x + 1)
        assert torch.equal(x.softmax(-1), torch.softmax(x, -1))
        for call in (lambda: torch.einsum("ij,kj->ik", x, w), lambda: torch.addmm(bias, x, w.T)):
            with pytest.raises(OptionError, match="is no product of two matrices"):
                call()
    assert torch.equal(x @ w.T, torch.mm(x, w.T))


# --- in layers and attention


def test_compact_layers_multiply_so():
    matrix, x, arithmetic = normal(0, 6, 8), normal(1, 2, 3, 8), LMul(4)
    quantized = Quantized.nearest(matrix, bits=4)
    for weight in (Dense(matrix), quantized):
        found = CompactLinear(weight, torch.ones(6), product=arithmetic)(x)
        torch.testing.assert_close(found, arithmetic.matmul(x, weight.dense().T) + 1)
    thin = LowRank.nearest(matrix, 3)
    found = CompactLinear(thin, product=arithmetic)(x)
    torch.testing.assert_close(found, arithmetic.matmul(arithmetic.matmul(x, thin.down.T), thin.up.T))


EXCHANGED = ("llama", "gemma2", "gpt2", "bert", "t5", "vit", "swin", "deepseek-v3", "qwen3")


@pytest.mark.parametrize("family", EXCHANGED)
def test_attention_is_the_models_own_but_for_its_products(family, monkeypatch):
    module = build(family)
    module.set_attn_implementation("eager")
    eager = run(module, family)
    use_in_attention(module, LMul(4))
    assert attention_arithmetic(module) == LMul(4)
    changed = run(module, family)
    assert 1e-6 < float((changed - eager).norm() / eager.norm()) < 0.2
    calls = []

    def exact(self, a, b):
        calls.append((a.shape, b.shape))
        return torch.matmul(a, b)

    monkeypatch.setattr(LMul, "matmul", exact)
    torch.testing.assert_close(run(module, family), eager, rtol=1e-6, atol=1e-6)
    blocks = len(anatomy.of(module).blocks) + (2 if family == "t5" else 0)  # decoder blocks attend twice
    assert len(calls) == 2 * blocks


def test_no_token_sees_later_ones():
    module = build("llama")
    use_in_attention(module, LMul(4))
    ids = inputs("llama")["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 60 + 3
    with torch.no_grad():
        one, two = (module(input_ids=given_).logits for given_ in (ids, other))
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert not torch.equal(one[:, -1], two[:, -1])


def applied(family: str, **options: object):
    model = of_module(build(family))
    work = Work(model=model, windows=None, maps=model.anatomy.layers())
    make("infer.l_mul", options).change(model, work)
    return model


@pytest.mark.parametrize("options", [{}, {"linear": False, "bits": 3}, {"attention": False, "carry": False}], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "bert"])
def test_saved_and_loaded_it_computes_the_same(family, options, tmp_path):
    model = applied(family, **options)
    before = run(model.module, family)
    assert not torch.equal(before, run(build(family), family))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out").module
    assert torch.equal(run(again, family), before)
    assert compact.layout_of(again) == compact.layout_of(model.module)
    wanted = LMul(options.get("bits", 4), options.get("carry", True))
    assert attention_arithmetic(again) == (wanted if options.get("attention", True) else None)
    assert set(compact.products(again).values()) == ({wanted} if options.get("linear", True) else set())
    if family == "llama-tied":
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(run(opened, family), before)


def test_every_linear_map_of_a_plain_network(tmp_path):
    model = applied("plain-mlp", attention=False)
    assert len(compact.products(model.module)) == 3
    save(model, tmp_path / "out")
    again = restore(build("plain-mlp"), tmp_path / "out")
    assert torch.equal(run(again.module, "plain-mlp"), run(model.module, "plain-mlp"))


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"attention of a Sequential cannot be exchanged; .*attention: false"):
        applied("plain-mlp")
    with pytest.raises(ModelError, match="attention of a FalconForCausalLM cannot be exchanged"):
        applied("falcon")
    with pytest.raises(OptionError, match="neither linear nor attention leaves nothing to do"):
        make("infer.l_mul", {"linear": False, "attention": False})
    with pytest.raises(OptionError, match="bits = 0 is out of range"):
        make("infer.l_mul", {"bits": 0})
    model = of_module(build("llama"))
    tables = tuple(found for found in model.anatomy.layers() if found.kind == "embedding")
    with pytest.raises(OptionError, match="the selection holds no linear map"):
        make("infer.l_mul", {}).change(model, Work(model=model, windows=None, maps=tables))
    for options in ({"linear": False}, {"attention": False}):
        with pytest.raises(ModelError, match="multiply in a way of their own, which plain weights cannot say"):
            save(applied("llama", **options), tmp_path / "dense", dense=True)
    with pytest.raises(FormError, match="no arithmetic of this version"):
        LMul.of({"bits": 4, "base": 3})


# --- energy


def test_energies_are_a_hand_count():
    module = build("llama")
    maps = [found for found in anatomy.of(module).layers() if found.kind == "linear"]
    multiplications = cost(module).flops_per_token / 2
    by_hand = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64  # q, o; k, v; gate, up, down; head
    assert multiplications == by_hand == sum(found.shape[0] * found.shape[1] for found in maps)
    pico = {
        name: 1e12 * energy.dot_product(multiplications, product=name).joules
        for name in ("fp32", "fp16", "int8", "l_mul")
    }
    assert pico["fp32"] == pytest.approx(by_hand * 4.6)
    assert pico["fp16"] == pytest.approx(by_hand * 2.0)
    assert pico["int8"] == pytest.approx(by_hand * 1.1)
    assert pico["l_mul"] == pytest.approx(by_hand * 1.0)
    alone = [energy.dot_product(1, product=name, sums="none").joules for name in ("l_mul", "fp32")]
    assert 1 - alone[0] / alone[1] == pytest.approx(0.973, abs=1e-3)  # the source says up to 95 % and 80 %
    assert 1 - pico["l_mul"] / pico["fp32"] == pytest.approx(0.783, abs=1e-3)
    assert energy.dot_product(1, product="l_mul").source == "model: 0.1 pJ a product (l_mul), 0.9 pJ a sum (fp32)"
    with pytest.raises(OptionError, match="product 'fp9', sums 'fp32'; the table has int8"):
        energy.dot_product(1, product="fp9")
