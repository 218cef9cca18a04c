"""Costs against a counter of operations, against files, and against arithmetic done by hand."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from pennyweight.errors import ModelError
from pennyweight.measure.cost import cost
from pennyweight.model import anatomy
from pennyweight.model.experts import split_experts
from pennyweight.weights import LowRank, Quantized

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EAGER = {"attn_implementation": "eager"}  # the counter knows no fused attention on the CPU


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, num_key_value_heads=2, **SIZES, **EAGER, **options))


def tied_llama():
    return llama(tie_word_embeddings=True)


def mistral():
    return MistralForCausalLM(MistralConfig(vocab_size=101, num_key_value_heads=1, sliding_window=5, **SIZES, **EAGER))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=64, n_embd=16, n_layer=2, n_head=4, **EAGER))


def neox():  # query, key and value interleaved in one layer
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=101, **SIZES, **EAGER))


def mixtral():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(vocab_size=101, num_key_value_heads=2, **SIZES, **EAGER, **experts))


def split_mixtral():
    module = mixtral()
    assert split_experts(module)
    return module


def latent():  # keys and values through a latent; heads of 6 + 2 for queries, of 4 for values
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=101, num_key_value_heads=4, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=6,
            qk_rope_head_dim=2, v_head_dim=4, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, first_k_dense_replace=1, experts_implementation="eager", **SIZES, **EAGER,
        )
    )  # fmt: skip


def bert():
    return BertModel(BertConfig(vocab_size=101, **SIZES, **EAGER))


def albert():  # one block, run three times
    return AlbertModel(AlbertConfig(vocab_size=101, embedding_size=8, **{**SIZES, "num_hidden_layers": 3}, **EAGER))


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=101, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, **EAGER
        )
    )


def vit():
    return ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, num_labels=3, **SIZES, **EAGER))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, image_size=32, **sizes))


TOKENS = [llama, tied_llama, mistral, gpt2, neox, mixtral, split_mixtral, latent, bert, albert]
IMAGES = [vit, resnet]


def make(build):
    torch.manual_seed(0)
    return build().eval()


def counted(module, **inputs):
    """FLOPs that the counter sees, without those that make the angles of rotary embeddings."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    rotary = sum(
        sum(found.values()) for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - rotary


def names(build):
    return build.__name__


@pytest.mark.parametrize("length", [3, 11])
@pytest.mark.parametrize("build", TOKENS, ids=names)
def test_flops_are_those_that_a_counter_sees(build, length):
    module, found = make(build), cost(make(build))
    ids = torch.randint(0, 101, (1, length), generator=torch.Generator().manual_seed(0))
    # the counter sees every key for every query, masked or not
    attention = sum(part.flops for part in found.attention) * length * length
    assert found.unit == "token"
    assert counted(module, input_ids=ids) == found.flops_per_token * length + found.flops_per_sequence + attention
    assert not found.uncounted


def test_flops_of_an_encoder_decoder():
    module = make(t5)
    found = cost(module)
    ids = torch.arange(7)[None]
    attention = sum(part.flops for part in found.attention) * 7 * 7
    assert [part.cross for part in found.attention].count(True) == 2
    assert found.unit == "token pair"
    assert counted(module, input_ids=ids, decoder_input_ids=ids) == found.flops_per_token * 7 + attention


@pytest.mark.parametrize("build", IMAGES, ids=names)
def test_flops_of_an_image(build):
    module = make(build)
    found = cost(module)
    size = module.config.image_size
    seen = 1 if build is resnet else (size // module.config.patch_size) ** 2 + 1
    assert found.unit == f"image {size}x{size}"
    attention = found.attention_flops(seen)
    assert counted(module, pixel_values=torch.zeros(1, 3, size, size)) == found.flops_per_token + attention


def test_flops_of_a_plain_network_need_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
            self.line, self.out = nn.Conv1d(6, 5, 2), nn.Linear(5, 7)

        def forward(self, image):
            return self.out(self.line(self.conv(image).flatten(2)).mean(-1))

    net = Net()
    assert cost(net).flops_per_token is None
    found = cost(net, inputs=torch.zeros(3, 4, 9, 8))
    assert (found.unit, found.params) == ("sample", sum(tensor.numel() for tensor in net.parameters()))
    assert counted(net, image=torch.zeros(1, 4, 9, 8)) == found.flops_per_token
    assert cost(net, inputs={"image": torch.zeros(3, 4, 9, 8)}) == cost(net, inputs=(torch.zeros(3, 4, 9, 8),)) == found
    with pytest.raises(ModelError, match=r"does not run on 3 sample\(s\).*give inputs"):
        cost(net, inputs=torch.zeros(3, 9))


def test_fused_attention_of_the_framework_is_counted():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
    module = nn.Sequential(nn.Embedding(101, 16), nn.Sequential(layer, layer)).eval()
    found = cost(module, inputs=torch.arange(10)[None])
    by_role = {row.name: row.flops for row in found.layers}
    assert by_role["1.0.self_attn.in_proj_weight"] == 2 * 10 * 2 * 3 * 16 * 16  # ten tokens, the layer runs twice
    assert by_role["1.0.self_attn.out_proj"] == 2 * 10 * 2 * 16 * 16
    assert by_role["1.0.linear1"] == 2 * 10 * 2 * 16 * 24


@pytest.mark.parametrize("build", [*TOKENS, t5, *IMAGES], ids=names)
def test_sizes_are_exact(build, tmp_path):
    module = make(build)
    found = cost(module)
    assert found.params_total == found.params_dense == sum(tensor.numel() for tensor in module.parameters())
    kept = {tensor.data_ptr(): tensor.clone() for tensor in module.state_dict().values()}
    save_file({str(index): tensor for index, tensor in enumerate(kept.values())}, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert found.bytes == len(raw) - 8 - header
    assert sum(layer.params for layer in found.layers) <= found.params_total
    assert sum(layer.bytes for layer in found.layers) <= found.bytes


def test_numbers_of_a_llama_by_hand():
    for build, heads in ((llama, 2), (tied_llama, 1)):
        found = cost(make(build))
        linear = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24)
        assert found.params_total == linear + 5 * 16 + heads * 101 * 16
        assert found.params == linear + 5 * 16  # neither tables nor heads
        assert found.flops_per_token == 2 * linear + 2 * 101 * 16
        assert found.kv_bytes_per_token == 2 * 2 * 8 * 4  # two layers, key and value, two heads of four, float32
        assert found.attention_flops(10) == 10 * 2 * 4 * 16
        assert found.bytes_read_per_token == 4 * (linear + 5 * 16 + 101 * 16 + 16)  # of the table one row
        assert found.bytes_bf16 == 2 * found.params_total
        assert found.activation_bytes_per_token == 4 * (16 + 101)


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, mistral, latent, neox], ids=names)
def test_the_cache_takes_what_a_longer_run_keeps(build):
    module, found = make(build), cost(make(build))
    for length in (3, 5, 13):
        with torch.no_grad():
            cache = module(torch.arange(length)[None], use_cache=True).past_key_values
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert found.kv_bytes(length) == kept
    assert found.kv_bytes(0) == 0


def test_decoding_reads_the_experts_it_chooses():
    found = cost(make(mixtral))
    experts = [layer for layer in found.layers if layer.role.startswith("moe.experts")]
    assert sum(layer.bytes_read for layer in experts) * 2 == sum(layer.bytes for layer in experts)  # two of four
    assert found.bytes_read_per_token == found.bytes - sum(layer.bytes for layer in experts) / 2 - 4 * 100 * 16


def test_a_window_bounds_attention_and_cache():
    found = cost(make(mistral))
    assert found.attention_flops(1000) == found.attention_flops(5) == 5 / 4 * found.attention_flops(4)
    assert found.kv_bytes(1000) == 4 * found.kv_bytes_per_token


def test_compact_layers_cost_what_they_store():
    module = make(tied_llama)
    dense = cost(module)
    for found in anatomy.of(module).layers():
        matrix = anatomy.matrix(module, found)
        compact = found.kind == "embedding"
        weight = Quantized.nearest(matrix, bits=4, group_size=8) if compact else LowRank.nearest(matrix, rank=3)
        anatomy.replace(module, found.path, weight)
    found = cost(module)
    rank3 = 3 * 2 * (2 * (16 + 16) + 2 * (8 + 16) + 3 * (16 + 24))
    head = module.lm_head.weight.cost()
    assert found.params_dense == dense.params_dense
    assert found.bytes_bf16 == dense.bytes_bf16
    assert found.params == rank3 + 5 * 16
    assert found.flops_per_token == 2 * rank3 + head.flops
    assert found.bytes == 4 * rank3 + 4 * 5 * 16 + head.bytes  # embedding and head once
    assert found.kv_bytes_per_token == dense.kv_bytes_per_token
    forms = {layer.role: layer.form for layer in found.layers}
    assert (forms["embedding"], forms["attention.query"]) == ("quantized", "low_rank")
    widths = {layer.role: layer.bits_per_weight for layer in found.layers}
    assert 4 < widths["embedding"] < 9
    assert widths["head"] == 0  # stored with the embedding


def test_what_is_not_counted_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cell, self.idle = nn.Embedding(9, 4), nn.LSTM(4, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.cell(self.table(ids))[0]

    assert cost(Recurrent()).uncounted == ("cell.weight_ih_l0", "cell.weight_hh_l0", "idle")


def test_a_model_is_left_as_it_was():
    module = make(llama).train()
    cost(module)
    assert module.training
    assert not any(part._forward_hooks for part in module.modules())
