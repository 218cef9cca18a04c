"""Merging: every formula against a plain reference, whatever the files look like; recipes; adapters; second moments."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pennyweight
from pennyweight.cli import main
from pennyweight.errors import ModelError, OptionError, OutputError, RecipeError
from pennyweight.merge import (
    OTA,
    Dare,
    Linear,
    MergeRecipe,
    Slerp,
    TaskArithmetic,
    Ties,
    compressed,
    engine,
    ensemble,
    ffg,
    merge,
    merge_tensors,
    read_moments,
    save_moments,
    second_moments,
    ties,
)
from pennyweight.merge.formula import elected_mean
from pennyweight.merge.ties import nth_largest, shrink


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(count=3, dtype=torch.float32):
    """A base and models around it: a matrix longer than a stretch of these tests, a vector, a scalar-like tensor."""
    shapes = {"a.weight": (23, 17), "b.bias": (9,), "c.scale": (1,)}
    base = {name: draw(7, *shape) for name, shape in shapes.items()}
    models = [
        {name: base[name] + draw(31 * e + len(name), *shape, scale=0.1) for name, shape in shapes.items()}
        for e in range(count)
    ]
    return {n: t.to(dtype) for n, t in base.items()}, [{n: t.to(dtype) for n, t in m.items()} for m in models]


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    monkeypatch.setattr(engine, "STRETCH", 64)


def plain_ties(base, models, density, scale, weights):
    """Written from the definition, over whole tensors, with a sort."""
    deltas = torch.stack([model.float() - base.float() for model in models])
    for delta in deltas:
        keep = max(1, int(density * delta.numel()))
        least = delta.abs().flatten().sort(descending=True).values[keep - 1]
        delta[delta.abs() < least] = 0
    shares = torch.tensor(weights).view(-1, *[1] * base.ndim)
    weighted = deltas * shares
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == elected
    count = (shares * agree).sum(0)
    return base.float() + scale * (weighted * agree).sum(0) / torch.where(count == 0, 1.0, count)


def plain_slerp(one, two, t):
    a, b = one.double().flatten(), two.double().flatten()
    cosine = a @ b / a.norm() / b.norm()
    if cosine.abs() > 0.9995:
        return (1 - t) * one.double() + t * two.double()
    angle = cosine.arccos()
    return (((1 - t) * angle).sin() * one.double() + (t * angle).sin() * two.double()) / angle.sin()


REFERENCES = {
    "linear": (
        Linear(weights=(1.0, 2.0, 1.0)),
        lambda base, models: sum(w * m.float() for w, m in zip((0.25, 0.5, 0.25), models, strict=True)),
    ),
    "sum": (Linear(weights=(1.0, 2.0, -1.0), normalize=False), lambda b, m: m[0].float() + 2 * m[1] - m[2].float()),
    "task arithmetic": (
        TaskArithmetic(scale=0.4, weights=(1.0, 0.5, 2.0)),
        lambda b, m: b.float() + 0.4 * sum(w * (x.float() - b.float()) for w, x in zip((1, 0.5, 2), m, strict=True)),
    ),
    "ties": (Ties(density=0.3, scale=0.9), lambda b, m: plain_ties(b, m, 0.3, 0.9, [1.0, 1.0, 1.0])),
    "ties, weighted": (
        Ties(density=0.5, weights=(1.0, 0.3, 2.0)),
        lambda b, m: plain_ties(b, m, 0.5, 1.0, [1.0, 0.3, 2.0]),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_every_formula_gives_what_its_definition_gives(name, dtype):
    formula, reference = REFERENCES[name]
    base, models = family(dtype=dtype)
    found = merge_tensors(formula, models, base)
    assert list(found) == list(models[0])
    for key, tensor in found.items():
        wanted = reference(base[key], [model[key] for model in models])
        assert tensor.dtype == dtype
        # float32 sums in another order, then one rounding to the dtype
        torch.testing.assert_close(tensor.float(), wanted, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_turns_by_equal_angles_and_mixes_what_is_parallel(t):
    one, two = {"x": draw(1, 200)}, {"x": draw(2, 200)}
    found = merge_tensors(Slerp(t=t), [one, two])["x"]
    torch.testing.assert_close(found.double(), plain_slerp(one["x"], two["x"], t), rtol=0, atol=1e-5)
    near = {"x": one["x"] * 1.01}
    torch.testing.assert_close(merge_tensors(Slerp(t=t), [one, near])["x"], one["x"] * (1 + 0.01 * t))


def test_what_must_be_exact_is():
    base, models = family()
    one = merge_tensors(Ties(density=1.0), models[:1], base)
    task = merge_tensors(TaskArithmetic(), models[:1], base)
    kept = merge_tensors(Dare(density=1.0), models[:1], base)
    for name, tensor in models[0].items():
        for found in (one, task, kept):  # one model at full strength is that model, but for (m - b) + b in float32
            torch.testing.assert_close(found[name], tensor, rtol=2e-7, atol=2e-7)
    average = merge_tensors(Linear(), models)
    arithmetic = merge_tensors(TaskArithmetic(scale=1 / 3), models, base)
    for name in average:
        torch.testing.assert_close(average[name], arithmetic[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge_tensors(Linear(), models[:1])["b.bias"], models[0]["b.bias"], rtol=0, atol=0)


def test_dare_keeps_its_share_and_the_expected_difference():
    base, models = {"x": torch.zeros(4000)}, [{"x": draw(3, 4000)}, {"x": draw(4, 4000)}]
    found = torch.stack([merge_tensors(Dare(density=0.25, seed=s), models, base)["x"] for s in range(60)])
    truth = models[0]["x"] + models[1]["x"]
    # a kept delta is 4 d with chance 1/4: variance 3 d^2 each
    deviation = (3 * (models[0]["x"] ** 2 + models[1]["x"] ** 2) / 60).sqrt()
    assert float(((found.mean(0) - truth) / deviation).abs().mean()) == pytest.approx(0.798, abs=0.05)
    single = merge_tensors(Dare(density=0.25), models[:1], base)["x"]
    kept = single != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(single[kept], 4 * models[0]["x"][kept])
    again = merge_tensors(Dare(density=0.25), models, base)["x"]
    assert torch.equal(again, found[0])
    assert not torch.equal(again, found[1])
    signed = merge_tensors(Dare(density=1.0, sign="ties"), models, base)["x"]
    torch.testing.assert_close(signed, plain_ties(base["x"], [m["x"] for m in models], 1.0, 1.0, [1.0, 1.0]))


@given(
    values=st.lists(st.floats(0, 3.0, width=32) | st.sampled_from([0.0, 1.0, 1e-45, 3e38]), min_size=1, max_size=60),
    data=st.data(),
)
def test_the_nth_largest_is_that_of_a_sort(values, data):
    rows = torch.tensor([values, values[::-1]], dtype=torch.float32)
    nth = data.draw(st.integers(1, len(values)))
    walk = lambda: iter([rows[:, :7].clone(), rows[:, 7:].clone()] if len(values) > 7 else [rows.clone()])  # noqa: E731
    wanted = sorted(rows[0].tolist(), reverse=True)[nth - 1]
    assert nth_largest(walk, nth) == [wanted, wanted]
    with pytest.MonkeyPatch.context() as patched:  # and without a compiler
        patched.setattr(ties, "library", lambda name: None)
        assert nth_largest(walk, nth) == [wanted, wanted]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.3), (1.0, -1.0)])
def test_trimming_and_election_without_masks_are_what_masks_give(weights):
    deltas = torch.stack([draw(1, 400), draw(2, 400)])
    deltas[:, 0], deltas[0, 1], deltas[1, 2], deltas[:, 3] = 0, -deltas[1, 1], -0.0, -0.0
    bound = float(deltas[0, 9].abs())
    for least in (bound, 0.0, 1e-45):
        wanted = torch.where(deltas[0].abs() >= least, deltas[0], 0)
        assert torch.equal(shrink(deltas[0].clone(), least), wanted)
    weighted = deltas * torch.tensor(weights)[:, None]
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == sign
    count = (torch.tensor(weights)[:, None] * agree).sum(0)
    wanted = (weighted * agree).sum(0) / torch.where(count == 0, 1.0, count)
    torch.testing.assert_close(elected_mean(deltas.clone(), list(weights)), wanted, rtol=1e-6, atol=0)


def write(directory, tensors, shards=1, **config):
    directory.mkdir(parents=True)
    names = sorted(tensors)
    files = [f"model-{n}.safetensors" if shards > 1 else "model.safetensors" for n in range(shards)]
    where = {name: files[place % shards] for place, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32"} | config))
    return directory


def test_files_give_the_same_bits_in_any_layout_and_with_any_number_of_workers(tmp_path):
    base, models = family()
    steps = {"steps": torch.tensor([3, 4])}
    recipe = "pennyweight: 1\nmerge: {m}\noptions: {o}\nbase: {p}base\nmodels: [{p}m0, {p}m1, {p}m2]\n{rest}"
    for prefix, shards in (("one/", 1), ("three/", 3)):
        for name, tensors in (("base", base), *((f"m{n}", m) for n, m in enumerate(models))):
            write(tmp_path / prefix / name, tensors | steps, shards)
    for method, options, formula in (
        ("ties", "{density: 0.3}", Ties(density=0.3)),
        ("dare", "{sign: ties, seed: 3}", Dare(sign="ties", seed=3)),
    ):
        wanted = merge_tensors(formula, [m | steps for m in models], base | steps)
        for place, (prefix, rest, workers) in enumerate(
            [("one/", "", 1), ("three/", "", 3), ("three/", "shard: 1000B\n", 2)]
        ):
            text = recipe.format(m=method, o=options, p=prefix, rest=rest)
            out = tmp_path / f"{method}{place}"
            done = merge(MergeRecipe.parse(text, home=tmp_path), out=out, workers=workers)
            files = sorted(out.glob("*.safetensors"))
            found = {name: tensor for file in files for name, tensor in load_file(file).items()}
            assert (done.tensors, done.copied) == (3, 1)
            assert done.bytes == sum(t.numel() * t.element_size() for t in found.values())
            assert len(files) == (2 if "shard" in rest else 1)
            if len(files) > 1:
                index = json.loads((out / "model.safetensors.index.json").read_text())
                assert index["weight_map"].keys() == found.keys()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert json.loads((out / "config.json").read_text())["model_type"] == "toy"


def test_a_merge_into_another_dtype_rounds_once_and_says_so(tmp_path):
    base, models = family(2)
    for n, tensors in enumerate((base, *models)):
        write(tmp_path / f"{n}", tensors)
    (tmp_path / "r.yaml").write_text(
        "pennyweight: 1\nmerge: linear\nmodels: ['1', '2']\ndtype: bfloat16\nskip: [b.*]\n"
    )
    done = merge(tmp_path / "r.yaml", out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert done.copied == 1
    assert torch.equal(found["a.weight"], ((models[0]["a.weight"] + models[1]["a.weight"]) / 2).bfloat16())
    assert torch.equal(found["b.bias"], models[0]["b.bias"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(OutputError, match="overwrite"):
        merge(tmp_path / "r.yaml", out=tmp_path / "out")
    assert pennyweight.merge(tmp_path / "r.yaml", out=tmp_path / "out", overwrite=True).copied == 1


def test_the_verb_merges_and_gives_mistakes_one_line(tmp_path, capsys):
    base, models = family(2)
    for n, tensors in enumerate((base, *models)):
        write(tmp_path / f"{n}", tensors)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("pennyweight: 1\nmerge: slerp\nmodels: ['1', '2']\noptions: {t: 0.25}\n")
    assert main(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert "3 tensors merged, 0 copied" in capsys.readouterr().out
    recipe.write_text("pennyweight: 1\nmerge: slrp\nmodels: ['1', '2']\n")
    assert main(["merge", str(recipe), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == "pennyweight: r.yaml: no merge is called 'slrp'; did you mean slerp?\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: []", "not a merge"),
        ("pennyweight: 1\nmerge: ties\nmodel: x", "unknown key 'model'"),
        ("pennyweight: 1\nmerge: ties", "models names none"),
        ("pennyweight: 1\nmerge: ties\nmodels: [a]\noptions: {densty: 1}", "unknown key 'densty'"),
        ("pennyweight: 1\nmerge: ties\nmodels: [a]\noptions: {density: 2}", "density = 2 is out of range"),
        ("pennyweight: 1\nmerge: ties\nmodels: [a]\noptions: {density: x}", "density = 'x' is out of range"),
        ("pennyweight: 1\nmerge: linear\nmodels: [{model: a, weight: x}]", "give numbers"),
        ("pennyweight: 1\nmerge: linear\nmodels: [a]\ndtype: int4", "dtype 'int4'"),
        ("pennyweight: 1\nmerge: linear\nmodels: [a]\nshard: 3 apples", "no unit is called"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text, said):
    with pytest.raises(RecipeError, match=said):
        MergeRecipe.parse(text)


def test_models_that_do_not_fit_are_refused(tmp_path):
    base, models = family(2)
    with pytest.raises(OptionError, match="give base"):
        merge_tensors(Ties(), models)
    with pytest.raises(OptionError, match="3 weights for 2 models"):
        merge_tensors(Linear(weights=(1.0, 1.0, 1.0)), models)
    with pytest.raises(OptionError, match="sum to 0"):
        merge_tensors(Linear(weights=(1.0, -1.0)), models)
    with pytest.raises(OptionError, match="give two models and t"):
        merge_tensors(Slerp(), [*models, base])
    with pytest.raises(ModelError, match=r"b.bias is \(9,\) in model 0 and missing in model 1"):
        merge_tensors(Linear(), [models[0], {n: t for n, t in models[1].items() if n != "b.bias"}])
    broken = {n: torch.full_like(t, torch.nan) for n, t in models[1].items()}
    for formula in (Linear(), Ties(), Dare(density=0.9)):
        with pytest.raises(ModelError, match="NaN or infinite"):
            merge_tensors(formula, [models[0], broken], base)
    write(tmp_path / "a", models[0])
    write(tmp_path / "b", models[1])
    recipe = MergeRecipe.parse("pennyweight: 1\nmerge: linear\nmodels: [a, b]\nskip: [z*]", home=tmp_path)
    with pytest.raises(OptionError, match="selects none of the 3 tensors"):
        merge(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "b" / "weights.json").write_text('{"layers": {"a": 0}}')
    with pytest.raises(ModelError, match="compact weights"):
        merge(recipe, out=tmp_path / "out")


def test_an_adapter_is_merged_as_its_product(tmp_path):
    base, _ = family(1)
    write(tmp_path / "base", base)
    up, down = draw(1, 23, 4), draw(2, 4, 17)
    place = tmp_path / "adapter"
    place.mkdir()
    factors = {"lora_A": down, "lora_B": up}
    save_file({f"base_model.model.a.{n}.weight": t for n, t in factors.items()}, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "bias": "none"}
    (place / "adapter_config.json").write_text(json.dumps(config))
    text = "pennyweight: 1\nmerge: linear\nmodels: [{model: base, adapter: adapter}]"
    merge(MergeRecipe.parse(text, home=tmp_path), out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found["a.weight"], base["a.weight"] + 2 * up @ down, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["b.bias"], base["b.bias"])
    for broken, said in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3")):
        (place / "adapter_config.json").write_text(json.dumps(config | broken))
        with pytest.raises(ModelError, match=said):
            merge(MergeRecipe.parse(text, home=tmp_path), out=tmp_path / "other")


def moments_of(models, seed=50):
    return [
        {n: draw(seed + 9 * e + len(n), *t.shape).square() * 1e-9 for n, t in m.items()} for e, m in enumerate(models)
    ]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_ota_weighs_by_curvature(power):
    base, models = family()
    moments = moments_of(models)
    sources = tuple(read_moments(one) for one in moments)
    same = merge_tensors(OTA(moments=sources[:1] * 3, power=power), models, base)
    average = merge_tensors(Linear(), models)
    found = merge_tensors(OTA(moments=sources, power=power, density=0.4), models, base)
    for name in base:
        torch.testing.assert_close(same[name], average[name], rtol=1e-5, atol=1e-6)
        v = torch.stack([one[name] for one in moments]).double()
        tau = torch.stack([model[name] - base[name] for model in models]).double()
        score = v * tau**2
        keep = max(1, int(0.4 * base[name].numel()))
        least = score.flatten(1).sort(1, descending=True).values[:, keep - 1].view(-1, *[1] * base[name].ndim)
        weights = (v**power + 1e-24) * (score >= least * (1 - 1e-6))
        total = weights.sum(0)
        wanted = base[name] + (weights * tau).sum(0) / torch.where(total == 0, 1.0, total)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[name][total == 0], base[name][total == 0])  # all edits taken back


def test_ota_is_the_minimum_of_the_summed_quadratic_losses():
    base, models = family()
    curvature = moments_of(models)
    found = merge_tensors(OTA(moments=tuple(map(read_moments, curvature)), power=1.0), models, base)["a.weight"]
    stack = torch.stack([m["a.weight"] for m in models]).double()
    weights = torch.stack([c["a.weight"] for c in curvature]).double()
    gradient = (weights * (found.double() - stack)).sum(0)  # of sum_e 1/2 (w - w_e)^T D_e (w - w_e)
    assert float(gradient.norm()) < 1e-5 * float((weights * (base["a.weight"] - stack)).sum(0).norm())


def test_second_moments_are_taken_compressed_and_read_back(tmp_path):
    module = torch.nn.Linear(17, 23)
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(ModelError, match="keeps none of weight"):
        second_moments(module, optimizer)
    module(draw(1, 5, 17)).square().mean().backward()
    optimizer.step()
    found = second_moments(module, optimizer)
    torch.testing.assert_close(found["weight"], 0.001 * module.weight.grad**2)
    small = compressed(found)
    assert small["weight::rows"].shape == (23,)
    save_moments(tmp_path / "m", small)
    source = read_moments(tmp_path / "m")
    out = torch.empty(23 * 17)
    source.read("weight", 0, out)
    part = torch.empty(30)
    source.read("weight", 41, part)
    bias = torch.empty(23)
    source.read("bias", 0, bias)
    source.close()
    torch.testing.assert_close(out.view(23, 17).sum(1), found["weight"].sum(1))  # row and column sums survive
    torch.testing.assert_close(out.view(23, 17).sum(0), found["weight"].sum(0))
    assert torch.equal(part, out[41:71])
    assert torch.equal(bias, found["bias"])
    rank_one = torch.outer(draw(1, 5).abs(), draw(2, 6).abs())
    exact = torch.empty(30)
    read_moments(compressed({"x": rank_one})).read("x", 0, exact)
    torch.testing.assert_close(exact.view(5, 6), rank_one)


def test_fast_fisher_grafting_keeps_the_edits_that_matter():
    base, models = family(1)
    (moments,) = moments_of(models)
    found = merge_tensors(ffg(read_moments(moments), density=0.3), models, base)["a.weight"]
    score = moments["a.weight"] * (models[0]["a.weight"] - base["a.weight"]) ** 2
    kept = (found - base["a.weight"]).abs() > 1e-7
    assert int(kept.sum()) == int(0.3 * score.numel())
    assert score[kept].min() >= score[~kept].max()
    torch.testing.assert_close(found[kept], models[0]["a.weight"][kept])
    with pytest.raises(OptionError, match="0 sets of second moments for 1 models"):
        merge_tensors(OTA(), models, base)


def test_ota_by_recipe_reads_its_moments(tmp_path):
    base, models = family(2)
    moments = moments_of(models)
    for n, (model, moment) in enumerate(zip(models, moments, strict=True)):
        write(tmp_path / f"m{n}", model)
        save_moments(tmp_path / f"v{n}", moment)
    write(tmp_path / "base", base)
    text = (
        "pennyweight: 1\nmerge: ota\nbase: base\noptions: {power: 1.0, density: 0.5}\n"
        "models: [{model: m0, moments: v0}, {model: m1, moments: v1}]"
    )
    merge(MergeRecipe.parse(text, home=tmp_path), out=tmp_path / "out")
    wanted = merge_tensors(OTA(moments=tuple(map(read_moments, moments)), power=1.0, density=0.5), models, base)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ensembles_are_still_found_here():
    member = torch.nn.Linear(3, 3)
    assert len(ensemble([member, member]).members) == 2


def test_tensors_without_elements_and_whole_numbers_of_the_base_alone_go_through():
    base, models = family(2)
    for one in (base, *models):
        one["empty"] = torch.zeros(0, 3)
    base["steps"] = torch.tensor([5])
    moments = tuple(read_moments(one) for one in moments_of(models))
    for formula in (Ties(density=0.5), OTA(density=0.5, moments=moments), Slerp(), Dare()):
        found = merge_tensors(formula, models, base)
        assert found["empty"].shape == (0, 3)
        assert torch.equal(found["steps"], base["steps"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_result_that_its_dtype_cannot_hold_is_refused(dtype):
    most = torch.finfo(dtype).max
    models = [{"a": torch.tensor([1.0, most]).to(dtype)}] * 2
    assert merge_tensors(Linear(), models)["a"].float()[1] == most
    with pytest.raises(ModelError, match=f"a reaches .*, more than {str(dtype)[6:]} holds"):
        merge_tensors(Linear(normalize=False), models)


def test_whole_numbers_are_not_mixed_with_floats():
    for one, two in (("float32", "int8"), ("int8", "float32")):
        models = [{"a": torch.ones(2, dtype=getattr(torch, kind))} for kind in (one, two)]
        with pytest.raises(ModelError, match=f"a is {one} in model 0 and {two} in model 1"):
            merge_tensors(Linear(), models)


def test_skip_leaves_out_what_only_one_of_the_models_has(tmp_path):
    """A tied base has no head of its own, and an untied model has one."""
    base, models = family(2)
    models[1]["lm_head.weight"] = draw(3, 5, 4)
    for name, tensors in (("base", base), ("a", models[0]), ("b", models[1])):
        write(tmp_path / name, tensors)
    text = "pennyweight: 1\nmerge: task_arithmetic\nbase: base\nmodels: [a, b]\n"
    with pytest.raises(ModelError, match=r"lm_head.weight is missing in .* skip it"):
        merge(MergeRecipe.parse(text, home=tmp_path), out=tmp_path / "out")
    merge(MergeRecipe.parse(f"{text}skip: [lm_head.*]\n", home=tmp_path), out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == base.keys()


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ("task_arithmetic\noptions: {scale: big}", "merge task_arithmetic: scale = 'big' is a str; give float"),
        ("ties\noptions: {scale: }", "merge ties: scale = None is a NoneType; give float"),
        ("linear\noptions: {normalize: maybe}", "merge linear: normalize = 'maybe' is a str; give bool"),
        ("dare\noptions: {seed: 1.5}", "merge dare: seed = 1.5 is a float; give int"),
        ("expert\noptions: {epochs: 1.5}", "merge expert: epochs = 1.5 is a float; give int"),
        ("expert\noptions: {texts: wiki}", "merge expert: texts = 'wiki' is a str; give tuple"),
    ],
)
def test_options_of_another_type_are_refused_before_anything_is_read(merge, said):
    with pytest.raises(RecipeError, match=said):
        MergeRecipe.parse(f"pennyweight: 1\nmerge: {merge}\nmodels: [a]")


def test_weights_that_cancel_but_for_rounding_are_refused():
    _, models = family(3)
    with pytest.raises(OptionError, match="sum to 0"):
        merge_tensors(Linear(weights=(0.1, 0.2, -0.3)), models)
    assert 0.1 + 0.2 - 0.3  # what a plain test for 0 would let through


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("weights.json", "{", "weights.json: damaged"),
        ("weights.json", "[1]", "weights.json: damaged"),
        ("config.json", "{", "config.json: damaged configuration"),
        ("config.json", "[]", "config.json: damaged configuration"),
    ],
)
def test_damaged_files_beside_the_weights_end_in_one_line(file, text, said, tmp_path, capsys):
    _, models = family(1)
    write(tmp_path / "a", models[0])
    (tmp_path / "a" / file).write_text(text)
    (tmp_path / "r.yaml").write_text("pennyweight: 1\nmerge: linear\nmodels: [a]\ndtype: float16")
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_called_as_a_tokenizer_file_is_left(tmp_path):
    _, models = family(1)
    write(tmp_path / "a", models[0])
    (tmp_path / "a" / "tokenizer").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    merge(MergeRecipe.parse("pennyweight: 1\nmerge: linear\nmodels: [a]", home=tmp_path), out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("names", "config", "said"),
    [
        ({"lora_A": (4, 17), "lora_B": (23, 3)}, {}, "fits no map"),
        ({"lora_A": (17,), "lora_B": (23, 4)}, {}, "fits no map"),
        ({"lora_B": (23, 4)}, {}, "is no LoRA factor"),
        ({"lora_A": (4, 17), "lora_B": (23, 4)}, {"lora_alpha": None}, "cannot be read"),
        ({"lora_A": (4, 17), "lora_B": (23, 4)}, [], "cannot be read"),
    ],
)
def test_damaged_adapters_end_in_one_line(names, config, said, tmp_path):
    base, _ = family(1)
    write(tmp_path / "base", base)
    (tmp_path / "ad").mkdir()
    factors = {f"base_model.model.a.{name}.weight": draw(1, *shape) for name, shape in names.items()}
    save_file(factors, tmp_path / "ad" / "adapter_model.safetensors")
    whole = config if isinstance(config, list) else {"peft_type": "LORA", "lora_alpha": 8, **config}
    (tmp_path / "ad" / "adapter_config.json").write_text(json.dumps(whole))
    recipe = "pennyweight: 1\nmerge: linear\nmodels: [{model: base, adapter: ad}]"
    with pytest.raises(ModelError, match=said):
        merge(MergeRecipe.parse(recipe, home=tmp_path), out=tmp_path / "out")
