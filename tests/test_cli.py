"""The command line: quick to start, thin over the Python functions, and one line for every mistake."""

import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_receipt import receipt as example_receipt

import pennyweight.fit
from pennyweight.cli import main
from pennyweight.cli.app import commands
from pennyweight.cli.progress import Lines, progress
from pennyweight.errors import BudgetError
from pennyweight.laws import bench

LOOK = "import sys; from pennyweight.cli import main; code = main(sys.argv[1:]); print(code, *sorted(sys.modules))"


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["rows"], ["assets", "list"]], ids=" ".join)
def test_nothing_heavy_is_imported_for_help_and_lists(words):
    done = subprocess.run([sys.executable, "-c", LOOK, *words], capture_output=True, text=True, check=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert "typer" in modules
    assert {"torch", "transformers", "numpy", "scipy", "safetensors"} & set(modules) == set()


def test_help_answers_within_half_a_second():
    """Of the processor: it waits for nothing else, and what else the machine does is not its time."""
    seconds = []
    for _ in range(3):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pennyweight.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime - begun.ru_utime + ended.ru_stime - begun.ru_stime)
    assert 0 < min(seconds) < 0.4  # the rest of half a second is for what it reads from the disk


def test_every_command_has_help_and_every_option_a_text():
    found = commands()
    assert {"measure", "fit", "plan", "claims run", "claims list", "levers show", "laws fit", "rows"} <= set(found)
    for words, command in found.items():
        assert command.help, words
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{words} {parameter.name}"


@pytest.fixture
def calls(monkeypatch):
    """What `fit` was called with; its own signature still decides what it takes."""
    taken: list[dict[str, Any]] = []
    signature = inspect.signature(pennyweight.fit.fit)

    def stand_in(*args, **options):
        taken.append(dict(signature.bind(*args, **options).arguments))
        return "the prediction"

    monkeypatch.setattr(pennyweight.fit, "fit", stand_in)
    return taken


def test_fit_passes_on_what_was_given(calls, capsys, tmp_path):
    words = (
        f"fit toy --budget 25% --budget kv=2GB --floor perplexity<=1.10x --levers +a,-b --time 10min --out {tmp_path} "
    )
    switches = ("--dry-run", "--resume", "--overwrite", "--no-repair")
    assert main([*words.split(), *switches, "--seed", "7", "--target", "gguf"]) == 0
    (found,) = calls
    assert callable(found.pop("progress"))
    assert found == {
        "model": "toy", "data": "wiki", "budgets": ["25%", "kv=2GB"], "floor": "perplexity<=1.10x", "levers": "+a,-b",
        "time": "10min", "out": tmp_path, "dry_run": True, "resume": True, "overwrite": True, "repair": False,
        "seed": 7, "target": "gguf",
    }  # fmt: skip
    assert capsys.readouterr().out == "the prediction\n"


def test_plan_is_a_dry_run(calls, capsys):
    assert main(["plan", "toy", "--budget", "25%"]) == 0
    assert calls[0]["dry_run"] is True
    assert capsys.readouterr().out == "the prediction\n"


@pytest.mark.parametrize(
    ("words", "module", "taken"),
    [
        ("measure toy --reference big --windows 3 --untimed", "measure",
         {"model": "toy", "data": "wiki", "reference": "big", "windows": 3, "timed": False, "seed": 0}),
        ("apply toy recipe.yaml --out dir --data news --overwrite --seed 2", "apply",
         {"model": "toy", "recipe": Path("recipe.yaml"), "data": "news", "out": Path("dir"), "overwrite": True,
          "seed": 2}),
        ("compare toy quantize.rtn recipe.yaml --budget 25% --out dir", "compare",
         {"model": "toy", "contenders": ["quantize.rtn", "recipe.yaml"], "budgets": ["25%"], "data": "wiki",
          "out": Path("dir"), "seed": 0}),
        ("frontier toy --levers quantize", "frontier",
         {"model": "toy", "data": "wiki", "levers": "quantize", "out": None, "seed": 0}),
        ("verify dir --model toy", "verify", {"directory": Path("dir"), "model": "toy"}),
    ],
)  # fmt: skip
def test_each_verb_calls_its_function_and_writes_its_json(words, module, taken, monkeypatch, capsys, tmp_path):
    home = importlib.import_module(f"pennyweight.{module}")
    signature = inspect.signature(getattr(home, module))
    seen = []

    def stand_in(*args, **options):
        seen.append(dict(signature.bind(*args, **options).arguments))
        receipt = example_receipt()
        found = {"table": lambda: "a table", "to_json": lambda: {"figure": 1}, "holds": False}
        return SimpleNamespace(**found, receipt=receipt, directory=Path("dir"))

    monkeypatch.setattr(home, module, stand_in)
    code = main([*words.split(), *([] if module == "apply" else ["--json", str(tmp_path / "found.json")])])
    assert code == (1 if module == "verify" else 0)  # a receipt that does not hold
    (found,) = seen
    assert callable(found.pop("report" if module == "measure" else "progress"))
    assert found == taken
    said = capsys.readouterr().out
    if module == "apply":
        assert "perplexity: 25.4 -> 27 [26, 28], ratio 1.063 [1.05, 1.08], predicted 27.5" in said
        assert "budget 25%: kept, 67,257,504 bytes (67.3 MB) of 67,257,504 bytes (67.3 MB)" in said
        assert "floor perplexity<=1.10x: holds (upper 95 % limit 1.078, 32 windows)" in said
        assert said.endswith("1.50 s; written to dir\n")
    else:
        assert said == "a table\n"
        assert json.loads((tmp_path / "found.json").read_text()) == {"figure": 1}


def test_an_error_is_one_line_on_stderr_and_exit_code_two(monkeypatch, capsys):
    def fail(*args, **options):
        raise BudgetError("60 MB cannot be met:\n  the smallest stores 99.8 MB")

    monkeypatch.setattr(pennyweight.fit, "fit", fail)
    assert main(["fit", "toy", "--budget", "60MB", "--out", "x"]) == 2
    said = capsys.readouterr()
    assert said.err == "pennyweight: 60 MB cannot be met: the smallest stores 99.8 MB\n"
    assert said.out == ""


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pennyweight.fit, "fit", stop)
    assert main(["fit", "toy", "--floor", "perplexity<=1.1x", "--out", "a b"]) == 130
    assert capsys.readouterr().err == (
        "pennyweight: stopped; what is finished is kept, go on with: "
        "pennyweight fit toy --floor 'perplexity<=1.1x' --out 'a b' --resume\n"
    )
    assert main(["plan", "toy", "--budget", "25%"]) == 130
    assert capsys.readouterr().err == "pennyweight: stopped\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "Missing argument 'MODEL'. (see `pennyweight fit --help`)"),
        (["fti"], "No such command 'fti'."),
        (["fit", "toy", "--bugdet", "3"], "No such option"),
        (["fit", "toy", "--seed", "x"], "Invalid value for '--seed'"),
        (["fit", "toy", "--budget", "25 %%"], "budget '25 %%': no unit is called '%%'; write 35MB or 0.5GiB or 25%"),
        (["fit", "toy", "--budget", "0MB"], "budget '0MB' is not above zero"),
        (["rows", "--room", "quantise"], "no room is called 'quantise'; did you mean quantize?"),
        (["claims", "run", "--rows", "a"], "--rows 'a': not numbers; write --rows 5,19"),
        (["claims", "run", "--rows", "3", "--page", "x"], "the page is of a full run"),
        (["claims", "run", "--rows", "999"], "no claim is about row 999"),
        (["levers", "show", "quantize.gtpq"], "no lever is called 'quantize.gtpq'; did you mean quantize.gptq"),
        (["levers", "list", "kitchen"], "no lever lies in a room 'kitchen'"),
        (["laws", "show", "chinchila"], "did you mean chinchilla"),
        (["laws", "predict", "/nowhere", "N=1"], "/nowhere: cannot be read (No such file or directory)"),
        (["laws", "sweep", "widht=16", "--out", "x"], "bench: no setting is called 'widht'; there are text, width"),
        (["laws", "sweep", "width=16,a", "--out", "x"], "'width=16,a' is not NAME=NUMBER,...; write width=16,32"),
        (["laws", "sweep", "base=1", "--out", "x"], "bench: no setting is called 'base'"),
        (["laws", "sweep", "width", "--out", "x"], "'width' is not NAME=NUMBER,...; write width=16,32"),
        (["assets", "fetch", "wikki"], "no asset is called 'wikki'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line_and_exit_code_two(words, said, capsys):
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("pennyweight: ")
    assert said in found.err
    assert found.err.count("\n") == 1


def test_rows_levers_laws_and_assets_are_listed(capsys):
    assert main(["rows", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in found] == list(range(1, 256))
    assert main(["rows", "--room", "merge"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["row", "10", "71", "95", "96"]
    assert main(["levers", "show", "quantize.gptq"]) == 0
    assert "bits\tint\t4\tbetween" in capsys.readouterr().out
    assert main(["levers", "list", "quantize", "--json"]) == 0
    assert "quantize.gptq" in [one["lever"] for one in json.loads(capsys.readouterr().out)]
    assert main(["laws", "show", "chinchilla"]) == 0
    assert "L = E + A/N^alpha + B/D^beta" in capsys.readouterr().out
    assert main(["assets", "list"]) == 0
    assert "smollm2-135m\tmodel\t" in capsys.readouterr().out


def test_a_sweep_of_tiny_models_ends_as_points_of_a_law(tmp_path, capsys):
    points, kept = tmp_path / "runs.csv", tmp_path / "kept"
    words = [
        "laws",
        "sweep",
        "width=4,8",
        "depth=1",
        "windows=3",
        "warmup=1",
        "steps=3,6",
        "batch=2",
        "length=8",
        "held_out=4",
    ]
    words += ["--out", str(points), "--cache", str(kept), "--workers", "1"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("4 runs, ")
    assert "train tiny models 4/4" in said.err
    first = points.read_text()
    assert first.splitlines()[0] == "N,D,C,steps,B,lr,loss"
    assert [line.split(",")[:2] for line in first.splitlines()[1:]] == [
        [str(bench.Run(width=width, depth=1).params), str(steps * 16)] for width in (4, 8) for steps in (3, 6)
    ]
    assert len(list(kept.iterdir())) == 4
    assert main([*words[:-2], "evaluations=1"]) == 0  # all kept
    assert points.read_text() == first
    assert main([*words, "evaluations=3", "--curve"]) == 0
    assert len(points.read_text().splitlines()) == 13


def test_a_law_is_fitted_kept_and_asked(tmp_path, capsys):
    points = tmp_path / "points.csv"
    sizes = [10 ** (4 + step / 4) for step in range(12)]
    points.write_text("x,loss\n" + "".join(f"{size},{1.5 + (3e5 / size) ** 0.3}\n" for size in sizes))
    law = tmp_path / "law.json"
    assert main(["laws", "fit", str(points), "--form", "power_const", "--bootstrap", "0", "--json", str(law)]) == 0
    said = capsys.readouterr().out
    assert "alpha" in said
    assert "12 points" in said
    assert main(["laws", "predict", str(law), "x=3e6"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert float(said[0].split(" = ")[1]) == pytest.approx(1.5 + 0.1**0.3, rel=1e-3)
    assert said[1] == "inside the fitted range"
    assert main(["laws", "predict", str(law), "x=1e12"]) == 0
    assert "warning: x lies" in capsys.readouterr().out
    for words, wrong in ((["N=3"], "this is a law of x; given: N"), (["x"], "'x' is not NAME=VALUE")):
        assert main(["laws", "predict", str(law), *words]) == 2
        assert wrong in capsys.readouterr().err
    law.write_text('{"form": "power_const", "constants": {"alpha": "much"}}')
    assert main(["laws", "predict", str(law), "x=3"]) == 2
    assert "not a law" in capsys.readouterr().err


def test_the_version_and_a_reader_that_leaves_early():
    done = subprocess.run(
        [sys.executable, "-m", "pennyweight.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pennyweight 0.")
    reading, writing = os.pipe()
    os.close(reading)
    left = subprocess.run([sys.executable, "-m", "pennyweight.cli", "rows"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert left.stderr == b""


def test_progress_in_lines_says_beginning_end_and_every_ten_seconds(capsys):
    now = [0.0]
    report = Lines(clock=lambda: now[0])
    for second in range(31):
        now[0] = float(second)
        report("solve", second, 30)
    assert capsys.readouterr().err.splitlines() == [
        "solve 0/30, 0 us",
        "solve 10/30, 10.0 s, about 20.0 s left",
        "solve 20/30, 20.0 s, about 10.0 s left",
        "solve 30/30, 30.0 s",
    ]


def test_progress_in_bars_shows_the_stage(capsys):
    with progress(terminal=True) as report:
        report("statistics", 1, 2)
        report("statistics", 2, 2)
        report("unknown length", 5, 0)
    said = capsys.readouterr().err
    assert "statistics" in said
    assert "2/2" in said
