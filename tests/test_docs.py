"""The documentation is true: its Python runs, its commands parse, its links and the files it names are there."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pennyweight import lever as registry
from pennyweight.cli import main
from pennyweight.cli.app import commands
from pennyweight.recipe import Recipe
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, rebuild, structure

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
#: Written by hand, and not a log.
TABLES = tuple(f"docs/{name}.md" for name in ("gguf", "merge", "planning", "quantizers", "sparsity", "structured"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    registry.load_rooms()
    kept = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(kept)


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_the_python_of_the_readme_runs(number, capsys):
    exec(compile(blocks("README.md", "python")[number], f"README.md block {number}", "exec"), {})


def commands_of(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    lines = [
        line.removeprefix("$ ") for sort in ("sh", "console") for b in blocks(page, sort) for line in b.splitlines()
    ]
    found = [line for line in lines if line.startswith("pennyweight ")]
    return found + re.findall(r"`(pennyweight [^`]+)`", text)


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in (*PAGES, *TABLES) for line in commands_of(page)])
def test_the_commands_of_the_documentation_exist_and_take_those_options(page, line):
    words = shlex.split(line, comments=True)[1:]
    found = commands()
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in found), None)
    groups = {known.split()[0] for known in found if " " in known}
    if name is None:  # `pennyweight --help`, or a group named in passing
        assert words in (["--help"], *([group] for group in groups)), line
        return
    rest = words[len(name.split()) :]
    found[name].make_context(name, rest, resilient_parsing=not rest)


def test_the_console_of_the_planning_page_is_what_is_printed(tmp_path, monkeypatch, capsys):
    """Lines of three dots stand for any number of others; last digits may differ from machine to machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.csv").write_bytes((ROOT / "docs/tiny_runs.csv").read_bytes())
    number = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"
    said = re.split(r"^\$ ", "".join(blocks("docs/planning.md", "console")), flags=re.MULTILINE)[1:]
    assert len(said) == 6
    for command, *lines in (part.splitlines() for part in said):
        assert main(shlex.split(command)[1:]) == 0, command
        printed = capsys.readouterr().out
        words = (re.escape(re.sub(number, "#", line)) if line != "..." else r"(?:.*\n)*.*" for line in lines)
        bare = re.sub(" +", " ", "\n".join(re.sub(number, "#", line).rstrip() for line in printed.splitlines()))
        assert re.fullmatch(re.sub(r"(\\ )+", r"\\ ", "\n".join(words)), bare), command
        if "..." not in lines:
            ours, theirs = ([float(one.replace(",", "")) for one in re.findall(number, text)]
                            for text in ("\n".join(lines), printed))  # fmt: skip
            assert theirs == pytest.approx(ours, rel=0.02, abs=1e-5), command  # a floor of nothing is 7e-10 or 0


def test_the_targets_that_the_documentation_names_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in PAGES:
        text = (ROOT / page).read_text()
        lines = re.findall(r"^make ([a-z ]+?)(?: +#.*)?$", text, re.MULTILINE) + re.findall(r"`make ([a-z ]+)", text)
        named |= {word for line in lines for word in line.split()}
    assert {"fit", "test", "lint", "claims"} <= targets
    assert named <= targets
    assert {"fit", "test", "lint"} <= named


@pytest.mark.parametrize("page", [*PAGES, *TABLES])
def test_links_and_files_named_are_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9.]*|[a-z_]+\.py)`", text):
        # written by a run, made by a contributor, or a pattern
        if name.startswith("runs/") or name.endswith(("residual.py", "docs/tried.md")):
            continue
        assert any((place / name).exists() for place in (ROOT, ROOT / "src/pennyweight")), name


def test_the_lever_of_the_contributing_page_works_as_it_stands(monkeypatch):
    code, oracle = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("pennyweight.levers.quantize.residual")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a dataclass looks its annotations up there
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    card = registry.find("quantize.residual")
    assert card.summary == "Round, then round what was left over."
    assert [option.name for option in card.options] == ["bits", "residual_bits", "group_size"]
    step = Recipe.parse("pennyweight: 1\nsteps:\n- quantize.residual: {bits: 3}\n").steps[0]
    matrix = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    weight = step.lever.solve(Dense(matrix), NO_STATISTICS)
    assert torch.equal(rebuild(structure(weight), weight.state_dict()).dense(), weight.dense())
    assert [one.group_size for one in registry.candidates_of(card, (8, 40))] == [40, 40, 40]
    names: dict[str, object] = {}
    exec(compile(oracle, "CONTRIBUTING.md", "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    monkeypatch.setattr(module.Residual, "solve", lambda self, w, s: module.Sum(*[module.Quantized.nearest(
        part, bits=2, group_size=64) for part in (matrix_of_16x96(), matrix_of_16x96())]))  # fmt: skip
    with pytest.raises(AssertionError):
        tests[0]()  # and its test turns red when the method is taken out


def matrix_of_16x96() -> torch.Tensor:
    return torch.randn(16, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("page", [*PAGES, "Makefile", ".ci/run", "pyproject.toml", "constraints.txt"])
def test_lines_are_not_too_long_to_read(page):
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        assert len(line) <= 125 or line.startswith("|"), f"{page} line {number}"


def test_constraints_pin_every_dependency_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {re.split("==", line)[0].lower().replace("_", "-"): line for line in lines}
    for requirement in wanted:
        name = re.split(r"[<>=\[;]", requirement)[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
