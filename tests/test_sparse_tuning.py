"""prune.spa, prune.pst, prune.dsee: closed forms of what they start from and end with, and runs that are saved."""

import copy

import families
import pytest
import torch
import toys
from torch import nn
from torch.nn import functional

from pennyweight.apply import apply
from pennyweight.errors import ModelError, OptionError
from pennyweight.lever import make
from pennyweight.levers.prune.dsee import DSEE, low_rank_and_sparse
from pennyweight.levers.prune.l0 import L0, Gate, Lagrangian, Size, _fold, prompted
from pennyweight.levers.prune.pst import PST, Scored
from pennyweight.levers.prune.spa import SPA
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.solvers.sparse_tuning import Adapted
from pennyweight.solvers.structured_adapters import Shape, StructuredAdapters
from pennyweight.surgery import trace
from pennyweight.train.masked import open_probability
from pennyweight.weights import CompactConv2d, Sparse, Sum
from pennyweight.work import Work
from pennyweight.zoo.resnet import ResNet, ResNetConfig


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama():
    return Model(families.build("llama"), None, "llama", kind="causal-lm")


def ids(count=8, length=24):
    return torch.randint(3, families.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def work(model, seed=0):
    return Work(model=model, windows=ids(), maps=model.anatomy.layers(), seed=seed)


def matrices(model):
    inside = [one for one in model.anatomy.layers() if one.block is not None]
    return {one.path: anatomy.matrix(model.module, one).clone() for one in inside}


# --- row 239: adapters pruned with what they adapt


def test_an_update_at_the_center_of_a_kernel_is_a_convolution_of_one_position_beside_it():
    layer, up, down = nn.Conv2d(6, 10, 3, padding=1), draw(10, 4), draw(4, 6, seed=1)
    adapted = CompactConv2d.of(layer, Adapted(layer.weight.flatten(1), up=up, down=down, positions=9))
    x = draw(2, 6, 7, 7, seed=2)
    wanted = layer(x) + functional.conv2d(x, (up @ down)[..., None, None])
    torch.testing.assert_close(adapted(x), wanted, rtol=1e-5, atol=1e-5)


def test_prototypes_in_blocks_are_a_sum_of_kronecker_products():
    weights, left, right = draw(3, 2, 4), draw(3, 5, 2, seed=1), draw(3, 2, 5, seed=2)
    adapted = Adapted(torch.zeros(10, 20), blocks=(weights, nn.Parameter(left), nn.Parameter(right)))
    wanted = sum(torch.kron(weights[k].contiguous(), left[k] @ right[k]) for k in range(3))
    torch.testing.assert_close(adapted.dense(), wanted)


def test_a_pruned_adapter_is_the_masked_one():
    adapted = Adapted(draw(8, 12), up=draw(8, 3, seed=1), down=draw(3, 12, seed=2))
    rows, columns = torch.arange(8) % 3 > 0, torch.arange(12) % 2 > 0
    adapted.rows_kept.copy_(rows)
    adapted.columns_kept.copy_(columns)
    small = Adapted(
        adapted.matrix[rows][:, columns], up=adapted.up.detach()[rows], down=adapted.down.detach()[:, columns]
    )
    torch.testing.assert_close(adapted.dense()[rows][:, columns], small.dense(), rtol=0, atol=1e-6)
    assert not adapted.dense()[~rows].any()
    assert not adapted.dense()[:, ~columns].any()


@pytest.mark.parametrize("kind", ["splora", "splopa", "none"])
def test_a_network_starts_as_it_was_and_ends_as_its_masked_self(kind):
    module = ResNet(ResNetConfig(width=8), generator=torch.Generator().manual_seed(0)).eval()
    twin, x = copy.deepcopy(module), draw(3, 1, 8, 8, seed=1)
    graph = trace(module, [x])
    paths = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 1]
    adapters = StructuredAdapters(module, paths, graph, graph.of("channels"), Shape(kind=kind, rank=4, block=8), seed=1)
    with torch.no_grad():
        torch.testing.assert_close(module(x), twin(x))
        for one in adapters.parameters:
            one.add_(0.05 * draw(*one.shape, seed=2))
        adapters.keep(0.5)
        masked = module(x)
        assert float((masked - twin(x)).abs().max()) > 1e-2
        learned = adapters.learned()
        assert adapters.finish([x]) < 1e-4 * float(masked.abs().max())
        torch.testing.assert_close(module(x), masked, rtol=1e-4, atol=1e-4)
    for block, before in zip(module.blocks, twin.blocks, strict=True):
        assert block.first.out_channels == before.first.out_channels // 2 == block.second.in_channels
    convs = sum(module.get_submodule(path).weight.numel() for path in paths)
    assert (learned == convs) if kind == "none" else (0 < learned)
    if kind == "splora":  # rank 4: rows and columns that stayed
        assert learned == sum(4 * sum(module.get_submodule(path).weight.shape[:2]) for path in paths)


@pytest.mark.parametrize("units", ["ffn", "heads"])
def test_spa_leaves_a_smaller_plain_model(units, tmp_path):
    model = llama()
    before = model.module.config.intermediate_size
    SPA(units=units, rank=2, steps=6, batch=4, sparsity=0.5).change(model, work(model))
    shapes = {one.path: one.shape for one in anatomy.of(model.module).layers()}
    down = next(shape for path, shape in shapes.items() if path.endswith("0.mlp.down_proj"))
    assert down[1] == (before // 2 if units == "ffn" else before)
    assert not [part for part in model.module.modules() if isinstance(part, Adapted)]


# --- row 140: learned scores


def test_at_first_the_mask_is_that_of_the_largest_weights():
    layer = Scored(draw(20, 30), rank=4, score_rank=3, generator=torch.Generator().manual_seed(0))
    layer.sparsity = 0.9
    wanted = torch.zeros(600)
    top = layer.matrix.abs().flatten().topk(60).indices
    wanted[top] = layer.matrix.flatten()[top]
    assert torch.equal(layer.dense().detach().flatten(), wanted)


def test_gradients_are_those_of_the_official_expression():
    layer = Scored(draw(6, 9), rank=2, score_rank=2, beta=0.7, alpha=(0.5, 1.5), generator=torch.Generator())
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(0.3 * draw(*one.shape, seed=3))
    layer.sparsity, probe = 0.5, draw(6, 9, seed=4)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad((layer.dense() * probe).sum(), list(layer.parameters()))
    leaf = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    weight = layer.matrix + 0.7 * leaf["up"] @ leaf["down"]
    lines = leaf["score_rows"] @ torch.ones(1, 9) + torch.ones(6, 1) @ leaf["score_columns"][None]
    scores = weight.abs() + 0.5 * leaf["score_up"] @ leaf["score_down"] + 1.5 * lines
    mask = (scores >= scores.flatten().sort().values[27]).float()
    through = mask + scores - scores.detach()  # straight through
    wanted = torch.autograd.grad((through * weight * probe).sum(), [leaf[name] for name in names])
    for name, one, other in zip(names, found, wanted, strict=True):
        assert float(one.norm()) > 0, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pst_leaves_sparse_matrices_of_the_share_asked_for_and_trains_little():
    model = llama()
    before = matrices(model)
    lever = PST(sparsity=0.8, rank=2, score_rank=2, steps=20, batch=4, rate=1e-2)
    layer = lever.layer(before["model.layers.0.mlp.up_proj"], torch.Generator())
    assert layer.learned == 4 * sum(layer.shape) + sum(layer.shape)
    lever.change(model, work(model))
    moved = 0
    for path, matrix in before.items():
        weight = model.module.get_submodule(path).weight
        assert isinstance(weight, Sparse)
        assert weight.kept == matrix.numel() - round(0.8 * matrix.numel())
        by_size = matrix.abs().flatten().topk(weight.kept).indices.sort().values
        moved += int((weight.mask().flatten().nonzero().flatten() != by_size).sum())
    assert moved > 0  # some masks are no longer those of magnitude


# --- row 142: sparse and low rank


def test_spikes_on_a_matrix_of_low_rank_are_found():
    low = draw(64, 6) @ draw(6, 48, seed=1)
    places = torch.randperm(64 * 48, generator=torch.Generator().manual_seed(2))[:64]
    spikes = torch.zeros(64 * 48).index_copy(0, places, 12 * draw(64, seed=3).sign()).view(64, 48)
    found, sparse = low_rank_and_sparse(low + spikes, rank=6)
    best = sparse.abs().flatten().topk(64).indices
    assert len(set(best.tolist()) & set(places.tolist())) >= 61
    assert float((found - low).norm()) < 0.05 * float(low.norm())


@pytest.mark.parametrize("support", ["grebsmo", "magnitude", "random"])
def test_no_free_entries_are_lora_and_the_start_is_the_matrix_itself(support):
    matrix = draw(16, 24)
    layer = DSEE(rank=4, alpha=8.0, free=10, support=support).layer(matrix, torch.Generator().manual_seed(0), 5)
    assert torch.equal(layer.dense(), matrix)
    assert len(layer.places.unique()) == 10
    lora = DSEE(rank=4, alpha=8.0, free=0).layer(matrix, torch.Generator().manual_seed(0), 5)
    with torch.no_grad():
        lora.down.copy_(draw(4, 24, seed=1))
    torch.testing.assert_close(lora.dense(), matrix + 2 * lora.up @ lora.down)
    assert lora.learned == 4 * 40
    assert layer.learned == 4 * 40 + 10


@pytest.mark.parametrize("masked", ["weight", "sum"])
def test_what_is_left_is_what_was_trained(masked):
    lever = DSEE(rank=3, free=12, masked=masked, sparsity=0.5, dtype="float32", support="random")
    layer = lever.layer(draw(10, 20), torch.Generator().manual_seed(0), 1)
    with torch.no_grad():
        for one in (layer.down, layer.values):
            one.copy_(draw(*one.shape, seed=2))
    lever.prune_weights(layer)
    frozen, x = lever.frozen(layer), draw(5, 20, seed=3)
    assert isinstance(frozen, Sum if masked == "weight" else Sparse)
    torch.testing.assert_close(frozen(x), layer(x), rtol=1e-4, atol=1e-4)
    sparse = frozen.terms[0] if masked == "weight" else frozen
    assert sparse.kept == 100
    if masked == "weight":  # the update revives no weight: it lies beside them
        assert not sparse.dense()[~layer.mask].any()
        assert frozen.terms[2].kept == 12


def test_dsee_takes_heads_away():
    model = llama()
    heads = model.module.config.num_key_value_heads
    DSEE(prune="heads", sparsity=0.5, rank=2, free=8, steps=4, retune_steps=2, batch=4).change(model, work(model))
    shapes = {one.path: one.shape for one in anatomy.of(model.module).layers()}
    key = next(shape for path, shape in shapes.items() if path.endswith("0.self_attn.k_proj"))
    assert key[0] == model.module.config.head_dim * (heads - heads // 2)
    with torch.no_grad():
        assert bool(torch.isfinite(model.module(ids()).logits).all())


# --- all of them


STEPS = {
    "prune.pst": "{sparsity: 0.5, rank: 2, score_rank: 2, steps: 4}",
    "prune.dsee": "{rank: 2, free: 8, steps: 3, retune_steps: 2}",
    "prune.spa": "{rank: 2, steps: 5}",
    "prune.l0": "{rank: 2, steps: 5, retune_steps: 2, gate_rate: 0.5}",
}


@pytest.mark.parametrize("name", STEPS)
def test_a_recipe_runs_it_and_what_is_saved_loads_again(name, tmp_path):
    model, text = toys.llama(tmp_path / "model"), toys.text_file(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"pennyweight: 1\nsteps:\n- {name}: {STEPS[name]}\n")
    fitted = apply(model, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    again = load(tmp_path / "out")
    probe = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(fitted.model.module(probe).logits, again.module(probe).logits)


@pytest.mark.parametrize(
    ("lever", "words"),
    [
        (PST(rank=500, steps=2), "prune.pst: rank = 500 for a .* matrix; give at most"),
        (DSEE(rank=0, free=0, steps=2), "no query or value with an update to tune"),
        (DSEE(free=10**9, steps=2), "free = 1000000000 of the .* entries"),
        (SPA(kind="splopa", block=7, steps=2), "blocks of 7 do not divide"),
    ],
)
def test_what_cannot_be_is_refused(lever, words):
    model = llama()
    with pytest.raises(OptionError, match=words):
        lever.change(model, work(model))
    with pytest.raises(OptionError, match="is of kind encoder"):
        lever.change(other := Model(model.module, None, "other", kind="encoder"), work(other))
    with pytest.raises(OptionError, match="selects no linear layer"):
        lever.change(model, Work(model=model, windows=ids(), maps=()))
    with pytest.raises(OptionError, match=r"sparsity = 2\.0 is out of range"):
        make(lever.lever_name, {"sparsity": 2.0})


# --- row 147: gates


def gated(**options):
    model, lever = llama(), L0(rank=2, steps=12, batch=4, gate_rate=0.5, **options)
    return model, lever


def test_the_expected_size_is_that_of_drawn_gates():
    model = llama()
    graph = trace(model.module, [ids(2)])
    gates = [Gate(one) for one in graph.dimensions if one.kind in ("heads", "ffn", "hidden")]
    inside = [name for name in graph.axes if ".layers." in name]
    size = Size(graph, inside, gates)
    held = dict(model.module.named_parameters())
    assert float(size.of(lambda gate: torch.ones(gate.dimension.size))) == sum(held[name].numel() for name in inside)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.copy_(torch.randn(gate.dimension.size, generator=g))
    expected, drawn = float(size.expected().detach()), []
    for _ in range(600):
        for gate in gates:
            gate.draw(g)
        drawn.append(size.settled())
    sizes = torch.tensor(drawn)
    assert abs(float(sizes.mean()) - expected) < 3 * float(sizes.std()) / 600**0.5


@pytest.mark.parametrize("hidden", [False, True])
def test_the_shrunk_model_is_the_gated_one(hidden):
    model, lever = gated(sparsity=0.4, hidden=hidden)
    with torch.no_grad():  # the toy's stream is so small that the norms' eps counts; a stream of size 1 hides it
        model.module.get_input_embeddings().weight.mul_(20)
    probe = [ids(2)]
    graph = trace(model.module, probe)
    gates = lever._gates(model.module, graph)
    inside = [one for one in model.anatomy.layers() if one.block is not None]
    plain, layers = lever._gated(model, graph, inside, gates, 0)
    size = Size(graph, [name for name in graph.axes if ".layers." in name], gates)
    whole = float(size.of(lambda gate: torch.ones(gate.dimension.size)))
    for path, layer in layers.items():
        anatomy.replace(model.module, path, layer)
    with torch.no_grad():
        for index, gate in enumerate(gates):
            gate.log_alpha.copy_(draw(gate.dimension.size, seed=index))
        gone = lever.settle(size, whole)
        assert abs(gone - 0.4) < 0.05
        wanted = model.module(*probe).logits
        _fold(model.module, plain, layers)
        lever._cut(model.module, graph, gates, probe)
        found = model.module(*probe).logits
    left = sum(p.numel() for name, p in model.module.named_parameters() if ".layers." in name)
    assert left == round((1 - gone) * whole)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()) + 1e-5


def test_l0_comes_to_its_target():
    model, lever = gated(sparsity=0.3, retune_steps=2)
    inside = [name for name, _ in model.module.named_parameters() if ".layers." in name]
    before = sum(model.module.get_parameter(name).numel() for name in inside)
    lever.change(model, work(model))
    after = sum(model.module.get_parameter(name).numel() for name in inside)
    assert abs(1 - after / before - 0.3) < 0.03  # a head of this toy is 3 % of it
    assert not hasattr(model.module, "_gates")


def test_multipliers_rise_while_the_model_is_too_large():
    model = llama()
    graph = trace(model.module, [ids(2)])
    gates = [Gate(one) for one in graph.of("ffn")]
    pressure = Lagrangian(Size(graph, [name for name in graph.axes if ".mlp." in name], gates), 0.5, 4, 0.1)
    for step in range(4):
        wanted = 0.5 * (step + 1) / 4
        gone = 1 - float(open_probability(gates[0].log_alpha).detach()[0])
        assert float(pressure.away().detach()) == pytest.approx(gone - wanted, abs=1e-3)
        pressure.step()
    first, second = pressure.multipliers.tolist()
    assert first < 0 < second  # too little goes: the penalty is on a negative difference
    (of_gate,) = torch.autograd.grad(pressure.penalty(), [gates[0].log_alpha])
    assert bool((of_gate > 0).all())  # descent closes gates


def test_a_prompt_is_seen_and_not_learned():
    module, prefix, windows = llama().module, torch.arange(3, 9), ids(4)
    found = prompted(prefix)(module, (windows,))
    whole = torch.cat([prefix.expand(4, -1), windows], 1)
    logits = module(whole).logits[:, :-1]
    each = functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found, each.view(4, -1)[:, 5:].mean())


def test_hidden_gates_are_refused_where_norms_take_means():
    model = Model(families.build("gpt2"), None, "gpt2", kind="causal-lm")
    with pytest.raises(ModelError, match="takes a mean away, which hidden gates do not fit; give hidden = false"):
        L0(hidden=True, steps=2).change(model, work(model))
