"""Compressed tables: budgets to the byte, exactness where a method is exact, and what each finds on toy bags."""

import itertools
import json

import numpy as np
import pytest
import torch
import toys

from pennyweight.apply import apply
from pennyweight.cli import main
from pennyweight.embeddings import METHODS, Bags, Table, bench, compress, compressor, recommend
from pennyweight.embeddings.bench import FOURTEEN, Result, auc, run
from pennyweight.embeddings.shared import similar
from pennyweight.embeddings.sized import widths_within
from pennyweight.embeddings.trained import TRAINED
from pennyweight.embeddings.words import word_bags
from pennyweight.errors import BudgetError, OptionError
from pennyweight.lever import make
from pennyweight.model import load
from pennyweight.statistics import Statistics
from pennyweight.weights import CompactEmbedding, Dense, SharedRows, TensorTrain, rebuild, structure


def zipf(rows, width=8):
    return Table((10_000 / torch.arange(1, rows + 1)).long(), width)


def bags(rows=400, count=900, seed=0):
    """Bags whose class is the sign of the summed values of their ids."""
    g = np.random.default_rng(seed)
    ids = np.minimum(g.zipf(1.3, (count, 6)) - 1, rows - 1)
    value = g.standard_normal(rows)
    labels = (value[ids].sum(1) + 0.3 * g.standard_normal(count) > 0).astype(int)
    order = np.argsort(-np.bincount(ids[300:].ravel(), minlength=rows), kind="stable")
    ids, labels = torch.from_numpy(np.argsort(order)[ids]), torch.from_numpy(labels)
    return Bags(ids[300:], labels[300:], ids[:300], labels[:300], rows)


def test_there_are_fourteen():
    shared = {"compo", "tt", "dhe", "robe", "dedup", "mgqe", "adapt"}
    smaller = {"int", "alpt", "mde", "autodim", "optembed", "deeplight", "autosrh"}  # int: INT8 and INT16
    assert set(FOURTEEN) == shared | smaller
    assert len(FOURTEEN) == 14
    assert set(METHODS) - set(FOURTEEN) == {"hash", "narrow", "dense"}


@pytest.mark.parametrize("method", FOURTEEN)
def test_every_method_learns_within_its_budget_and_survives_a_file(method):
    task = bags()
    found = run(method, task, 0.5, width=8, steps=60)
    assert not found.why
    assert found.bytes <= 0.5 * 4 * 400 * 8
    assert found.auc > 0.55
    made = compressor(method, task.table(8), 6400)
    for step in range(1, 5):
        made.step(step / 4, lambda weight: float(weight.dense().detach().norm()))
    kept = made.finish()
    again = rebuild(structure(kept), kept.state_dict())
    index = torch.tensor([[0, 399], [7, 7]])
    assert torch.equal(again.rows(index), kept.rows(index))
    # what is kept is what was trained
    torch.testing.assert_close(kept.rows(index), made.weight.rows(index), rtol=2e-3, atol=2e-3)


def test_small_budgets_are_for_methods_that_share_rows():
    task = bags()
    found = {one.method: one for one in bench(task, budgets=[0.03], width=8, steps=2)}
    assert {name for name, one in found.items() if not one.why} == {"tt", "dhe", "robe", "adapt", "dedup"}
    assert "remainders of 20 takes 1280 already" in found["compo"].why  # quotients and remainders: 2 * sqrt(400) rows
    assert "bits 1 takes 402 already" in found["int"].why


@pytest.mark.parametrize("method", ["compo", "robe", "adapt", "hash", "dense"])
def test_as_many_values_as_the_table_hold_any_table(method):
    table = zipf(30)
    made = compressor(method, table, table.bytes + 4 * 8)
    wanted = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (made.weight.dense() - wanted).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) < 1e-4


def test_a_full_tensor_train_is_the_table():
    matrix = torch.randn(23, 12, generator=torch.Generator().manual_seed(0))
    found = TensorTrain.nearest(matrix, rows=(3, 4, 2), columns=(2, 2, 3), rank=99)
    torch.testing.assert_close(found.dense().detach(), matrix, rtol=1e-4, atol=1e-5)
    low = TensorTrain.nearest(found.dense().detach(), rows=(3, 4, 2), columns=(2, 2, 3), rank=3)
    # successive truncation: the error is at most the tails of both unfoldings
    cube = torch.zeros(24, 12, dtype=torch.float64)
    cube[:23] = matrix.double()
    six = cube.view(3, 4, 2, 2, 2, 3).permute(0, 3, 1, 4, 2, 5)
    tails = [(torch.linalg.svdvals(unfolded)[3:] ** 2).sum() for unfolded in (six.reshape(6, -1), six.reshape(48, -1))]
    error = float((low.dense().detach().double() - matrix).square().sum())
    assert max(float(tail) for tail in tails) * 0.5 < error <= float(sum(tails)) * (1 + 1e-5)


def test_rows_on_the_fixed_grid_are_rounded_without_bias():
    made = compressor("int", zipf(200), 400 * 8)
    with torch.no_grad():
        made.weight.matrix.fill_(0.00713)
    made.step(0.1, lambda weight: 0.0)
    values = made.weight.matrix.detach()
    grid = made._scale.float()
    assert set((values / grid).round().flatten().tolist()) == {0.0, 1.0}
    assert float(values.mean()) == pytest.approx(0.00713, rel=0.1)


def test_sixteen_bits_are_kept_to_the_last_one():
    table = zipf(50)
    made = compressor("int", table, table.bytes // 2 + 4)
    with torch.no_grad():
        made.weight.matrix[0, :3] = torch.tensor([9.0, -9.0, 0.1])  # both ends, and what a step cannot be off
    trained = made.weight.matrix.detach()
    made.step(0.1, lambda weight: 0.0)
    grid = made._scale.float()
    assert float(grid) == 2.0**-15
    assert trained[0, :2].tolist() == [float(grid) * 32639, -1.0]
    assert float((trained[0, 2] - 0.1).abs()) <= float(grid)
    kept = made.finish()
    assert torch.equal(kept.dense(), trained)
    assert kept.cost().bytes == 2 * 50 * 8 + 4
    assert torch.equal(rebuild(structure(kept), kept.state_dict()).rows(torch.arange(50)), trained)
    assert compressor("int", table, table.bytes // 2)._bits == 8


def test_learned_steps_follow_the_loss_and_training_holds_codes():
    table = zipf(40)
    wanted = 0.02 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    wanted[:, 0] *= 6  # a step that starts from the largest value of a row is too coarse for the others

    def descended(rate):
        made = compressor("alpt", table, 40 * (2 + 3), seed=2)  # 3 bits
        made.SCALE_RATE, begin = rate, made.weight.scale.clone()
        for n in range(200):
            (made.weight.rows(torch.arange(40)) - wanted).square().sum().backward()
            made.step(n / 200, lambda weight: 0.0)
        kept = made.finish()
        return made, begin, float((kept.dense().detach() - wanted).square().mean().sqrt())

    fixed, _, error = descended(0.0)
    learned, begin, less = descended(0.02)
    assert torch.equal(fixed.weight.scale, begin)
    assert float((learned.weight.scale / begin).median()) < 0.8
    assert less < 0.8 * error
    # codes, and a step and two sums of squares a row; then the values and gradients of all 40 rows
    assert learned.training_bytes() == 40 * (8 + 4 + 8) + 2 * 4 * 40 * 8
    with torch.no_grad():
        assert torch.equal(learned.weight.rows(torch.arange(40)), learned.weight.dense())


def test_the_pull_on_a_step_is_the_slope_of_rounding():
    made = compressor("alpt", zipf(1), 2 + 3, seed=0)
    weight = made.weight
    weight.codes[:], weight.scale[:] = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]]), 0.1
    pull = torch.tensor([[0.3, -0.2, 0.1, 0.5, -0.4, 0.2, 0.1, 0.7]])
    (weight.rows(torch.tensor([0])) * pull).sum().backward()
    made.RATE = 0.25
    step = 0.25 * pull / pull.square().mean().sqrt()
    moved = weight.dense() - step

    def rounded(scale):
        return float(((moved / scale).clamp(-4, 3).round() * scale * pull).sum())

    # nearly everywhere a rounded number rises with its step as its code does; LSQ counts x / s against it, inside
    slope = (rounded(0.1 + 1e-6) - rounded(0.1 - 1e-6)) / 2e-6
    inside = (moved / 0.1 > -4) & (moved / 0.1 < 3)
    slope -= float((inside * moved / 0.1 * pull).sum())
    made.step(0.5, lambda w: 0.0)
    assert float(made._scale_squares) == pytest.approx(slope**2, rel=2e-2)


def test_words_of_a_file_become_bags_and_the_verb_compares_on_them(tmp_path, capsys):
    g = np.random.default_rng(0)
    lines = ["text,label"]
    for _ in range(240):
        good = bool(g.random() < 0.5)
        words = [f"{'g' if good else 'b'}{n}" if g.random() < 0.6 else f"x{n}" for n in g.zipf(1.7, 5) if n < 30]
        lines.append(f"{' '.join(words)} end,{'up' if good else 'down'}")
    file = tmp_path / "texts.csv"
    file.write_text("\n".join(lines))
    found = word_bags(file, length=4, held_out=60)
    assert found.held_ids.shape == (60, 4)
    assert found.ids.shape == (180, 4)
    assert bool((found.table(8).counts.diff() <= 0).all())
    out = tmp_path / "out.json"
    command = ["embeddings", str(file), "--methods", "robe,int,alpt", "--budgets", "0.5,0.001", "--steps", "60"]
    assert main([*command, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "take at 0.5, for quality:" in text
    assert "take at 0.001, for nothing fits" in text
    figures = {(one["method"], one["budget"]): one for one in json.loads(out.read_text())}
    assert figures["alpt", 0.5]["training_bytes"] < figures["int", 0.5]["training_bytes"]
    assert "bits 1 takes" in figures["int", 0.001]["why"]
    file.write_text("text,mood\na,b\n")
    assert main(["embeddings", str(file)]) == 2
    assert "no column 'label'; give columns text and label" in capsys.readouterr().err
    assert main(["embeddings", "tweets", "--methods", "lsh"]) == 2
    assert "no method is called 'lsh'" in capsys.readouterr().err


def test_buckets_are_looked_up_alike_and_widths_fill_the_budget():
    table = zipf(1000)
    sizes = table.sizes()
    assert sum(sizes) == 1000
    assert sizes == sorted(sizes)
    uses = [int(part.sum()) for part in torch.split(table.counts, sizes)]
    assert max(uses[1:-1]) < 2 * min(uses[1:-1])
    widths = widths_within(table, [4.0] * len(sizes), 16_000)
    size = 4 * sum(rows * d + (8 * d if d < 8 else 0) for rows, d in zip(sizes, widths, strict=True))
    assert 12_000 < size <= 16_000
    with pytest.raises(BudgetError, match="a width of 1 in all buckets takes"):
        widths_within(table, [1.0] * len(sizes), 3000)


def test_similar_blocks_share_a_bucket():
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 16, generator=g)
    blocks = centers.repeat(25, 1) + 0.01 * torch.randn(100, 16, generator=g)
    index = similar(blocks, 8, g)
    assert int(index.max()) + 1 <= 8
    for bucket in range(int(index.max()) + 1):
        assert len({int(n) % 4 for n in torch.where(index == bucket)[0]}) == 1
    assert torch.equal(similar(blocks, 100, g), torch.arange(100))


def test_the_area_under_the_curve_counts_pairs():
    g = torch.Generator().manual_seed(3)
    scores, labels = torch.randint(0, 5, (40,), generator=g).float(), torch.randint(0, 2, (40,), generator=g)
    pairs = list(itertools.product(scores[labels == 1].tolist(), scores[labels == 0].tolist()))
    assert auc(scores, labels) == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))


def test_recommendations_weigh_what_the_use_needs():
    results = [
        Result("a", 0.1, auc=0.90, lookup_ms=9.0, training_bytes=10),
        Result("b", 0.1, auc=0.897, lookup_ms=1.0, training_bytes=90),
        Result("c", 0.1, auc=0.80, lookup_ms=0.1, training_bytes=1),
        Result("d", 0.1, why="too large"),
        Result("c", 0.5, auc=0.99),
    ]
    use = {name: recommend(results, name, budget=0.1).method for name in ("quality", "lookup", "training")}
    assert use == {"quality": "a", "lookup": "b", "training": "a"}
    with pytest.raises(OptionError, match=r"under 0.2: 0 methods were trained"):
        recommend(results, "quality", budget=0.2)


@pytest.mark.parametrize("method", TRAINED)
def test_trained_tables_come_within_the_budget_and_nearer_with_more(method):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 4, generator=g) @ torch.randn(4, 16, generator=g) / 4
    counts = torch.rand(300, generator=g)
    errors = []
    for share in (0.4, 0.95):
        budget = int(share * 2 * matrix.numel())
        found = compress(matrix, method, budget, counts=counts)
        assert found.cost().bytes <= budget
        errors.append(found.error(matrix))
    assert errors[1] < errors[0] <= 1.1


def test_frequent_rows_get_the_better_codes():
    matrix = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(600)
    counts[100:160] = 1
    found = compress(matrix, "mgqe", int(0.5 * 2 * matrix.numel()), counts=counts)
    assert isinstance(found, SharedRows)
    error = (found.dense() - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert error[100:160].mean() < 0.7 * error[160:].mean()


def test_a_recipe_makes_and_loads_a_small_table(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "pennyweight: 1\nsteps:\n- factorize.embedding: {density: 0.5, method: mgqe}\n  where: '*embed_tokens'\n"
    )
    found = apply(
        toys.llama(tmp_path / "model"), recipe, data=toys.text_file(tmp_path), out=tmp_path / "out",
        settings=toys.QUICK,
    )  # fmt: skip
    again = load(found.directory)
    (table,) = [layer for layer in again.module.modules() if isinstance(layer, CompactEmbedding)]
    assert table.weight.cost().bytes <= 256 * 64
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.module(ids).logits, found.model.module(ids).logits)


def test_bad_requests_are_refused_with_the_remedy():
    with pytest.raises(OptionError, match="no method is called 'lsh'; there are compo, tt"):
        compressor("lsh", zipf(9), 100)
    with pytest.raises(OptionError, match="number rows by falling frequency"):
        Table(torch.tensor([1, 2]), 4)
    with pytest.raises(OptionError, match="'dhe' does not start from a trained table; give one of robe"):
        compress(torch.zeros(4, 4), "dhe", 99)
    with pytest.raises(OptionError, match="AutoDim has no nearest table; train it"):
        compressor("autodim", zipf(9), 999).nearest(torch.zeros(9, 8))
    with pytest.raises(BudgetError, match="10 bytes do not hold the order of 64 rows"):
        compress(torch.ones(64, 4), "mde", 10, counts=torch.arange(64))
    with pytest.raises(OptionError, match="one of robe, tt, dedup"):
        make("factorize.embedding", {"method": "dhe"})
    lever = make("factorize.embedding", {"method": "robe", "density": 0.5})
    assert not lever.needs
    assert lever.solve(Dense(torch.randn(20, 4)), Statistics()).cost().bytes <= 80


@pytest.mark.parametrize("method", [*FOURTEEN, "hash"])
def test_look_ups_take_ids_of_any_width_and_shape_and_no_others_than_there_are(method):
    made = compressor(method, zipf(300), 4800)
    for step in range(1, 5):
        made.step(step / 4, lambda weight: float(weight.dense().detach().norm()))
    layer = CompactEmbedding(made.finish())
    whole = layer.weight.dense().detach()
    ids = torch.tensor([[0, 299, 7], [150, 151, 40]])
    with torch.no_grad():
        for one in (ids, ids.int(), ids[0, 1], ids[:, :0]):
            torch.testing.assert_close(layer(one), whole[one.long()])
        for wrong in (300, 301, 10**6):
            with pytest.raises(IndexError):
                layer(torch.tensor([0, wrong]))


def test_rules_that_would_answer_any_number_refuse_negative_ones_too():
    for method in ("hash", "adapt", "dhe", "robe", "tt", "compo", "mde"):
        made = compressor(method, zipf(300), 4800)
        with pytest.raises(IndexError, match="rows -1 to 3 of 300"):
            made.weight.rows(torch.tensor([3, -1]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["fine,1", "poor"], "row 2 after the heading has no label"),
        (["!!,1", "??,0"] * 3, "no text to train on has a word"),
    ],
)
def test_tables_of_texts_that_say_nothing_end_in_one_line(rows, said, tmp_path, capsys):
    file = tmp_path / "texts.csv"
    file.write_text("\n".join(["text,label", *rows]))
    assert main(["embeddings", str(file), "--methods", "robe", "--steps", "1"]) == 2
    assert said in capsys.readouterr().err
