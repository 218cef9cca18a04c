"""The main job on toys: budgets to the byte, floors, useful noes, and the verbs around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys

from pennyweight.apply import apply
from pennyweight.compare import compare
from pennyweight.dry_run import Estimate
from pennyweight.errors import BudgetError, OptionError, OutputError, RecipeError, UnitError, UserError
from pennyweight.fit import Fitted, fit
from pennyweight.frontier import frontier
from pennyweight.job import standing_in
from pennyweight.model import load
from pennyweight.model.kv_cache import kept_setting
from pennyweight.model.saving import saved_bytes
from pennyweight.plan.cache import bytes_of
from pennyweight.receipt import Receipt
from pennyweight.recipe import Recipe
from pennyweight.task import LanguageModeling
from pennyweight.verify import verify
from pennyweight.weights.layers import CompactLinear


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def fitted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    out = tmp_path_factory.mktemp("fitted") / "out"
    return fit(model, data=text, budgets=["45%"], floor="perplexity<=1.5x", out=out, settings=toys.QUICK)


def test_a_budget_means_the_written_bytes(fitted: Fitted, model: Path) -> None:
    line = fitted.receipt.budgets[0]
    written = saved_bytes(fitted.directory)
    assert line.spent == written
    assert 0.9 * line.allowed <= written <= line.allowed
    on_disk = sum((fitted.directory / name).stat().st_size for name in ("model.safetensors", "weights.json"))
    assert on_disk == written
    assert isinstance(fitted.model.module.model.layers[0].mlp.up_proj, CompactLinear)


def test_the_directory_holds_everything_and_reads_back_the_same(fitted: Fitted) -> None:
    names = {path.name for path in fitted.directory.iterdir()}
    assert {"model.safetensors", "weights.json", "config.json", "recipe.yaml", "receipt.json", "report.html"} <= names
    assert {"tokenizer.json"} <= names
    again = load(fitted.directory)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again.module(ids).logits, fitted.model.module(ids).logits, rtol=0, atol=0)
    assert Receipt.read(fitted.directory).holds
    assert not list(fitted.directory.parent.glob(".*journal*"))


def test_the_figures_of_the_receipt_are_those_of_the_written_model(fitted: Fitted, model: Path, text: Path) -> None:
    from pennyweight.data import windows

    ids = windows(text, load(model).tokenizer, part="heldout", length=48, count=6)
    before, after = (LanguageModeling().scores(load(d).module, ids, exact=True) for d in (model, fitted.directory))
    figure = fitted.receipt.figures[0]
    assert figure.ratio is not None
    assert figure.ratio.value == pytest.approx(float((after - before).mean().exp()), rel=1e-4)


def test_verify_believes_a_receipt_and_finds_a_changed_byte(fitted: Fitted, model: Path, tmp_path: Path) -> None:
    assert verify(fitted.directory, model=model).holds
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(fitted.directory, copy)
    config = copy / "generation_config.json"
    config.write_text(config.read_text() + " ")
    found = verify(copy, model=model)
    assert not found.holds
    assert "NOT  file generation_config.json" in found.table()


def test_predicted_harm_is_near_the_measured(fitted: Fitted) -> None:
    figure = fitted.receipt.figures[0]
    assert figure.predicted is not None
    assert figure.before is not None
    assert 0.5 < (figure.predicted / figure.before.value) / (figure.ratio.value if figure.ratio else 0) < 2


def test_a_floor_alone_gives_the_smallest_model_above_it(model: Path, text: Path, tmp_path: Path) -> None:
    found = [
        fit(model, data=text, floor=floor, out=tmp_path / floor[-4:], settings=toys.QUICK)
        for floor in ("perplexity<=1.05x", "perplexity<=1.50x")
    ]
    sizes = [saved_bytes(each.directory) for each in found]
    assert sizes[1] < sizes[0]
    for each in found:
        assert each.receipt.floor is not None
        assert each.receipt.floor.holds


def test_a_floor_that_the_budget_cannot_meet_is_refused_with_the_nearest(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"floor perplexity<=1.001x is not shown to hold at [\d,]+ bytes.*resume"):
        fit(model, data=text, budgets=["40%"], floor="perplexity<=1.001x", out=tmp_path / "out", settings=toys.QUICK)
    assert not (tmp_path / "out").exists()


def test_a_budget_below_everything_names_the_smallest(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"cannot be met: the smallest choice needs [\d,]+"):
        fit(model, data=text, budgets=["9kB"], out=tmp_path / "out", settings=toys.QUICK)


def test_structural_budgets_bring_low_rank(model: Path, text: Path, tmp_path: Path) -> None:
    found = fit(model, data=text, budgets=["flops=70%"], out=tmp_path / "out", settings=toys.QUICK)
    line = found.receipt.budgets[0]
    assert line.resource == "flops"
    assert line.spent <= line.allowed
    assert any(step.name == "factorize.svd" for step in found.recipe.steps)


def test_an_encoder_is_fitted_by_cosine(tmp_path: Path, text: Path) -> None:
    encoder = toys.bert(tmp_path / "bert")
    found = fit(encoder, data=text, budgets=["50%"], floor="cosine>=0.9", out=tmp_path / "out", settings=toys.QUICK)
    assert found.receipt.figures[0].after.value > 0.9
    assert found.receipt.holds


def test_a_recipe_is_applied_as_it_says(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse("pennyweight: 1\nsteps:\n- quantize.rtn: {bits: 8}\n  where: role:ffn.*\n")
    found = apply(model, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    layers = found.model.module.model.layers[0]
    assert isinstance(layers.mlp.up_proj, CompactLinear)
    assert not isinstance(layers.self_attn.q_proj, CompactLinear)
    assert found.receipt.figures[0].ratio is not None
    assert found.receipt.figures[0].ratio.value == pytest.approx(1, abs=0.02)
    nothing = Recipe.parse("pennyweight: 1\nsteps:\n- quantize.rtn: {bits: 8}\n  where: no.such.map\n")
    with pytest.raises(RecipeError, match=r"step 1, quantize.rtn: where \['no.such.map'\] selects no map"):
        apply(model, nothing, data=text, out=tmp_path / "other", settings=toys.QUICK)


def test_a_fit_is_its_own_recipe(fitted: Fitted, model: Path, text: Path, tmp_path: Path) -> None:
    again = apply(model, fitted.directory / "recipe.yaml", data=text, out=tmp_path / "out", settings=toys.QUICK)
    first, second = ((d / "model.safetensors").read_bytes() for d in (fitted.directory, again.directory))
    assert first == second


def test_contenders_are_compared_at_one_budget(model: Path, text: Path) -> None:
    found = compare(model, ["quantize.entropy", "quantize.rtn"], budgets=["45%"], data=text, settings=toys.QUICK)
    assert [row.name for row in found.rows] == ["quantize.entropy", "quantize.rtn"]
    assert all(row.bytes <= 0.45 * 2 * 200_000 for row in found.rows)
    assert "best" in found.table()
    assert json.loads(found.to_json())["rows"][0]["p_worse"] is None
    with pytest.raises(OptionError, match="give a budget"):
        compare(model, ["quantize.rtn"], data=text, settings=toys.QUICK)


def test_repair_lowers_the_harm_within_the_budget_and_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"data": text, "budgets": ["36%"], "settings": toys.QUICK}
    plain = fit(model, out=tmp_path / "plain", **options)
    mended = fit(model, out=tmp_path / "mended", time="8s", **options)
    assert mended.receipt.budgets[0].holds
    assert "repair: " in mended.receipt.notes[0]
    assert "thrown away" not in mended.receipt.notes[0]
    first, second = (each.receipt.figures[0].ratio for each in (plain, mended))
    assert first is not None
    assert second is not None
    assert second.value - 1 < 0.9 * (first.value - 1)


def test_a_simpler_plan_is_taken_where_it_ties(model: Path, text: Path, tmp_path: Path) -> None:
    settings = replace(toys.QUICK, check=64)
    found = fit(model, data=text, budgets=["50%"], out=tmp_path / "out", settings=settings)
    assert any("taken for being simpler" in note for note in found.receipt.notes)
    assert len({label for label in found.recipe.text().splitlines() if "quantize" in label}) <= 2


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_fold_into_scales(transposed: bool) -> None:
    from pennyweight.levers.quantize.entropy import Entropy
    from pennyweight.repair import Tuned, with_factors
    from pennyweight.statistics import Statistics
    from pennyweight.weights import Dense

    made = Entropy(bits=4.0).solve(Dense(torch.randn(40, 60)), Statistics(1, torch.eye(60)))
    weight = made.T if transposed else made
    rows, columns = weight.shape
    factors = {"outputs": torch.rand(rows) + 0.5, "inputs": torch.rand(columns) + 0.5}
    found = with_factors(weight, factors)
    wanted = factors["outputs"][:, None] * weight.dense() * factors["inputs"]
    # a byte holds a scale within a thirty-second of an octave
    torch.testing.assert_close(found.dense(), wanted, rtol=2 ** (2 / 32) - 1 + 1e-5, atol=0)
    assert found.cost() == weight.cost()

    trained = Tuned(weight, None)
    with torch.no_grad():
        for side, factor in trained.factors.items():
            factor.copy_(factors[side])
    x = torch.randn(3, columns)
    judged = trained(x).float()  # what is trained is what is written, up to bfloat16
    assert (judged - x @ found.dense().T).norm() < 1e-2 * judged.norm()
    judged.square().sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().min() > 0 for factor in trained.factors.values())


def test_bytes_are_reserved_where_factors_may_need_them() -> None:
    from types import SimpleNamespace

    from pennyweight.damage import Prediction
    from pennyweight.levers.factorize.svd import SVD
    from pennyweight.levers.quantize.entropy import Entropy
    from pennyweight.repair import reserved_bytes
    from pennyweight.weights import Cost

    slot = SimpleNamespace(group="blocks", name="a", map=SimpleNamespace(shape=(40, 60)))
    coded = Prediction(Entropy(bits=3.0), Cost(1, 1, 1), 0.0)
    others = [Prediction(SVD(rank=4), Cost(1, 1, 1), 0.0), Prediction(None, Cost(1, 1, 1), 0.0)]
    assert reserved_bytes([slot], {"a": [coded]}) == 0
    for other in others:
        assert reserved_bytes([slot], {"a": [coded, other]}) >= 80


def test_matrices_without_scales_get_factors_beside_them() -> None:
    from pennyweight.repair import with_factors
    from pennyweight.weights import Dense

    weight, factor = Dense(torch.randn(40, 60)), torch.rand(40) + 0.5
    found = with_factors(weight, {"outputs": factor})
    torch.testing.assert_close(found.dense(), factor[:, None] * weight.dense(), rtol=2e-3, atol=0)
    assert found.cost().bytes == weight.cost().bytes + 80


def test_a_frontier_falls_with_bytes(model: Path, text: Path) -> None:
    found = frontier(model, data=text, shares=(0.7, 0.5, 0.4), measured=(0.5,), settings=toys.QUICK)
    effects = [point.effect for point in found.points]
    assert effects == sorted(effects)
    assert [point.measured for point in found.points].count(True) == 1
    assert "predicted" in found.table()


def test_a_dry_run_predicts_and_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    found = fit(model, data=text, budgets=["45%"], dry_run=True, settings=toys.QUICK)
    assert isinstance(found, Estimate)
    assert found.bytes <= 0.45 * 2 * 200_000
    assert found.seconds > 0
    assert "memory" in str(found)
    assert not list(tmp_path.iterdir())


def test_standing_in_leaves_the_model_as_it_was(model: Path) -> None:
    loaded = load(model)
    before = loaded.fingerprint
    with pytest.raises(RuntimeError), standing_in(loaded.module, (), {}):
        raise RuntimeError
    assert loaded.fingerprint == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, OptionError, "nothing is asked"),
        ({"budgets": ["25 %%"]}, UnitError, "25 %%"),
        ({"budgets": ["0MB"]}, UnitError, "0MB"),
        ({"budgets": ["25%", "30MB"]}, OptionError, "two budgets for one resource"),
        ({"budgets": ["25%"], "repair": True}, OptionError, "--time"),
        ({"budgets": ["25%"], "levers": "quantize.nothing"}, RecipeError, "no lever is called"),
        ({"budgets": ["25%"], "levers": "-quantize.entropy"}, OptionError, "leaves none"),
        ({"budgets": ["25%"], "levers": "quantize.awq"}, OptionError, "changes whole models"),
        ({"budgets": ["kv=50%"]}, OptionError, "kv budget alone"),
        ({"budgets": ["25%"], "floor": "accuracy>=0.9x"}, UserError, "perplexity"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    model: Path, text: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fit(model, data=text, out=tmp_path / "out", settings=toys.QUICK, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_results_are_not_overwritten_unasked(fitted: Fitted, model: Path, text: Path) -> None:
    with pytest.raises(OutputError, match="already holds"):
        fit(model, data=text, budgets=["45%"], out=fitted.directory, settings=toys.QUICK)


def test_what_is_measured_here_can_be_budgeted(model: Path, text: Path, tmp_path: Path) -> None:
    found = fit(
        model, data=text, budgets=["memory=150%", "energy=30%", "latency=1000%"], out=tmp_path / "out",
        settings=toys.QUICK,
    )  # fmt: skip
    lines = {line.resource: line for line in found.receipt.budgets}
    assert lines["energy"].spent <= lines["energy"].allowed
    assert 0 < lines["latency"].spent <= lines["latency"].allowed
    assert lines["memory"].spent > 50e6  # the interpreter and libraries count
    assert found.receipt.holds
    with pytest.raises(
        BudgetError, match=r"1 us of latency cannot be met: the smallest choice needs \d.* [mu]s, .* of it"
    ):
        fit(model, data=text, budgets=["latency=1us"], out=tmp_path / "no", settings=toys.QUICK)


def test_a_cache_is_budgeted_beside_the_weights(model: Path, text: Path, tmp_path: Path) -> None:
    found = fit(model, data=text, budgets=["45%", "kv=40%"], out=tmp_path / "out", settings=toys.QUICK)
    line = next(line for line in found.receipt.budgets if line.resource == "kv")
    again = load(tmp_path / "out")
    setting = kept_setting(again)
    assert setting is not None
    assert line.spent == bytes_of(again) <= line.allowed
    assert found.recipe.steps[-1].name == "infer.kv_cache"
    assert found.receipt.holds
    assert kept_setting(load(model)) is None
    with pytest.raises(BudgetError, match=r"kv: 10 bytes of cache .* cannot be met: the harshest setting takes"):
        fit(model, data=text, budgets=["45%", "kv=10B"], out=tmp_path / "no", settings=toys.QUICK)
