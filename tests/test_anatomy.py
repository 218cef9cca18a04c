"""The anatomy against the models themselves: complete roles, traced inputs, fused layouts, and replacement."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict

import pytest
import torch
from families import FAMILIES, VISION, build, inputs, run
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, ShapeError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Anatomy, Map
from pennyweight.model.experts import SplitExperts, split_experts
from pennyweight.model.roles import role_of
from pennyweight.weights import Dense, LowRank

ATTENTION = Counter(f"attention.{part}" for part in ("query", "key", "value", "output"))
CROSS = Counter({f"cross_{role}": count for role, count in ATTENTION.items()})
FUSED = Counter(["attention.qkv", "attention.output"])
GATED = Counter(["ffn.gate", "ffn.up", "ffn.down"])
PLAIN = Counter(["ffn.up", "ffn.down"])
TOKENS = Counter(["embedding", "head"])
POSITION = Counter(["position_embedding"])
LATENT = Counter(["attention.kv_down", "attention.kv_up", "attention.output"])
EXPERTS = Counter(f"moe.experts[{i}].{part}" for i in range(4) for part in ("gate", "up", "down"))
ROUTED = Counter(["moe.router"]) + EXPERTS
SHARED = Counter(["moe.shared.gate", "moe.shared.up", "moe.shared.down"])
IMAGE = POSITION + Counter(["conv", "classifier"])
MASKED = Counter(["embedding", "token_type_embedding", "position_embedding", "head.transform", "head"])


def twice(roles: Counter[str]) -> Counter[str]:
    return roles + roles


DECODER = TOKENS + twice(ATTENTION + GATED)
#: The tables of encoder and decoder, tied to the shared one; a bias table in the first block of either side.
T5 = TOKENS + Counter({"embedding": 2, "position_embedding": 2}) + twice(twice(ATTENTION) + CROSS)
DEEPSEEK = TOKENS + GATED + ROUTED + SHARED + twice(LATENT)

#: Every role of every linear map, by hand from the published architectures.
ROLES = {
    "llama": DECODER,
    "llama-tied": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
    "gemma2": DECODER,
    "gemma3": DECODER,
    "phi3": DECODER,
    "gpt2": TOKENS + POSITION + twice(ATTENTION + PLAIN),
    "gpt-neox": TOKENS + twice(FUSED + PLAIN),
    "opt": TOKENS + POSITION + Counter(["embedding.projection", "head.projection"]) + twice(ATTENTION + PLAIN),
    "falcon": TOKENS + twice(FUSED + PLAIN),
    "falcon-multi-query": TOKENS + twice(ATTENTION + PLAIN),
    "bert": MASKED + twice(ATTENTION + PLAIN),
    "bert-classifier": Counter(["embedding", "token_type_embedding", "position_embedding", "pooler", "classifier"])
    + twice(ATTENTION + PLAIN),
    "roberta": MASKED + twice(ATTENTION + PLAIN),
    "distilbert": MASKED - Counter(["token_type_embedding"]) + twice(ATTENTION + PLAIN),
    "t5": T5 + twice(twice(PLAIN)),
    "t5-gated": T5 + twice(twice(GATED)),
    "vit": IMAGE + twice(ATTENTION + PLAIN),
    "deit": IMAGE + Counter(["classifier"]) + twice(ATTENTION + PLAIN),
    "swin": Counter(["conv", "downsample", "classifier"]) + twice(twice(ATTENTION + PLAIN + POSITION)),
    "convnext": Counter(["conv", "conv", "classifier"]) + twice(twice(PLAIN + Counter(["conv"]))),
    # a stem, two bottlenecks of three convolutions a stage, and the shortcut of the first
    "resnet": Counter({"conv": 1 + 2 * (2 * 3 + 1), "classifier": 1}),
    "mixtral": TOKENS + twice(ATTENTION + ROUTED),
    "olmoe": TOKENS + twice(ATTENTION + ROUTED),
    "qwen2-moe": TOKENS + twice(ATTENTION + ROUTED + SHARED + Counter(["moe.shared.router"])),
    "deepseek-v2": DEEPSEEK + twice(Counter(["attention.query"])),
    "deepseek-v3": DEEPSEEK + twice(Counter(["attention.query_down", "attention.query_up"])),
    "plain-conv": Counter({"conv": 10, "classifier": 1}),
    "plain-mlp": Counter({"linear": 3}),
}
BLOCKS = {"t5": 4, "t5-gated": 4, "swin": 4, "convnext": 4, "resnet": 4, "plain-conv": 4, "plain-mlp": 0}
TIED = {
    "llama-tied",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt",
    "falcon",
    "falcon-multi-query",
    "bert",
    "roberta",
    "distilbert",
}
TIED |= {"t5", "t5-gated"}
STACKED = ("mixtral", "qwen2-moe", "olmoe", "deepseek-v2", "deepseek-v3")

families = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_is_expected_of_something():
    assert set(ROLES) == set(FAMILIES)


@families
def test_roles_are_complete(family):
    found = anatomy.of(build(family))
    assert Counter(part.role for part in found.maps()) == ROLES[family]
    assert found.unknown == ()
    assert len(found.blocks) == BLOCKS.get(family, 2)
    assert found.tied == (family in TIED)
    assert len({part.name for part in found.maps()}) == len(found.maps())


@families
def test_every_parameter_is_a_map_a_norm_or_small(family):
    # nothing of size escapes: what no map stands for is biases, norms and single tokens
    module = build(family)
    found = anatomy.of(module)
    first = [part for part in found.maps() if part.tied_to is None]
    holders = {f"{part.path}.{part.parameter}" for part in first}
    rest = [p for name, p in module.named_parameters() if name not in holders]
    assert all(p.squeeze().ndim < 2 for p in rest)
    held = sum(part.shape[0] * part.shape[1] for part in first)
    assert held + sum(p.numel() for p in rest) == sum(p.numel() for p in module.parameters())


@families
def test_maps_of_a_block_lie_in_it_and_blocks_are_alike(family):
    found = anatomy.of(build(family))
    for block in found.blocks:
        assert block.maps
        assert all(part.path.startswith(f"{block.path}.") and part.block == block.index for part in block.maps)
    inside = [part for part in found.maps() if part.block is not None]
    assert inside == [part for block in found.blocks for part in block.maps]


def traced(module: nn.Module, found: Anatomy, family: str) -> dict[str, Tensor]:
    """What each layer really multiplied: path -> (rows, N); layers that saw nothing are left out."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for path in {part.path for part in found.maps() if part.kind in ("linear", "conv1d-transposed")}:

        def keep(layer, args, path=path):
            seen[path] = args[0].detach().flatten(0, -2)

        hooks.append(module.get_submodule(path).register_forward_pre_hook(keep))
    run(module, family)
    for hook in hooks:
        hook.remove()
    return seen


@families
def test_maps_read_the_same_rows_exactly_when_they_share_an_input_group(family):
    module = build(family)
    split_experts(module)
    found = anatomy.of(module)
    seen = traced(module, found, family)
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for part in found.maps():
        if part.path in seen:
            groups[part.input_group].append(seen[part.path])
    for name, rows in groups.items():
        assert all(torch.equal(rows[0], other) for other in rows), name
    firsts = list(groups.items())
    for index, (name, rows) in enumerate(firsts):
        for other, others in firsts[:index]:
            assert not torch.equal(rows[0], others[0]), f"{name} and {other} read the same"
    assert all(part.path in seen for part in found.layers() if part.kind in ("linear", "conv1d-transposed"))


@families
def test_matrices_are_what_the_layers_apply(family):
    module = build(family)
    found = anatomy.of(module)
    generator = torch.Generator().manual_seed(0)
    for part in found.layers():
        layer, matrix = module.get_submodule(part.path), anatomy.matrix(module, part)
        assert matrix.shape == part.shape
        assert not matrix.requires_grad
        if isinstance(layer, nn.Linear | Conv1D):
            x = torch.randn(3, part.shape[1], generator=generator)
            bias = layer.bias if layer.bias is not None else 0
            torch.testing.assert_close(x @ matrix.T + bias, layer(x), rtol=1e-5, atol=1e-5)


@families
def test_fused_parts_tile_their_layer(family):
    module = build(family)
    found = anatomy.of(module)
    fused = [part for part in found.maps() if part.rows is not None and part.kind != "expert-stack"]
    by_layer: dict[str, list[Map]] = defaultdict(list)
    for part in fused:
        by_layer[part.path].append(part)
    whole = {part.path: part for part in found.layers()}
    for path, parts in by_layer.items():
        stacked = torch.cat([anatomy.matrix(module, part) for part in parts])
        assert torch.equal(stacked, anatomy.matrix(module, whole[path]))
        assert whole[path].name == path
        assert whole[path].rows is None


def set_rows(module: nn.Module, part: Map, factor: float) -> None:
    """Multiply the rows of a fused part, and their bias, in place."""
    layer = module.get_submodule(part.path)
    start, stop = part.rows or (0, part.shape[0])
    with torch.no_grad():
        weight = layer.weight.T if part.kind == "conv1d-transposed" else layer.weight
        weight[start:stop] *= factor
        if layer.bias is not None:
            layer.bias[start:stop] *= factor


@pytest.mark.parametrize("family", ["gpt2", "phi3", "falcon-multi-query", "llama"])
def test_rows_of_query_key_and_value_are_told_apart_by_what_they_do(family):
    # without keys all scores are equal, whatever the queries are; without values, whatever queries and keys are
    def output(**factors: float) -> Tensor:
        module = build(family)
        for block in anatomy.of(module).blocks:
            for part in block.maps:
                room, _, name = part.role.rpartition(".")
                if room == "attention" and name in factors:
                    set_rows(module, part, factors[name])
        return run(module, family)

    def same(one: Tensor, two: Tensor) -> bool:
        return torch.allclose(one, two, atol=1e-5)

    assert same(output(key=0), output(key=0, query=3))
    assert same(output(query=0), output(query=0, key=3))
    assert not same(output(key=0), output(key=0, value=3))
    assert same(output(value=0), output(value=0, query=3, key=3))
    assert not same(output(), output(query=3))
    assert not same(output(), output(key=3))


def test_key_rows_are_those_whose_shift_no_score_feels():
    # q_i (k_j + c) adds the same to all scores of i, which the softmax drops; (q_i + c) k_j does not
    def output(role: str) -> Tensor:
        module = build("gpt2")
        for part in anatomy.of(module).maps():
            if part.role == role:
                with torch.no_grad():
                    module.get_submodule(part.path).bias[slice(*part.rows)] += 2.0
        return run(module, "gpt2")

    plain = run(build("gpt2"), "gpt2")
    torch.testing.assert_close(output("attention.key"), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output("attention.query"), plain, rtol=1e-2)


@pytest.mark.parametrize(("family", "shapes"), [("phi3", (32, 16, 16)), ("falcon-multi-query", (32, 8, 8))])
def test_grouped_heads_have_fewer_rows_of_keys_than_of_queries(family, shapes):
    found = anatomy.of(build(family)).blocks[0].maps
    sizes = {part.role: part.shape[0] for part in found}
    assert tuple(sizes[f"attention.{part}"] for part in ("query", "key", "value")) == shapes


@pytest.mark.parametrize(
    ("path", "siblings", "role"),
    [
        ("block_sparse_moe.experts.3.w1", ("w1", "w2", "w3"), "moe.experts[3].gate"),
        ("block_sparse_moe.experts.3.w3", ("w1", "w2", "w3"), "moe.experts[3].up"),
        ("block_sparse_moe.experts.3.w2", ("w1", "w2", "w3"), "moe.experts[3].down"),
        ("ffn.w1", ("w1", "w2"), "ffn.up"),
        ("mlp.router.classifier", (), "moe.router"),
        ("attn.qkv", (), "attention.qkv"),
        ("attn.proj", (), "attention.output"),
        ("attn1.to_out.0", (), "attention.output"),
        ("encoder_attn.out_proj", (), "cross_attention.output"),
        ("crossattention.self.key", (), "cross_attention.key"),
        ("mlp.zebra", (), "unknown"),
    ],
)
def test_names_of_other_libraries(path, siblings, role):
    assert role_of(path, kind="linear", siblings=siblings, in_block=True, beside_experts=False) == role


@pytest.mark.parametrize("family", ["llama", "phi3", "t5-gated", "mixtral"])
def test_gate_is_the_activated_half(family):
    # act(g) * u is odd in the half u, not in the half g
    module = build(family)
    split_experts(module)
    name = "moe.experts[0]" if family == "mixtral" else "ffn"
    gate, up = (
        next(part for part in anatomy.of(module).maps() if part.role == f"{name}.{half}") for half in ("gate", "up")
    )
    parent = module.get_submodule(up.path.rpartition(".")[0])
    x = inputs_like(up.shape[1])

    def flipped(part: Map) -> Tensor:
        set_rows(module, part, -1.0)
        out = parent(x).detach()
        set_rows(module, part, -1.0)
        return out

    out = parent(x).detach()
    torch.testing.assert_close(flipped(up), -out)
    assert not torch.allclose(flipped(gate), -out, rtol=1e-2)


def inputs_like(width: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["gpt-neox", "falcon"])
def test_interleaved_heads_stay_in_one_piece(family):
    fused = [part for part in anatomy.of(build(family)).maps() if part.role == "attention.qkv"]
    assert [part.rows for part in fused] == [None, None]


@families
def test_replacing_every_layer_by_itself_changes_nothing(family):
    module = build(family)
    expected = run(module, family)
    split_experts(module)
    before = anatomy.of(module)
    compact = copy.deepcopy(module)
    for part in before.layers():
        anatomy.replace(compact, part.path, Dense(anatomy.matrix(module, part).clone()))
    torch.testing.assert_close(run(compact, family), expected, rtol=1e-4, atol=1e-5)
    dense = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
    assert not [path for path, layer in compact.named_modules() if isinstance(layer, dense)]
    # the anatomy of the compact model is the same, but for how layers store their maps
    after = anatomy.of(compact)
    assert [(p.name, p.role, p.rows, p.shape, p.input_group, p.tied_to) for p in after.maps()] == [
        (p.name, p.role, p.rows, p.shape, p.input_group, p.tied_to) for p in before.maps()
    ]
    assert (after.norms, after.unknown, after.tied) == (before.norms, before.unknown, before.tied)
    assert [block.path for block in after.blocks] == [block.path for block in before.blocks]
    for part in before.maps():
        assert torch.equal(anatomy.matrix(compact, part), anatomy.matrix(module, part))


@families
def test_replacement_is_felt(family):
    module = build(family)
    split_experts(module)
    expected = run(module, family)
    for part in anatomy.of(module).layers():
        if part.role not in ("token_type_embedding",):  # every token is of type 0 here
            changed = copy.deepcopy(module)
            anatomy.replace(changed, part.path, Dense(anatomy.matrix(module, part) * -2))
            assert not torch.equal(run(changed, family), expected), part.name


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_head_shares_the_weight_object(family):
    module = build(family)
    found = anatomy.of(module)
    assert found.embedding is not None
    assert found.head is not None
    assert found.head.tied_to == found.embedding.name
    assert [part for part in found.layers() if part.role in ("head", "embedding")] == [found.embedding]
    weight = LowRank.nearest(anatomy.matrix(module, found.embedding), rank=4)
    anatomy.replace(module, found.head.path, weight)  # by either path
    assert module.get_submodule(found.embedding.path).weight is weight
    assert module.get_submodule(found.head.path).weight is weight
    run(module, family)


@pytest.mark.parametrize("family", STACKED)
def test_split_experts_keep_the_function_and_the_roles(family):
    module = build(family)
    expected, before = run(module, family), anatomy.of(module)
    assert all(not part.replaceable for part in before.maps() if part.kind == "expert-stack")
    matrices = {part.role: anatomy.matrix(module, part) for part in before.blocks[1].maps}
    paths = split_experts(module)
    assert paths
    assert all(isinstance(module.get_submodule(path), SplitExperts) for path in paths)
    torch.testing.assert_close(run(module, family), expected, rtol=1e-4, atol=1e-5)
    after = anatomy.of(module)
    assert Counter(part.role for part in after.maps()) == ROLES[family]
    assert "expert-stack" not in {part.kind for part in after.maps()}
    for part in after.blocks[1].maps:
        assert torch.equal(anatomy.matrix(module, part), matrices[part.role])
    assert split_experts(module) == ()


def test_experts_with_a_gate_of_their_own_are_refused_whole():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 64, "head_dim": 8}
    options |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "layer_types": ["full_attention"]}
    module = GptOssForCausalLM(GptOssConfig(**options))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts: GptOssExperts .* leave its experts dense"):
        split_experts(module)
    found = anatomy.of(module)
    interleaved = [part for part in found.maps() if part.role == "moe.experts[2].gate_up"]
    assert [(part.rows, part.shape) for part in interleaved] == [(None, (32, 32))]
    assert torch.equal(anatomy.matrix(module, interleaved[0]), module.model.layers[0].mlp.experts.gate_up_proj[2].T)


def test_torch_attention_is_seen_but_left_alone():
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    module = nn.TransformerDecoder(layer, 2).eval()
    found = anatomy.of(module)
    assert Counter(part.role for part in found.maps()) == twice(ATTENTION + CROSS + PLAIN)
    assert {part.role for part in found.layers()} == {"ffn.up", "ffn.down"}
    assert [block.path for block in found.blocks] == ["layers.0", "layers.1"]
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn: MultiheadAttention reads its tensors itself"):
        anatomy.replace(module, "layers.0.self_attn", Dense(torch.zeros(48, 16)))


def test_what_has_no_role_is_listed():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "zebra": nn.Linear(4, 4)})
            self.table = nn.Parameter(torch.zeros(3, 4))

    found = anatomy.of(nn.Sequential(Odd(), Odd()))
    assert found.unknown == ("0.attention.zebra", "1.attention.zebra", "0.table", "1.table")
    assert [part.role for part in found.maps()] == ["attention.query", "unknown"] * 2


def test_the_embedding_keeps_its_scale():
    module = build("gemma3")
    found = anatomy.of(module)
    layer = module.get_submodule(found.embedding.path)
    anatomy.replace(module, found.embedding.path, Dense(anatomy.matrix(module, found.embedding)))
    compact = module.get_submodule(found.embedding.path)
    assert compact.factor == pytest.approx(32**0.5, rel=1e-6)
    tokens = torch.arange(10)
    torch.testing.assert_close(compact(tokens), layer(tokens))


@pytest.mark.parametrize(
    ("family", "path", "weight", "error", "words"),
    [
        ("llama", "model.layers.0.nowhere", (4, 4), ModelError, "no linear map lies there"),
        ("llama", "", (4, 4), ModelError, "the model itself: no linear map"),
        ("llama", "model.norm", (4, 4), ModelError, "no linear map lies there"),
        ("llama", "lm_head", (32, 64), ShapeError, r"lm_head: a weight of shape \(32, 64\) for .* \(64, 32\)"),
        ("mixtral", "model.layers.0.mlp.experts", (96, 32), ModelError, "split_experts"),
        ("mixtral", "model.layers.0.mlp.gate", (4, 32), ModelError, "MixtralTopKRouter reads its tensors itself"),
        ("opt", "model.decoder.embed_positions", (66, 32), ModelError, "leave it dense"),
    ],
)
def test_what_cannot_be_replaced_says_so(family, path, weight, error, words):
    module = build(family)
    with pytest.raises(error, match=words):
        anatomy.replace(module, path, Dense(torch.zeros(weight)))
    torch.testing.assert_close(run(module, family), run(build(family), family))


def test_vision_families_have_no_tokens():
    for family in sorted(VISION):
        found = anatomy.of(build(family))
        assert (found.embedding, found.head) == (None, None)
        assert "input_ids" not in inputs(family)
