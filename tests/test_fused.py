"""Decoding through the compiled routine against the plain way, in plain `generate`."""

from __future__ import annotations

import copy
import pickle

import families
import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from pennyweight import native
from pennyweight.errors import OptionError
from pennyweight.model import anatomy, load, save
from pennyweight.serve import fused, prompt
from pennyweight.weights import Dense, LowRank, Product, Quantized, Sum
from pennyweight.weights.entropy import EntropyCoded
from pennyweight.weights.structured import BlockDiagonal

# without a compiler models decode the plain way, which the other tests run
pytestmark = pytest.mark.skipif(native.library("decode") is None, reason="no C compiler")

IDS = torch.arange(3, 12)[None]


def generated(module: nn.Module, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens and logits (T, V) of a generation that no token ends."""
    with torch.no_grad():
        found = module.generate(
            IDS, max_new_tokens=20, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    return found.sequences, torch.cat(found.logits)


def agree(module: nn.Module, dtype: torch.dtype | None = torch.float32) -> None:
    wanted = generated(module)
    assert fused.fuse(module, prompt=dtype)
    found = generated(module)
    assert fused.fused(module)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_every_family_decodes_as_the_plain_way_does(family):
    agree(families.build(family).eval())


def coded(matrix: torch.Tensor) -> EntropyCoded:
    rows, columns = (torch.full((size,), 128, dtype=torch.uint8) for size in matrix.shape)
    codes = (matrix.detach() / 2**-5).round().to(torch.int32)
    codes[1, 2], codes[-1, 0] = 300, -500  # beyond a byte
    return EntropyCoded.encode(codes, rows, columns, step=2**-5)


def blocks(matrix: torch.Tensor) -> Product:
    m, n = matrix.shape
    eye = BlockDiagonal(torch.eye(8).expand(n // 8, 8, 8).contiguous())
    turned = BlockDiagonal(2 * torch.eye(8).expand(m // 8, 8, 8))
    return Product(turned, Dense(matrix.detach() / 2), eye)


FORMS = {
    "quantized 4": lambda w: Quantized.nearest(w, bits=4, group_size=16),
    "quantized 3": lambda w: Quantized.nearest(w, bits=3, group_size=16),
    "quantized 2": lambda w: Quantized.nearest(w, bits=2, group_size=16, zero_kind="float"),
    "coded": coded,
    "low rank": lambda w: LowRank.nearest(w, 5),
    "sum": lambda w: Sum(Quantized.nearest(w, bits=2, group_size=16), LowRank.nearest(w, 3)),
    "product": blocks,
    "product of a low rank": lambda w: Product(Dense(torch.eye(w.shape[0])), LowRank.nearest(w, 5)),
    "half": lambda w: Dense(w.detach().half()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_its_codes_or_made_dense(form):
    module = families.build("llama").eval()
    for one in anatomy.of(module).maps():
        if one.block is not None:
            anatomy.replace(module, one.path, FORMS[form](module.get_submodule(one.path).weight))
    agree(module)


def test_threads_share_the_work(monkeypatch):
    module = families.build("qwen3").eval()
    fused.fuse(module)
    alone = generated(module)[1]
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.testing.assert_close(generated(module)[1], alone, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_keeps_its_cache_in_bfloat16():
    module = families.build("llama").to(torch.bfloat16).eval()
    wanted = generated(module)[1]
    assert fused.fuse(module)
    found = generated(module)[1]
    assert fused.fused(module)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_prompts_multiply_in_bfloat16_where_asked():
    module = families.build("llama").eval()
    exact = generated(module)[1]
    fused.fuse(module, prompt=torch.bfloat16)
    lower = generated(module)[1]
    assert 0 < float((lower - exact).norm() / exact.norm()) < 0.02
    with torch.no_grad():  # a plain forward pass is nobody's prompt
        torch.testing.assert_close(module(IDS).logits[0, -1], exact[0], rtol=1e-5, atol=1e-6)
    fused.fuse(module, prompt=torch.float32)
    assert torch.equal(generated(module)[1][0], exact[0])


def wide(kind: str) -> nn.Module:
    """A model whose heads are as the attention of prompts has them: of whole 16 numbers."""
    sizes = {
        "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 80, "vocab_size": 64, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    module = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():  # norms and biases begin as ones and zeros, which hides mistakes
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return module.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["dense", "quantized 4", "coded", "sum"])
def test_prompts_are_read_as_the_plain_way_reads_them(kind, form):
    module = wide(kind)
    if form != "dense":
        for one in anatomy.of(module).maps():
            if one.block is not None:
                anatomy.replace(module, one.path, FORMS[form](module.get_submodule(one.path).weight))
    for count in (5, 64, 131):
        ids = torch.randint(1, 64, (1, count), generator=torch.Generator().manual_seed(count))
        fused.unfuse(module)
        plain, found = DynamicCache(), DynamicCache()
        with torch.no_grad():
            wanted = module(ids, past_key_values=plain).logits
            fused.fuse(module, prompt=torch.bfloat16)
            logits = module(ids, past_key_values=found).logits
        assert fused.reads_prompts(module)
        assert float((logits - wanted).norm() / wanted.norm()) < 0.02
        for one, other in zip(found.layers, plain.layers, strict=True):
            assert one.keys.dtype == other.keys.dtype
            assert float((one.keys - other.keys).norm() / other.keys.norm()) < 0.02
            assert float((one.values - other.values).norm() / other.values.norm()) < 0.02


@pytest.mark.parametrize("positions", [1, 6, 63, 64, 65, 200])
@pytest.mark.parametrize("size", [16, 64, 80])
def test_attention_of_prompts_is_that_of_torch(positions, size):
    g = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(heads, positions, size, generator=g) for heads in (6, 2, 2))
    wanted = nn.functional.scaled_dot_product_attention(
        queries[None].double(), keys[None].double(), values[None].double(), is_causal=True, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1).reshape(positions, -1)  # fmt: skip
    found = prompt._attended(queries, keys, values, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)


def test_prompts_that_go_on_or_are_looked_at_are_read_the_plain_way():
    module = wide("llama")
    ids = torch.randint(1, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    fused.fuse(module, prompt=torch.bfloat16)
    with torch.no_grad():
        whole = module(ids, past_key_values=DynamicCache()).logits[0, -1]
        cache = DynamicCache()
        module(ids[:, :8], past_key_values=cache)
        rest = module(ids[:, 8:], past_key_values=cache).logits[0, -1]
        assert float((rest - whole).norm() / whole.norm()) < 0.02
        seen = []
        handle = module.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        module(ids, past_key_values=DynamicCache())
        handle.remove()
        assert seen
        module.model.layers[0].mlp.down_proj.weight.mul_(3)
        other = module(ids, past_key_values=DynamicCache()).logits[0, -1]
    assert float((other - whole).norm() / whole.norm()) > 0.05


def test_the_cache_may_be_copied_cropped_and_gone_on_with():
    module = families.build("llama").eval()
    fused.fuse(module, prompt=torch.float32)
    with torch.no_grad():
        cache = module(IDS, use_cache=True).past_key_values
        step = lambda token, held: module(torch.tensor([[token]]), past_key_values=held).logits[0, -1]  # noqa: E731
        first = step(5, cache)
        branch = copy.deepcopy(cache)
        one, other = step(6, cache), step(7, branch)
        plain = module(torch.cat([IDS, torch.tensor([[5, 6]])], 1)).logits[0, -1]
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)
        plain = module(torch.cat([IDS, torch.tensor([[5, 7]])], 1)).logits[0, -1]
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
        cache.crop(-2)
        torch.testing.assert_close(step(5, cache), first, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == IDS.shape[1] + 1


def test_more_tokens_than_there_was_room_for():
    module = families.build("llama").eval()
    fused.fuse(module, prompt=torch.float32)
    ids = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = module(ids).logits[0]
        cache = module(ids[:, :5], use_cache=True).past_key_values
        for at in range(5, 300):
            found = module(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]
            if at in (5, 255, 256, 257, 299):
                torch.testing.assert_close(found, plain[at], rtol=1e-4, atol=1e-5)
    assert fused.fused(module)


def test_trained_weights_and_hooks_are_seen():
    module = families.build("llama").eval()
    fused.fuse(module, prompt=torch.float32)
    generated(module)
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.mul_(3)
    agree(module)
    seen = []
    handle = module.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    generated(module)
    assert len(seen) == 20
    handle.remove()
    module.model.layers[1].mlp = nn.Sequential(module.model.layers[1].mlp)  # no longer of the kind
    generated(module)
    assert not fused.fused(module)


def test_a_disagreement_is_told_and_the_plain_way_kept(monkeypatch):
    module = families.build("llama").eval()
    wanted = generated(module)[1]
    fused.fuse(module, prompt=torch.float32)
    monkeypatch.setattr(
        fused, "_norm", lambda norm, state: state.held.append(torch.ones(32)) or state.held[-1].data_ptr()
    )
    with torch.no_grad():
        module.model.layers[0].input_layernorm.weight.mul_(1.5)
    changed = generated(copy.deepcopy(module))[1]
    with pytest.warns(UserWarning, match="is off by"):
        found = generated(module)[1]
    assert not fused.fused(module)
    assert torch.equal(found, changed)
    assert not torch.equal(found, wanted)


def test_a_machine_on_which_it_is_slower_keeps_the_plain_way(monkeypatch):
    module = families.build("llama").eval()
    wanted = generated(module)[1]
    fused.fuse(module, prompt=torch.float32)
    monkeypatch.setattr(fused, "_best", lambda compute: 1e9)
    assert torch.equal(generated(module)[1], wanted)
    assert not fused.fused(module)


def test_copies_and_pickles_are_plain_and_unfuse_takes_it_back():
    module = families.build("llama").eval()
    plain = type(module.model)
    fused.fuse(module)
    assert type(module.model) is not plain
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other.model) is plain
        assert not fused.fused(other)
    fused.unfuse(module)
    assert type(module.model) is plain
    assert not fused.fuse(families.build("gpt2"))
    with pytest.raises(OptionError, match="prompts in"):
        fused.fuse(module, prompt=torch.float16)


def test_padded_batches_training_and_weights_asked_for_go_the_plain_way():
    module = families.build("llama").eval()
    module.set_attn_implementation("eager")
    fused.fuse(module)
    generated(module, output_attentions=True)
    assert not fused.fused(module)
    two = IDS.repeat(2, 1)
    with torch.no_grad():
        module.generate(two, max_new_tokens=3, do_sample=False)
        assert not fused.fused(module)
        padded = torch.ones_like(IDS)
        padded[0, 0] = 0
        module.generate(IDS, attention_mask=padded, max_new_tokens=3, do_sample=False)
    assert not fused.fused(module)


def test_a_fitted_directory_decodes_so_by_itself(tmp_path):
    source = load(families.build("llama"))
    for one in anatomy.of(source.module).maps():
        if one.block is not None:
            anatomy.replace(source.module, one.path, FORMS["quantized 4"](source.module.get_submodule(one.path).weight))
    save(source, tmp_path / "out")
    loaded = load(tmp_path / "out").module
    generated(loaded)
    assert fused.fused(loaded)
