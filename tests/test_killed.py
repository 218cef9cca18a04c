"""A fit killed at any moment goes on where it was, and ends bit-identical."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toys

from pennyweight.receipt import Receipt

_CHILD = """
import sys, torch
from dataclasses import replace
sys.path.insert(0, sys.argv[4])
import toys
from pennyweight.fit import fit
torch.set_num_threads(1)  # the same sums in the same order, whatever else the machine does
def progress(stage, done, total):
    print(stage, done, total, flush=True)
fit(sys.argv[1], data=sys.argv[2], budgets=["40%"], out=sys.argv[3], resume=True, time=60.0,
    settings=replace(toys.QUICK, repair_steps=60), progress=progress)
"""


def run(model: Path, text: Path, out: Path, kill_after: int | None) -> int:
    """Progress lines of a child that fits; killed with signal 9 after ``kill_after`` of them. -1 when it was killed."""
    command = [sys.executable, "-c", _CHILD, str(model), str(text), str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = 0
        for _ in child.stdout:
            lines += 1
            if kill_after is not None and lines >= kill_after:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                return -1
        error = child.stderr.read() if child.stderr is not None else ""
    assert child.returncode == 0, error
    return lines


def hashes(directory: Path) -> dict[str, str]:
    """Files whose bytes must not depend on when they were made."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name not in ("receipt.json", "report.html")
    }


@pytest.mark.timeout(280)
def test_killed_five_times_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    model, text = toys.llama(tmp_path / "model"), toys.text_file(tmp_path)
    lines = run(model, text, tmp_path / "whole", None)
    g = random.Random(0)
    for share in (0.05, 0.2, 0.4, 0.6, 0.6):  # of the lines of a whole run; later runs have less left to do
        assert run(model, text, tmp_path / "killed", g.randint(1, int(share * lines))) == -1
        assert not (tmp_path / "killed").exists()
    run(model, text, tmp_path / "killed", None)
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "killed")
    one, other = (Receipt.read(tmp_path / name) for name in ("whole", "killed"))
    assert one.evidence_sha256 == other.evidence_sha256
    assert any("60 steps" in note for note in one.notes)
