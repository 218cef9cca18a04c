"""The journal: a unit is there whole or not at all, and a run killed anywhere ends as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.errors import OutputError
from pennyweight.journal import Journal

# One process imports torch and forks runs of 12 units, each of which depends on the one before. The first run is left
# alone; the next ones are killed after a random while; the last one may finish. It prints what each left.
RUNS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from pennyweight.journal import Journal

def run(directory):
    journal = Journal(directory)
    state = torch.zeros(40_000, dtype=torch.float64)
    for step in range(12):
        key = journal.key("step", step=step, state=state)
        if journal.done(key):
            unit = journal.load(key)
        else:
            noise = torch.randn(40_000, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            unit = journal.store(key, {"state": (state + noise).cos()}, {"step": step})
        state = unit.tensors["state"]
    return state.sum().item().hex()

def fork(directory, until):
    child = os.fork()
    if child == 0:
        Path(str(directory) + ".result").write_text(run(directory))
        os._exit(0)
    while not until():
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ended"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"

torch.set_num_threads(1)  # nothing that a fork would lose
whole, killed = Path(sys.argv[1]), Path(sys.argv[2])
begun = time.perf_counter()
assert fork(whole, lambda: False) == "ended"
unit, rng, left = (time.perf_counter() - begun) / 12, random.Random(226), []
for target in (0, 0, 1, 3, 3, 6, 9, 10):  # a random while after so many units are there
    pause = rng.uniform(0, 2 * unit)
    def due():
        if len(Journal(killed)) < target:
            return False
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            pass
        return True
    how = fork(killed, due)
    journal = Journal(killed)
    left.append([how, *(list(journal.load(key).tensors["state"].shape) == [40_000] for key in journal.keys())])
assert fork(killed, lambda: False) == "ended"
print(json.dumps(left))
"""


def test_a_run_killed_at_random_moments_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", RUNS, whole, killed], stdout=subprocess.PIPE, timeout=120, check=True)
    left = json.loads(done.stdout)
    assert "killed" in [how for how, *_ in left]
    counts = [len(units) for _, *units in left]
    assert counts == sorted(counts)  # nothing that was finished is lost
    assert set(counts) - {0, 12}  # and some kill fell into the middle of it
    assert all(all(units) for _, *units in left)  # and nothing half-written is seen
    assert (tmp_path / "killed.result").read_text() == (tmp_path / "whole.result").read_text()
    units = [{path.name: path.read_bytes() for path in place.glob("[!.]*")} for place in (whole, killed)]
    assert units[0] == units[1]
    assert len(units[0]) == 12


def test_what_store_hands_back_is_what_load_finds(tmp_path):
    journal = Journal(tmp_path / "j")
    base = torch.arange(12.0).reshape(3, 4)
    stored = journal.store("a", {"view": base.T, "same": base, "half": base.bfloat16()}, {"n": (1, 2), "text": "µ"})
    loaded = journal.load("a")
    assert stored.meta == loaded.meta == {"n": [1, 2], "text": "µ"}
    assert stored.tensors.keys() == loaded.tensors.keys()
    for name, tensor in stored.tensors.items():
        assert torch.equal(tensor, loaded.tensors[name])
        assert tensor.dtype == loaded.tensors[name].dtype
    assert torch.equal(loaded.tensors["view"], base.T)
    stored.tensors["same"].zero_()
    assert base.sum() == 66  # what was stored is a copy


def test_a_unit_without_tensors_and_an_empty_journal(tmp_path):
    journal = Journal(tmp_path / "j")
    assert list(journal.keys()) == []
    assert not journal.done("a")
    journal.store("a", None, {"done": True})
    assert journal.done("a")
    assert journal.load("a").meta == {"done": True}
    assert len(Journal(tmp_path / "j", resume=True)) == 1
    assert len(Journal(tmp_path / "j", resume=False)) == 0
    assert not (tmp_path / "j").exists()


def test_clear_takes_what_a_killed_run_left_half_written(tmp_path):
    journal = Journal.beside(tmp_path / "out")
    assert journal.directory == tmp_path / ".out.journal"
    journal.store("a")
    (journal.directory / ".b.safetensors.x7").write_bytes(b"half")
    assert list(journal.keys()) == ["a"]
    assert not journal.done("b")
    journal.clear()
    journal.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_key_changes_with_anything_it_depends_on():
    tensor = torch.arange(6.0)
    base = {"layer": "a", "where": Path("x"), "deep": {"t": [tensor]}}
    same = {"deep": {"t": [tensor.clone()]}, "where": Path("x"), "layer": "a"}
    keys = [
        Journal.key("solve", **base),
        Journal.key("walk", **base),
        Journal.key("solve", **base, more=1),
        Journal.key("solve", **(base | {"layer": "b"})),
        Journal.key("solve", **(base | {"deep": {"t": [tensor + 1e-6]}})),
        Journal.key("solve", **(base | {"deep": {"t": [tensor.reshape(2, 3)]}})),
        Journal.key("solve", **(base | {"deep": {"t": [tensor.double()]}})),
        Journal.key("solve", **(base | {"deep": {"t": [torch.zeros(6)]}})),
    ]
    assert len(set(keys)) == len(keys)
    assert Journal.key("solve", **same) == keys[0]
    assert keys[0].startswith("solve-")
    with pytest.raises(TypeError, match="cannot hold a set"):
        Journal.key("solve", names={"a", "b"})  # a set has no order


@given(cut=st.integers(0, 400), flip=st.none() | st.integers(0, 200))
def test_a_damaged_unit_is_loaded_or_named_in_one_line(tmp_path_factory, cut, flip):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.store("a", {"t": torch.ones(8)}, {"x": 1})
    path = journal.directory / "a.safetensors"
    size = path.stat().st_size
    data = bytearray(path.read_bytes()[:cut])
    if flip is not None and flip < len(data):
        data[flip] ^= 0xFF
    path.write_bytes(bytes(data))
    try:
        journal.load("a")
    except OutputError as error:
        message = str(error)
    else:
        message = "delete the file and resume"
        assert cut >= size  # a byte may change unseen, but none may be missing
    assert "delete the file and resume" in message
    assert len(message.splitlines()) == 1


def test_a_missing_unit_and_a_place_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(OutputError, match=r"a\.safetensors: this unit of the journal cannot be read"):
        Journal(tmp_path).load("a")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file stands where a directory is needed"):
        Journal(tmp_path / "file").store("a")
