"""quantize.awq, quantize.smoothquant and quantize.bias_correction, and the proof that a fold is exact."""

import copy
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, build, inputs, run
from reference.gptq import minmax_grid, nearest

from pennyweight import model as models
from pennyweight.calibrate import collect
from pennyweight.errors import DataError, FormError, OptionError
from pennyweight.lever import make
from pennyweight.levers.quantize.awq import AWQ, best_scale, candidate_scales, clipped
from pennyweight.levers.quantize.bias_correction import BiasCorrection, mean_inputs
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.levers.quantize.smoothquant import SmoothQuant
from pennyweight.model import anatomy
from pennyweight.model.loading import of_module
from pennyweight.solvers.folding import fold, sources
from pennyweight.solvers.rounding import GridOptions
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, Diagonal, Product, Quantized
from pennyweight.work import Work

ATTENTION = [family for family in FAMILIES if not family.startswith("plain") and family != "resnet"]


def loaded(family, seed=0):
    return of_module(build(family, seed))


def work(found, family, *, blocks=True):
    maps = tuple(m for m in found.anatomy.layers() if m.block is not None or not blocks)
    return Work(model=found, windows=inputs(family), maps=maps)


@dataclass(frozen=True, kw_only=True)
class Exact(Work):
    """Statistics in single precision, where bfloat16 is the default."""

    def statistics(self, needs, **options):
        return collect(self.model, self.inputs("test"), needs=needs, dtype=torch.float32)


def outliers(found):
    """Two channels of every norm thirty times as large, as in trained language models; the maps behind them mend it."""
    with torch.no_grad():
        for path in found.anatomy.norms:
            norm = found.module.get_submodule(path)
            norm.weight[3:5] *= 30
    return found


# --- folding


@pytest.mark.parametrize("family", ATTENTION)
def test_folding_changes_no_output(family):
    found = loaded(family)
    wanted, g = run(found.module, family), torch.Generator().manual_seed(0)
    widths = {layer.input_group: layer.shape[1] for layer in found.anatomy.layers()}
    known = sources(found, inputs(family))
    assert known
    scales = {group: torch.rand(widths[group], generator=g) * 3 + 0.3 for group in known}
    held = {name: tensor.clone() for name, tensor in found.module.state_dict().items()}
    assert fold(found, inputs(family), scales) == set(known)
    for source in known.values():
        assert not torch.equal(found.module.state_dict()[f"{source.path}.weight"], held[f"{source.path}.weight"])
    after = run(found.module, family)
    assert (after - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_norm_that_feeds_the_residual_stream_is_no_source():
    known = sources(loaded("bert"), inputs("bert"))
    assert {source.kind for source in known.values()} == {"linear"}  # values and outputs of attention alone


@pytest.mark.parametrize(
    ("family", "group", "path", "kind"),
    [
        ("llama", "self_attn.q_proj", "input_layernorm", "norm"),
        ("llama", "mlp.gate_proj", "post_attention_layernorm", "norm"),
        ("llama", "mlp.down_proj", "mlp.up_proj", "linear"),  # silu(gate) * up
        ("llama", "self_attn.o_proj", None, None),  # one value head serves two query heads
        ("gemma2", "self_attn.q_proj", "input_layernorm", "offset norm"),  # scales by 1 + weight
        ("opt", "fc2", "fc1", "linear"),  # relu
        ("vit", "mlp.fc2", None, None),  # gelu
        ("vit", "attention.o_proj", "attention.v_proj", "linear"),
        ("mixtral", "mlp.gate", None, None),
    ],
)
def test_sources_are_what_the_architecture_says(family, group, path, kind):
    found = loaded(family)
    block = found.anatomy.blocks[1].path
    source = sources(found, inputs(family)).get(f"{block}.{group}")
    assert (source and (source.path, source.kind)) == (path and (f"{block}.{path}", kind))


def test_a_norm_that_a_router_reads_as_well_is_no_source():
    found = loaded("mixtral")
    assert all("post_attention" not in source.path for source in sources(found, inputs("mixtral")).values())


# --- AWQ


def plain_awq(x, matrices, bits, group_size):
    """The search as the official code runs it, on activations, with its own rounding."""
    mean, best, found = x.abs().mean(0), float("inf"), None
    for step in range(20):
        scale = mean.pow(step / 20).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for matrix in matrices:
            w = matrix * scale
            rounded = torch.empty_like(w)
            for start in range(0, w.shape[1], group_size):
                part = w[:, start : start + group_size]
                step_size, zero = minmax_grid(part, bits)
                rounded[:, start : start + group_size] = torch.stack(
                    [nearest(column, step_size, zero, bits) for column in part.T], 1
                )
            error += float((x @ (rounded / scale - matrix).T).double().square().sum())
        if error < best:
            best, found = error, scale
    return found


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_scales_are_those_of_a_plain_search_on_the_activations(group, bits):
    found = outliers(loaded("llama"))
    name = f"model.layers.1.{group}"
    members = [m for m in found.anatomy.layers() if m.input_group == name]
    matrices = [anatomy.matrix(found.module, m).float() for m in members]
    seen = []
    handle = found.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(found.module, "llama")
    handle.remove()
    x = seen[0].detach().reshape(-1, members[0].shape[1])
    statistics = collect(found, inputs("llama"), needs={"second_moment", "absolute"}, dtype=torch.float32)[name]
    wanted = plain_awq(x, matrices, bits, 16)
    ours = best_scale(matrices, statistics, GridOptions(bits, 16), 20)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=0)
    assert not torch.allclose(ours, torch.ones_like(ours))  # the outliers make it choose


def test_scales_of_inputs_that_are_always_zero_are_those_of_the_smallest():
    mean = torch.tensor([0.0, 0.5, 2.0])
    for scale in candidate_scales(mean, 20):
        assert scale[0] == scale[1]
        assert bool(scale.isfinite().all())
    assert torch.equal(candidate_scales(torch.zeros(3), 20)[7], torch.ones(3))


def test_one_step_without_clipping_is_rounding_to_nearest():
    found, plain = loaded("llama"), loaded("llama")
    AWQ(bits=3, group_size=16, steps=1, clip=False).change(found, work(found, "llama"))
    for layer in work(plain, "llama").maps:
        weight = RTN(bits=3, group_size=16).solve(Dense(anatomy.matrix(plain.module, layer)), NO_STATISTICS)
        anatomy.replace(plain.module, layer.path, weight)
    assert torch.equal(run(found.module, "llama"), run(plain.module, "llama"))


def errors(found, family, changed):
    """Squared errors of the outputs of every map of ``changed``, scaled back, on the inputs of ``found``."""
    statistics = collect(found, inputs(family), dtype=torch.float32)
    wrong = {}
    for layer in work(found, family).maps:
        moment = statistics[layer.name].second_moment
        d = changed[layer.name].detach() - anatomy.matrix(found.module, layer)
        wrong[layer.name] = float(((d @ moment) * d).sum())
    return wrong


def test_on_outliers_it_beats_rounding_to_nearest_and_clipping_helps_further():
    original = outliers(loaded("llama"))
    found = {}
    for name, lever in {
        "rtn": AWQ(bits=3, group_size=16, steps=1, clip=False),
        "awq": AWQ(bits=3, group_size=16, clip=False, fold=False),
        "clip": AWQ(bits=3, group_size=16, fold=False),
    }.items():
        changed = copy.deepcopy(original)
        lever.change(changed, work(changed, "llama"))
        whole = {m.name: changed.module.get_submodule(m.path).weight.dense() for m in work(original, "llama").maps}
        found[name] = errors(original, "llama", whole)
    total = {name: sum(wrong.values()) for name, wrong in found.items()}
    assert total["clip"] < 0.98 * total["awq"] < 0.9 * total["rtn"]
    groups = {m.name: m.input_group for m in work(original, "llama").maps}
    for group in set(groups.values()):
        rtn, awq = (sum(found[k][n] for n in groups if groups[n] == group) for k in ("rtn", "awq"))
        assert awq <= 1.002 * rtn  # a scale of ones is among those tried; the diagonal is stored in two bytes


@pytest.mark.parametrize("columns", [32, 40])
def test_clipping_takes_the_best_of_the_ten_ranges_of_each_group(columns):
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, columns, generator=g) * (1 + 4 * (torch.rand(6, columns, generator=g) > 0.9))
    x = torch.randn(64, columns, generator=g)
    options = GridOptions(3, 16)
    ours = clipped(matrix, x.T @ x / 64, options)
    for start in range(0, columns, 16):
        part, seen = matrix[:, start : start + 16], x[:, start : start + 16]
        for row in part.unbind(0):
            losses = []
            for i in range(10):
                tried = row.clamp(-row.abs().max() * (1 - i / 20), row.abs().max() * (1 - i / 20))
                scale, zero = minmax_grid(tried[None], 3)
                moved = torch.stack([nearest(v, scale[0], zero[0], 3) for v in tried]) - row
                losses.append((float((seen @ moved).square().mean()), tried))
            best = min(losses, key=lambda pair: pair[0])[1]
            there = ours[:, start : start + 16]
            assert any(torch.allclose(best, other) for other in there)


def test_what_cannot_be_folded_stays_a_diagonal_and_survives_a_file(tmp_path):
    found = outliers(loaded("llama"))
    AWQ(bits=4, group_size=16).change(found, work(found, "llama"))
    kept = found.module.get_submodule("model.layers.0.self_attn.o_proj").weight
    assert isinstance(kept, Product)
    assert isinstance(kept.terms[1], Diagonal)
    folded = found.module.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert isinstance(folded, Quantized)
    assert kept.cost().bytes == folded.cost().bytes + 2 * 32
    models.save(found, tmp_path / "saved")
    assert torch.equal(run(models.load(tmp_path / "saved").module, "llama"), run(found.module, "llama"))


def test_the_folded_model_is_as_near_to_the_original_as_the_one_with_diagonals():
    original = outliers(loaded("llama"))
    wanted = run(original.module, "llama")
    found = {}
    for name, options in {"plain": {"steps": 1}, "folded": {}, "diagonals": {"fold": False}}.items():
        changed = copy.deepcopy(original)
        AWQ(bits=8, group_size=16, clip=False, **options).change(changed, work(changed, "llama"))
        found[name] = float((run(changed.module, "llama") - wanted).norm() / wanted.norm())
    assert max(found["folded"], found["diagonals"]) < found["plain"] < 0.1


@pytest.mark.parametrize("lever", [AWQ(), SmoothQuant(), BiasCorrection()], ids=lambda lever: lever.lever_name)
def test_what_does_not_fit_is_refused_with_the_remedy(lever):
    found = loaded("bert")
    with pytest.raises(DataError, match=rf"{lever.lever_name}: needs calibration data"):
        lever.change(found, Work(model=found, windows=None, maps=found.anatomy.layers()))
    tables = tuple(m for m in found.anatomy.layers() if m.kind == "embedding")
    with pytest.raises(OptionError, match=rf"{lever.lever_name}: none of the {len(tables)} selected maps is a linear"):
        lever.change(found, Work(model=found, windows=inputs("bert"), maps=tables))
    first = work(found, "bert").maps[0]
    anatomy.replace(found.module, first.path, Quantized.nearest(anatomy.matrix(found.module, first), bits=4))
    with pytest.raises(FormError, match=rf"{lever.lever_name}: {first.name} is quantized already; put this step first"):
        lever.change(found, work(found, "bert"))


# --- SmoothQuant


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "vit"])
def test_smoothing_alone_changes_no_output_and_evens_out_inputs_and_weights(family):
    found = outliers(loaded(family))
    wanted = run(found.module, family)
    behind = {
        group for group, source in sources(found, inputs(family)).items() if source.kind != "linear"
    }  # before: the groups that take part
    asked = Exact(model=found, windows=inputs(family), maps=work(found, family).maps)
    SmoothQuant(bits=16, activation_bits=16).change(found, asked)
    after = run(found.module, family)
    assert (after - wanted).norm() <= 1e-5 * wanted.norm()
    statistics = collect(found, inputs(family), needs={"absolute"}, dtype=torch.float32)
    assert behind
    for group in behind:
        members = [m for m in found.anatomy.layers() if m.input_group == group]
        weight = torch.stack([anatomy.matrix(found.module, m).abs().amax(0) for m in members]).amax(0)
        # at one half, largest input and largest weight of a channel are both the root of their product
        torch.testing.assert_close(statistics[group].absolute_max, weight, rtol=1e-3, atol=1e-6)


def test_eight_bits_with_outliers_need_smoothing(tmp_path):
    original = outliers(loaded("llama"))
    wanted = run(original.module, "llama")
    found = {}
    for alpha in (0.0, 0.5):
        changed = copy.deepcopy(original)
        SmoothQuant(alpha=alpha, bits=6, activation_bits=6).change(changed, work(changed, "llama"))
        found[alpha] = float((run(changed.module, "llama") - wanted).norm() / wanted.norm())
    assert found[0.5] < 0.8 * found[0.0]
    layer = changed.module.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.activation is not None
    assert layer.weight.cost().bytes == 48 * 32 * 6 // 8 + 2 * 48
    models.save(changed, tmp_path / "saved")
    assert torch.equal(run(models.load(tmp_path / "saved").module, "llama"), run(changed.module, "llama"))


def test_narrow_activations_with_whole_weights_are_refused():
    with pytest.raises(OptionError, match="bits = 16 with narrow activations; give bits = 8, or activation_bits = 16"):
        make("quantize.smoothquant", {"bits": 16})


# --- bias correction


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mean_outputs_are_exact_on_the_calibration_data(method, tmp_path):
    found, plain, original = loaded("bert"), loaded("bert"), loaded("bert")
    given = inputs("bert") | {"attention_mask": (torch.arange(24) < torch.tensor([[24], [17]])).long()}
    seen = {}
    for layer in work(original, "bert").maps:
        original.module.get_submodule(layer.path).register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].detach()[given["attention_mask"].bool()]})
        )
    with torch.no_grad():
        original.module(**given)
    BiasCorrection(method=method, bits=2, group_size=16).change(
        found, Work(model=found, windows=given, maps=work(found, "bert").maps)
    )
    mean = mean_inputs(plain, given, work(plain, "bert").maps)
    for layer in work(plain, "bert").maps:
        x = seen[layer.name]
        torch.testing.assert_close(mean[layer.name], x.double().mean(0), rtol=1e-5, atol=1e-6)
        before, after = (m.module.get_submodule(layer.path) for m in (plain, found))
        with torch.no_grad():
            wanted, ours = before(x).double().mean(0), after(x).double().mean(0)
            bare = (x @ after.weight.dense().T + before.bias).double().mean(0)
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm()
        assert (bare - wanted).norm() > 1e-3 * wanted.norm()  # without the correction
    models.save(found, tmp_path / "saved")
    assert torch.equal(run(models.load(tmp_path / "saved").module, "bert"), run(found.module, "bert"))


def test_maps_without_a_bias_have_nothing_to_correct():
    found = loaded("llama")
    with pytest.raises(OptionError, match=r"none of the 14 selected maps has a bias to correct; use quantize.rtn"):
        BiasCorrection().change(found, work(found, "llama"))
