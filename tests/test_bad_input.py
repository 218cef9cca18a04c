"""What a user can get wrong ends in one line with the remedy and exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from pennyweight.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.text_file(tmp_path_factory.mktemp("text"))


def broken(model: Path, to: Path, change: Callable[[Path], None]) -> Path:
    """A copy of ``model`` with something wrong in it."""
    shutil.copytree(model, to)
    change(to)
    return to


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def scramble(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"?" * 32
    path.write_bytes(data)


def edit(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def poison(directory: Path) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    edit(directory, "model.layers.0.mlp.up_proj.weight", change)


def narrow(directory: Path) -> None:
    edit(directory, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[:-1])


def silence(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def misconfigure(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``arguments`` end in."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("pennyweight: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "model.safetensors"),
        (scramble, "model.safetensors"),
        (poison, "up_proj.weight: 1 of"),
        (narrow, "up_proj.weight"),
        (silence, "tokenizer"),
        (pickle, "safetensors"),
        (misconfigure, "config.json"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_damaged_model(
    change: Callable[[Path], None], words: str, model: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = broken(model, tmp_path / "bad", change)
    out = tmp_path / "out"
    line = refused(["fit", str(bad), "--budget", "50%", "--data", str(text), "--out", str(out)], capsys)
    assert words in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("contents", "words"), [("", "holds no text"), ("too short " * 20, "give at least 3 documents")]
)
def test_text_that_does_not_suffice(
    contents: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(contents)
    line = refused(["fit", str(model), "--budget", "50%", "--data", str(text), "--out", str(tmp_path / "out")], capsys)
    assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "25 %%"], "25 %%"),
        (["--budget=-5MB"], "-5MB"),
        (["--budget", "0MB"], "0MB"),
        (["--budget", "25%", "--levers", "quantize.gptqq"], "did you mean quantize.gptq"),
        (["--budget", "25%", "--floor", "perplexity>=1.1x"], "perplexity<="),
        (["--budget", "25%", "--time", "soon"], "soon"),
        (["--budget", "25%", "--data", "/no/such/text"], "/no/such/text"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(["fit", str(model), "--out", str(tmp_path / "out"), *options], capsys)


def test_a_recipe_that_does_not_fit(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for body, words in (
        ("steps: 3", "not a recipe"),
        ("pennyweight: 1\nsteps:\n- quantize.rtn: {bits: 40}\n", "step 1, quantize.rtn"),
        ("pennyweight: 1\nsteps:\n- quantize.rtn: {bitz: 4}\n", "did you mean bits"),
        ("pennyweight: 1\nsteps:\n- quantize.rtn: {}\n  where: nowhere\n", "nowhere"),
    ):
        recipe.write_text(body)
        asked = ["apply", str(model), str(recipe), "--data", str(text), "--out", str(tmp_path / "out")]
        assert words in refused(asked, capsys)


def test_results_that_are_there_already_stay(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "receipt.json").write_text("mine")
    line = refused(["fit", str(model), "--budget", "50%", "--data", str(text), "--out", str(tmp_path)], capsys)
    assert "already holds" in line
    assert (tmp_path / "receipt.json").read_text() == "mine"


def test_a_place_that_cannot_be_written(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["fit", str(model), "--budget", "50%", "--data", str(text), "--out", "/proc/fitted"], capsys)
    assert "/proc/fitted" in line
    assert "cannot be written" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(model: Path, text: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    out = small_disk / "out"
    line = refused(["fit", str(model), "--budget", "50%", "--data", str(text), "--out", str(out)], capsys)
    assert "the disk is full" in line
    assert not out.exists()


def test_a_receipt_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "receipt.json" in refused(["verify", str(tmp_path)], capsys)
    (tmp_path / "receipt.json").write_text(json.dumps({"pennyweight": 1}))
    assert "not a receipt" in refused(["verify", str(tmp_path)], capsys)


def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such-model" in refused(["measure", "no/such-model"], capsys)
