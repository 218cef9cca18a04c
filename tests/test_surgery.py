"""Shrunk models against the masked ones, files against what was written, and axes against index arithmetic."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import build, inputs, run
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.model import load, save
from pennyweight.model.loading import of_module, restore
from pennyweight.model.resized import resized_of
from pennyweight.surgery import Graph, masked, remove, remove_blocks, trace, without
from pennyweight.surgery import axes as ax
from pennyweight.zoo.dit import DiT, DiTConfig
from pennyweight.zoo.gpt import GPT, GPTConfig
from pennyweight.zoo.resnet import ResNet, ResNetConfig

#: Family, kind, whether the configuration has words for what is left.
CASES = [
    *(("llama", kind, True) for kind in ("ffn", "heads", "queries", "hidden")),
    *(("gpt2", kind, kind == "ffn") for kind in ("ffn", "heads", "hidden")),
    *(("bert", kind, kind == "ffn") for kind in ("ffn", "heads", "hidden")),
    *(("vit", kind, True) for kind in ("ffn", "heads", "hidden")),
    *(("resnet", kind, False) for kind in ("channels", "hidden")),
    *(("convnext", kind, False) for kind in ("ffn", "hidden")),
    *(("mixtral", kind, True) for kind in ("ffn", "heads", "hidden")),
    ("phi3", "heads", True),
    ("t5", "heads", True),
    ("qwen2-moe", "ffn", True),
    ("deepseek-v3", "latent", True),
]


def given(family: str) -> dict[str, Tensor] | tuple[Tensor]:
    found = inputs(family)
    return (found["pixel_values"],) if family.startswith("plain") else found


def most(graph: Graph, kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    found = graph.of(kind)
    assert found, kind
    kept = {}
    for one in found:
        order = torch.randperm(one.size, generator=generator)
        kept[one] = order[: one.size - max(1, one.size // 4)].sort().values
    return kept


@pytest.mark.parametrize(("family", "kind", "plain"), CASES)
def test_a_shrunk_model_gives_what_the_masked_one_gives_and_survives_a_file(family, kind, plain, tmp_path):
    module = build(family)
    before = sum(parameter.numel() for parameter in module.parameters())
    graph = trace(module, given(family))
    kept = most(graph, kind)
    masks = {one.axis: torch.zeros(one.size, dtype=torch.bool).index_fill(0, stay, True) for one, stay in kept.items()}
    wanted = masked(module, graph, masks, given(family))[0]
    assert remove(module, graph, kept, given(family)) < 1e-5 * float(wanted.abs().max()) + 1e-6
    assert sum(parameter.numel() for parameter in module.parameters()) < before
    found = run(module, family)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, run(build(family), family), atol=1e-3)  # something did go
    assert (not resized_of(module)) == plain
    save(of_module(module), tmp_path / "model")
    assert torch.equal(run(load(tmp_path / "model").module, family), found)
    if plain:
        opened = getattr(transformers, type(module).__name__).from_pretrained(tmp_path / "model")
        assert torch.equal(run(opened.eval(), family), found)
    else:
        with pytest.raises(ModelError, match="sizes that its configuration cannot say"):
            save(of_module(module), tmp_path / "dense", dense=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "convnext", "gemma3", "deepseek-v3"])
def test_a_model_without_a_block_gives_what_it_gives_when_the_block_passes_on(family, tmp_path):
    module = build(family)
    wanted = without(module, [1], given(family))[0]
    remove_blocks(module, [1], given(family))
    assert torch.equal(run(module, family), wanted)
    save(of_module(module), tmp_path / "model")
    assert torch.equal(run(load(tmp_path / "model").module, family), wanted)
    if family != "convnext":  # its stages are of one length each
        opened = getattr(transformers, type(module).__name__).from_pretrained(tmp_path / "model")
        assert opened.config.num_hidden_layers == 1
        assert torch.equal(run(opened.eval(), family), wanted)


def test_heads_and_units_that_are_gone_are_those_whose_share_is_taken_away():
    """By hooks on what the second map of each pair reads: this shares no code with the trace."""
    module = build("llama").double()
    layer = module.model.layers[0]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: (x[0] * heads,)),
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: (x[0] * units,)),
    ]
    heads, units = torch.ones(32).double(), torch.ones(48).double()
    heads[16:], units[[3, 47]] = 0, 0  # key head 1 serves query heads 2 and 3, of 8 each
    wanted = run(module, "llama")
    for handle in handles:
        handle.remove()
    graph = trace(module, given("llama"))
    (head,), (unit,) = graph.of("heads", 0), graph.of("ffn", 0)
    stay = torch.ones(48, dtype=torch.bool)
    stay[[3, 47]] = False
    remove(module, graph, {head: torch.tensor([0]), unit: stay}, given("llama"))
    torch.testing.assert_close(run(module, "llama"), wanted, rtol=1e-10, atol=1e-12)
    assert layer.self_attn.k_proj.weight.shape == (8, 32)
    assert layer.mlp.gate_proj.out_features == 46


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_queries_that_are_gone_are_gone_where_some_tokens_are_padding(layers, tmp_path):
    """Attention with a mask reads how many queries share a key, which attention without one need not."""
    ids = inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}

    def found(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(**padded).logits[mask.bool()]

    module = build("llama").double()
    heads = torch.ones(4, 8).double()
    heads[[0, 3]] = 0  # the first query of the first key, the second one of the other
    handles = [
        module.model.layers[at].self_attn.o_proj.register_forward_pre_hook(lambda _, x: (x[0] * heads.flatten(),))
        for at in layers
    ]
    wanted = found(module)
    for handle in handles:
        handle.remove()
    graph = trace(module, given("llama"))
    (head,) = graph.of("queries", layers[0])
    assert head.size == 2
    for at in layers:
        with torch.no_grad():  # which queries go is one choice for all keys: exchange those of the second key
            for layer, dim in ((module.model.layers[at].self_attn.q_proj, 0),
                               (module.model.layers[at].self_attn.o_proj, 1)):  # fmt: skip
                first, second = layer.weight.narrow(dim, 16, 8).clone(), layer.weight.narrow(dim, 24, 8).clone()
                layer.weight.narrow(dim, 16, 8).copy_(second)
                layer.weight.narrow(dim, 24, 8).copy_(first)
    remove(module, graph, {one: torch.tensor([1]) for at in layers for one in graph.of("queries", at)}, given("llama"))
    torch.testing.assert_close(found(module), wanted, rtol=1e-10, atol=1e-12)
    assert (not resized_of(module)) == (len(layers) == 2)
    save(of_module(module), tmp_path)
    torch.testing.assert_close(found(load(tmp_path).module.double()), wanted, rtol=1e-6, atol=1e-7)


def test_widths_that_a_configuration_refuses_are_saved_beside_it(tmp_path):
    module = build("llama")
    graph = trace(module, given("llama"))
    (stream,) = graph.of("hidden")
    remove(module, graph, {stream: torch.arange(30)}, given("llama"))  # 4 heads do not divide them
    assert resized_of(module)
    save(of_module(module), tmp_path)
    assert torch.equal(run(load(tmp_path).module, "llama"), run(module, "llama"))


def test_uneven_layers_and_missing_blocks_live_in_one_file(tmp_path):
    module = build("qwen2")
    for blocks in ((), (0,)):
        graph = trace(module, given("qwen2"))
        units = graph.of("ffn")[-1]
        remove(module, graph, {units: torch.arange(units.size - 5)}, given("qwen2"))
        remove_blocks(module, blocks, given("qwen2"))
    assert module.config.num_hidden_layers == 1
    assert len(module.config.layer_types) == 1
    save(of_module(module), tmp_path)
    back = load(tmp_path).module
    assert torch.equal(run(back, "qwen2"), run(module, "qwen2"))
    assert back.model.layers[0].mlp.down_proj.in_features == 38


def noise_and_text() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.3, 0.8]), torch.tensor([[0, 4], [0, 7]])


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_networks_of_no_library_shrink_and_are_restored(kind, tmp_path):
    def made() -> DiT:
        module = DiT(DiTConfig(depth=2, width=32), generator=torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        return module

    module = made()
    graph = trace(module, noise_and_text())
    assert len(graph.of("heads")) == 4  # each block attends to itself and to the text
    remove(module, graph, most(graph, kind), noise_and_text())
    remove_blocks(module, [0], noise_and_text())
    with torch.no_grad():
        wanted = module(*noise_and_text())
        save(of_module(module), tmp_path)
        assert torch.equal(restore(made(), tmp_path).module(*noise_and_text()), wanted)


def test_what_a_network_of_no_library_has():
    net = ResNet(ResNetConfig(width=4, num_channels=3), generator=torch.Generator().manual_seed(0)).eval()
    graph = trace(net, (torch.randn(2, 3, 8, 8),))
    assert [(one.kind, one.size) for one in graph.dimensions if one.kind == "channels"] == [
        ("channels", 4), ("channels", 8), ("channels", 16),
    ]  # fmt: skip
    gpt = GPT(GPTConfig(width=16, depth=2, num_heads=2, vocabulary=32, context=9)).eval()
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    kinds = [one.kind for one in trace(gpt, (tokens,)).dimensions]
    assert (kinds.count("ffn"), kinds.count("heads"), kinds.count("hidden")) == (2, 2, 1)


class UNet(nn.Module):
    """Down, across and up again, with a skip that is joined to what comes back, groups that are normed, and a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.time, self.norm = nn.Linear(4, 16), nn.GroupNorm(4, 16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        skip = torch.relu(self.enter(images))
        x = self.down(skip) + self.time(times)[:, :, None, None]
        x = x + self.outer(torch.relu(self.inner(nn.functional.silu(self.norm(x)))))
        return self.leave(torch.relu(self.join(torch.cat([self.up(x), skip], 1))))


def test_a_unet_shrinks_on_every_level_and_is_restored(tmp_path):
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 4, generator=generator)
    module = UNet().eval()
    graph = trace(module, given)
    found = [one for one in graph.dimensions if one.kind in ("channels", "hidden")]
    assert {one.size for one in found} >= {8, 24}  # the skip, what comes up, the inside; groups of the norm stay whole
    kept = {one: torch.arange(one.size)[one.size // 4 :] for one in found}
    masks = {one.axis: torch.zeros(one.size, dtype=torch.bool).index_fill(0, stay, True) for one, stay in kept.items()}
    wanted = masked(module, graph, masks, given)[0]
    assert remove(module, graph, kept, given) < 1e-5
    assert (module.enter.out_channels, module.inner.out_channels, module.join.in_channels) == (6, 18, 12)
    with torch.no_grad():
        torch.testing.assert_close(module(*given), wanted, rtol=1e-4, atol=1e-5)
        save(of_module(module), tmp_path)
        assert torch.equal(restore(UNet(), tmp_path).module(*given), module(*given))


class Unknown(nn.Module):
    """Something that no rule knows stands behind its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.linalg.qr(self.first(x)).R)


def test_what_is_not_understood_stays():
    assert trace(Unknown().eval(), (torch.randn(7, 4),)).of("ffn") == ()


def test_errors_name_what_is_there_and_leave_the_model_as_it_was():
    module = build("llama")
    before, graph = run(module, "llama"), trace(module, given("llama"))
    units = graph.of("ffn", 1)[0]
    with pytest.raises(OptionError, match=r"ffn of model\.layers\.1\..* has indices 0 to 47, not \[48\]"):
        remove(module, graph, {units: torch.tensor([48])}, given("llama"))
    with pytest.raises(OptionError, match="keep at least one"):
        remove(module, graph, {units: torch.zeros(48, dtype=torch.bool)}, given("llama"))
    with pytest.raises(OptionError, match=r"blocks \[0, 1\] of 2; give some of 0 to 1, and leave one"):
        remove_blocks(module, [0, 1], given("llama"))
    with pytest.raises(OptionError, match=r"blocks \[2\] of 2"):
        remove_blocks(module, [2], given("llama"))
    assert torch.equal(run(module, "llama"), before)


class Stubborn(nn.Module):
    """Its code has a size written into it that no attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[..., :6] / self.first(x).shape[-1])


def test_a_model_whose_code_needs_its_sizes_is_put_back():
    module, x = Stubborn().eval(), (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),)
    before, graph = module(*x), trace(module, x)
    (units,) = graph.of("ffn") or graph.of("hidden")
    with pytest.raises(ModelError, match=r"without .* the model differs from the masked one by"):
        remove(module, graph, {units: torch.arange(4)}, x)
    assert torch.equal(module(*x), before)
    assert module.first.out_features == 6


def test_what_a_kernel_refuses_is_said_and_put_back():
    module = build("mixtral")
    before, graph = run(module, "mixtral"), trace(module, given("mixtral"))
    units = graph.of("ffn", 0)[0]
    with pytest.raises(ModelError, match=r"does not run without ffn of .*\(.*multiple of 16.*\); keep other numbers"):
        remove(module, graph, {units: torch.arange(47)}, given("mixtral"))
    assert torch.equal(run(module, "mixtral"), before)


def test_axes_that_are_cut_and_joined_keep_their_indices():
    qkv, heads = ax.Axis(24), ax.Axis(4)
    query, key, _ = ax.split_concat(qkv, [8, 8, 8])
    for part in (query, key):
        ax.unify(ax.split_product(part, [4, 2])[0], heads)
    masks = {ax.find(heads): torch.tensor([True, False, True, True])}
    one = [True, True, False, False, True, True, True, True]
    assert ax.mask_of(qkv, masks).tolist() == one + one + [True] * 8
    assert ax.unit_of(qkv, ax.find(heads)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 2 + [-1] * 8


def test_axes_that_cannot_be_told_apart_are_locked():
    one, other = ax.Axis(6), ax.Axis(6)
    ax.split_product(one, [2, 3])
    ax.split_product(other, [3, 2])
    ax.unify(one, other)
    assert all(leaf.locked for axis in (one, other) for leaf in ax.leaves(axis))
