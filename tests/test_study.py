"""The study runs its whole grid, and each cell is what its levers do alone."""

import json

import pytest
import toys
from typer.testing import CliRunner

from pennyweight.cli.app import app
from pennyweight.data import windows
from pennyweight.errors import OptionError
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.lever import make
from pennyweight.model import anatomy, file_bytes, load
from pennyweight.study import study
from pennyweight.weights import Dense
from pennyweight.work import Work


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return toys.llama(folder / "model"), toys.text_file(folder)


@pytest.fixture(scope="module")
def found(toy):
    model, text = toy
    return study(model, bits=(8, 2), groups=(32, None), activations=("16", "4", "e4m3"), data=text, settings=toys.QUICK)


def cell(found, method, bits, group, activations):
    keys = (method, bits, group, activations)
    (one,) = (c for c in found.cells if (c.method, c.bits, c.group_size, c.activations) == keys)
    return one


def test_every_setting_of_the_grid_is_there_once(found):
    keys = [(c.method, c.bits, c.group_size, c.activations) for c in found.cells]
    assert len(set(keys)) == len(keys) == 3 * 2 * 2 * 3 + 2
    assert all(c.low <= c.effect <= c.high for c in found.cells)
    assert keys[0] == ("none", 16, None, "4")


def test_a_cell_is_what_its_levers_do_alone(found, toy):
    model, text = toy
    changed = load(model)
    held = windows(text, changed.tokenizer, part="heldout", length=48, count=6, seed=0)
    before = token_losses(changed.module, held).mean(1)
    inside = tuple(one for one in changed.anatomy.layers() if one.block is not None)
    for one in inside:
        weight = make("quantize.rtn", {"bits": 2, "group_size": 32}).solve(
            Dense(anatomy.matrix(changed.module, one)), None
        )
        anatomy.replace(changed.module, one.path, weight)
    work = Work(model=changed, windows=None, maps=inside)
    make("quantize.activations", {"bits": 4}).change(changed, work)
    after = token_losses(changed.module, held).mean(1)
    one = cell(found, "rtn", 2, 32, "4")
    assert one.effect == pytest.approx(float((after - before).double().mean().exp()), rel=1e-6)
    assert one.bytes == file_bytes(changed)
    assert found.figure == pytest.approx(float(before.double().mean().exp()), rel=1e-6)


def test_better_settings_do_better(found):
    for method in ("rtn", "gptq", "lorc"):  # the toy knows no text: what counts is how far it is moved
        assert abs(cell(found, method, 2, None, "16").effect - 1) > 5 * abs(cell(found, method, 8, 32, "16").effect - 1)
        assert cell(found, method, 2, 32, "16").bytes < cell(found, method, 8, 32, "16").bytes
    assert cell(found, "lorc", 2, None, "16").bytes > cell(found, "gptq", 2, None, "16").bytes
    ints, floats = cell(found, "none", 16, None, "4"), cell(found, "none", 16, None, "e4m3")
    assert abs(floats.effect - 1) < abs(ints.effect - 1)
    assert cell(found, "gptq", 2, None, "16") != cell(found, "gptq", 2, None, "4")


def test_the_table_says_it_all(found):
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(found.cells)
    assert "6 held-out windows, perplexity, " in lines[0]
    worst = max(found.cells, key=lambda c: c.effect)
    assert worst.sensitivity == "III"
    assert {c.sensitivity for c in found.cells} <= {"I", "II", "III"}
    assert json.loads(found.to_json())["cells"][0]["activations"] == "4"


def test_the_model_stays_as_it_was(toy):
    model, text = toy
    loaded = load(model)
    before = loaded.fingerprint
    study(loaded, methods=("rtn",), bits=(2,), groups=(None,), activations=("8",), data=text, settings=toys.QUICK)
    assert loaded.fingerprint == before
    assert not any(isinstance(layer, Dense) for layer in loaded.module.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("zq",)}, "unknown method 'zq'; give rtn, gptq, lorc"),
        ({"bits": ()}, "study: no bits; give at least one"),
        ({"bits": (9,)}, "bits = 9 is out of range"),
        ({"groups": (0,)}, "group_size = 0 is out of range"),
        ({"activations": ("e3m4",)}, "activations 'e3m4'; give 2 to 16 bits, or e4m3"),
        ({"activations": ("1",)}, "activations '1'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(options, words, toy):
    with pytest.raises(OptionError, match=words):
        study(toy[0], data=toy[1], **options)


def test_from_the_command_line(toy, tmp_path):
    model, text = toy
    result = CliRunner().invoke(
        app,
        ["study", str(model), "--data", str(text), "--methods", "rtn", "--bits", "4", "--groups", "32,row",
         "--activations", "16,8", "--windows", "4", "--length", "48", "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip().splitlines()) == 2 + 4 + 1
    assert "row" in result.stdout
    assert len(json.loads((tmp_path / "study.json").read_text())["cells"]) == 5
    wrong = CliRunner().invoke(app, ["study", str(model), "--bits", "4,row"])
    assert "--bits '4,row'; give whole numbers" in str(wrong.exception)
