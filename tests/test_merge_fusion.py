"""Fusion by optimal transport, learned merges, and the study of merging, against oracles."""

import copy

import pytest
import scipy.optimize
import torch
from families import build, inputs

from pennyweight.cli import main
from pennyweight.errors import ModelError, OptionError
from pennyweight.merge import Linear, TaskArithmetic, whole
from pennyweight.merge.expert import importance_chunks, merge_experts, scaled, soft_cross_entropy
from pennyweight.merge.study import study
from pennyweight.merge.transport import fuse, transport
from pennyweight.model import load
from pennyweight.model.convert import permuted


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (6, 3), (4, 6), (1, 3)])
def test_an_exact_plan_costs_what_linear_programming_finds(rows, columns):
    cost = draw(1, rows, columns).abs().double()
    plan = transport(cost)
    torch.testing.assert_close(plan.sum(1), torch.full((rows,), 1 / rows, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((columns,), 1 / columns, dtype=torch.float64))
    sums = torch.cat(
        [torch.kron(torch.eye(rows), torch.ones(1, columns)), torch.kron(torch.ones(1, rows), torch.eye(columns))]
    )
    bounds = torch.tensor([1 / rows] * rows + [1 / columns] * columns, dtype=torch.float64)
    best = scipy.optimize.linprog(cost.flatten().numpy(), A_eq=sums.numpy(), b_eq=bounds.numpy())
    assert float((plan * cost).sum()) == pytest.approx(best.fun, abs=1e-6)
    soft = transport(cost, solver="sinkhorn", regularization=0.05)
    torch.testing.assert_close(soft.sum(1), torch.full((rows,), 1 / rows, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float((soft * cost).sum()) >= best.fun - 1e-9
    sharper = transport(cost, solver="sinkhorn", regularization=0.005)
    assert float((sharper * cost).sum()) <= float((soft * cost).sum()) + 1e-9
    with pytest.raises(OptionError, match="solver 'soft'"):
        transport(cost, solver="soft")


def shuffled(module, seed=3):
    """The same function, its channels, neurons and heads in another order, by code that fusion shares nothing with."""
    config = copy.deepcopy(module.config)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    other = copy.deepcopy(module)
    other.load_state_dict(permuted(module.state_dict(), config, torch.Generator().manual_seed(seed)))
    return other


@torch.no_grad()
def logits(module, family):
    return module(inputs(family)["input_ids"]).logits


def averaged(one, two):
    found, other = copy.deepcopy(two), dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_((other[name] + parameter) / 2)
    return found


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mistral"])
def test_a_permuted_copy_fuses_to_the_function_it_had_and_plain_averaging_does_not(family):
    module = build(family)
    other = shuffled(module)
    ids = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    wanted = logits(module, family)
    size = float(wanted.norm())
    assert float((logits(other, family) - wanted).norm()) < 1e-5 * size
    assert float((logits(averaged(module, other), family) - wanted).norm()) > 0.1 * size
    for alpha in (0.0, 0.5):
        fused = fuse(module, other, ids, alpha=alpha)
        assert float((logits(fused, family) - wanted).norm()) < 1e-5 * size
    # and it lies where the anchor does, parameter by parameter
    for (name, ours), theirs in zip(
        fuse(module, other, ids, alpha=0.0).named_parameters(), other.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fusing_averages_what_belongs_together(family):
    module = build(family)
    other, noisy = shuffled(module), around(module, 5, 0.002)
    ids = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    mean = copy.deepcopy(module)
    with torch.no_grad():
        for one, off in zip(mean.parameters(), noisy.parameters(), strict=True):
            one.lerp_(off, 0.75)
    wanted = logits(mean, family)
    size = float(wanted.norm())
    found = logits(fuse(noisy, other, ids, alpha=0.25), family)
    assert float((found - wanted).norm()) < 1e-5 * size
    for parent in (noisy, other):  # neither alone would do
        assert float((logits(parent, family) - wanted).norm()) > 1e-3 * size


def test_a_model_with_every_neuron_twice_fuses_into_the_narrow_one():
    import transformers

    narrow = build("llama")
    config = copy.deepcopy(narrow.config)
    config.intermediate_size *= 2
    wide = transformers.LlamaForCausalLM(config).eval()
    tensors = dict(narrow.state_dict())
    order = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(2))
    for name, tensor in narrow.state_dict().items():
        if ".mlp." in name:
            doubled = (
                torch.cat([tensor, tensor])[order]
                if "down" not in name
                else torch.cat([tensor, tensor], 1)[:, order] / 2
            )
            tensors[name] = doubled
    wide.load_state_dict(tensors)
    wanted = logits(narrow, "llama")
    torch.testing.assert_close(logits(wide, "llama"), wanted, rtol=1e-4, atol=1e-5)
    ids = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    found = fuse(wide, narrow, ids, alpha=0.0)
    torch.testing.assert_close(logits(found, "llama"), wanted, rtol=1e-4, atol=1e-5)


def test_models_of_other_widths_fuse_softly_and_misfits_are_refused():
    from pennyweight.zoo.gpt import GPT, GPTConfig

    def gpt(width, heads, depth=2, seed=0):
        config = GPTConfig(width=width, num_heads=heads, depth=depth, vocabulary=64, context=32)
        return GPT(config, generator=torch.Generator().manual_seed(seed))

    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    for solver in ("emd", "sinkhorn"):
        found = fuse(gpt(32, 4), gpt(16, 2, seed=1), ids, solver=solver)
        assert found(ids).shape == (4, 16, 64)
        assert bool(found(ids).isfinite().all())
    with pytest.raises(ModelError, match="2 blocks with heads of 8 and 3 with heads of 8"):
        fuse(gpt(32, 4), gpt(32, 4, depth=3), ids)
    with pytest.raises(ModelError, match="heads of 16"):
        fuse(gpt(32, 4), gpt(32, 2), ids)
    with pytest.raises(ModelError, match="plain decoder"):
        fuse(build("gpt2"), build("gpt2"), ids)
    with pytest.raises(OptionError, match="alpha 2"):
        fuse(gpt(32, 4), gpt(32, 4), ids, alpha=2)


def tiny(seed=0):
    from pennyweight.zoo.gpt import GPT, GPTConfig

    config = GPTConfig(width=16, num_heads=2, depth=2, vocabulary=20, context=16)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).eval()


def around(base, seed, scale=0.1):
    other = copy.deepcopy(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))
    return other


def samples(count, seed=0):
    return torch.randint(0, 20, (count, 12), generator=torch.Generator().manual_seed(seed))


def test_one_expert_is_found_again_when_nothing_holds_the_coefficients_back():
    base = tiny()
    expert = around(base, 1)
    found = merge_experts(base, [expert], [samples(5)], epochs=12, regularization=0.0)
    assert found.losses[-1] < found.losses[0]
    start = sum(
        float((e - b).detach().square().sum()) for e, b in zip(expert.parameters(), base.parameters(), strict=True)
    )
    left = sum(float((p.detach() - found.tensors[n]).square().sum()) for n, p in expert.named_parameters())
    assert left < 0.15 * start  # coefficients of 0.1 leave 0.81
    assert torch.cat(list(found.coefficients.values())).mean() > 0.3
    held = merge_experts(base, [expert], [samples(5)], epochs=12, regularization=100.0)
    assert max(float((one - 0.1).abs().max()) for one in held.coefficients.values()) < 0.2


def test_coefficients_are_counted_chunked_and_fixed_as_asked():
    base = tiny()
    experts = [around(base, n) for n in (1, 2, 3)]
    names = [name for name, _ in base.named_parameters()]
    first = merge_experts(base, experts, [samples(2, n) for n in range(3)])
    assert sum(one.numel() for one in first.coefficients.values()) == 3 * len(names)
    chunks = importance_chunks(base, experts, first, budget=2 * len(names))
    assert sum(chunks.values()) <= 2 * len(names)
    assert chunks["embedding.weight"] >= 1
    assert 0 in chunks.values()  # the small norms
    plus = merge_experts(base, experts, [samples(2, n) for n in range(3)], chunks=chunks)
    for name in names:
        assert plus.coefficients[name].shape == (3, max(1, chunks[name]))
        if not chunks[name]:
            assert torch.equal(plus.coefficients[name], torch.full((3, 1), 0.1))
    for expert, parameter in zip(experts, base.parameters(), strict=False):
        assert parameter.grad is None
        assert all(one.grad is None for one in expert.parameters())
    with pytest.raises(OptionError, match="3 experts, 1 sets of samples"):
        merge_experts(base, experts, [samples(2)])
    with pytest.raises(OptionError, match="no tensor has a chunk"):
        merge_experts(base, experts, [samples(2)] * 3, chunks={})
    with pytest.raises(ModelError, match="in an expert"):
        merge_experts(base, [torch.nn.Linear(2, 2)], [samples(2)])


def test_scaled_chunks_and_soft_labels_are_what_they_are_defined_to_be():
    deltas = draw(1, 2, 3, 5).double()
    coefficients = draw(2, 2, 4).double().requires_grad_()
    wanted = torch.zeros(15, dtype=torch.float64)
    for expert in range(2):
        for place, value in enumerate(deltas[expert].flatten()):
            wanted[place] += (
                coefficients[expert, place // 4].detach() * value
            )  # 15 elements in 4 chunks of 4, the last of 3
    torch.testing.assert_close(scaled(deltas, coefficients).detach(), wanted.view(3, 5))
    assert torch.autograd.gradcheck(lambda one: scaled(deltas, one), coefficients)
    logits, teacher = draw(3, 4, 6).double(), draw(4, 4, 6).double()
    p, q = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    assert float(soft_cross_entropy(logits, teacher, 2.0)) == pytest.approx(-4 * float((p * q.log()).sum(-1).mean()))


def test_a_study_counts_gains_kept_and_losses_elsewhere():
    base = {"x": torch.zeros(3)}
    experts = [{"x": torch.tensor(row)} for row in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])]

    # task n wants x_n = 1; the third, held out, wants x_0 + x_1 = 1
    def losses(tensors):
        one, two, _ = tensors["x"].tolist()
        return [(one - 1) ** 2, (two - 1) ** 2, (one + two - 1) ** 2]

    found = study(base, experts, losses, counts=(1, 2), methods={"average": [Linear()], "sum": [TaskArithmetic()]})
    assert (found.base, found.experts) == (1.0, 0.0)
    assert (found.of("average", 2).held_in, found.of("average", 2).held_out) == (0.75, 0.0)
    assert (found.of("sum", 2).held_in, found.of("sum", 2).held_out) == (1.0, 1.0)
    assert found.of("average", 1).held_in == 1.0
    seen = []

    def given(chosen):  # what needs more than parameters is told whose experts to merge
        seen.append(chosen)
        return {"x": sum(experts[n]["x"] for n in chosen) / len(chosen)}

    other = study(base, experts, losses, counts=(1, 2), methods={"average": [given]})
    assert other.merges == tuple(one for one in found.merges if one.method == "average")
    assert seen == [[0], [1], [0, 1]]
    assert "average\t2\t0.750\t0.0000" in found.table()
    with pytest.raises(OptionError, match="of 2 experts"):
        study(base, experts, losses, counts=(3,))


def test_fusion_and_learned_merges_run_from_recipes(tmp_path, monkeypatch, capsys):
    ids = torch.randint(3, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(whole, "text_of", lambda model, text, count, length, seed: ids[:count])
    module = build("llama")
    for name, one in (("base", module), ("copy", shuffled(module)), ("expert", around(module, 1, 0.02))):
        one.save_pretrained(tmp_path / name)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("pennyweight: 1\nmerge: transport\nmodels: [base, copy]\noptions: {windows: 5}\n")
    assert main(["merge", str(recipe), "--out", str(tmp_path / "fused")]) == 0
    assert "tensors merged" in capsys.readouterr().out
    wanted = logits(module, "llama")
    assert float((logits(load(tmp_path / "fused").module, "llama") - wanted).norm()) < 1e-5 * float(wanted.norm())
    recipe.write_text(
        "pennyweight: 1\nmerge: expert\nbase: base\nmodels: [expert]\n"
        "options: {texts: [wiki], epochs: 3, regularization: 0.0, chunks: 2}\n"
    )
    assert main(["merge", str(recipe), "--out", str(tmp_path / "learned")]) == 0
    found = dict(load(tmp_path / "learned").module.named_parameters())
    expert, base = (dict(load(tmp_path / name).module.named_parameters()) for name in ("expert", "base"))
    far, near = (sum(float((found[n] - o[n]).detach().square().sum()) for n in found) for o in (base, expert))
    assert 0 < far
    assert near < 0.81 * (sum(float((base[n] - expert[n]).detach().square().sum()) for n in found))
    for text, said in (
        ("merge: transport\nmodels: [base]", "give two models and no base"),
        ("merge: expert\nmodels: [expert]", "0 texts for 1 models"),
        ("merge: transport\nmodels: [{model: base, weight: 2}, copy]", "takes models only, and no weight"),
        ("merge: transport\nmodels: [base, copy]\nskip: [a]", "leave them out"),
        ("merge: expert\nmodels: [expert]\noptions: {initial: 1.0}", "initial = 1.0 is out of range"),
    ):
        recipe.write_text(f"pennyweight: 1\n{text}\n")
        assert main(["merge", str(recipe), "--out", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err
