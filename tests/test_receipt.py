"""Receipts: read back equal, checked against the files, and never a traceback."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.errors import OutputError, UserError
from pennyweight.receipt import (
    BudgetLine,
    Certificate,
    Data,
    Estimate,
    Figure,
    FileLine,
    FloorLine,
    Machine,
    Receipt,
    Request,
    Run,
    Source,
    StageLine,
    versions,
)  # fmt: skip


def receipt(*files: FileLine, seconds: float = 1.5, spent: int = 67_257_504, upper_holds: bool = True) -> Receipt:
    return Receipt(
        model=Source(name="toy", sha256="ab" * 32, kind="causal-lm", params=134_515_008, bf16_bytes=269_030_016),
        data=Data(name="wiki", sha256="cd" * 32, calibration_tokens=16384, heldout_tokens=16384, window=512),
        recipe_sha256="ef" * 32,
        request=Request(budgets=("25%",), floor="perplexity<=1.10x"),
        seeds={"calibration": 0},
        versions=versions(),
        figures=(
            Figure(name="perplexity", unit="", before=Estimate(value=25.4), after=Estimate(value=27.0, low=26, high=28),
                   ratio=Estimate(value=1.063, low=1.05, high=1.08, n=32), predicted=27.5),
        ),
        budgets=(BudgetLine(asked="25%", resource="bytes", allowed=67_257_504, spent=spent),),
        floor=FloorLine(asked="perplexity<=1.10x", holds=upper_holds, value=1.063, upper=1.078, limit=1.1,
                        p_value=0.001, n=32, detectable=0.02),
        certificate=Certificate(solver="HiGHS", status="optimal", objective=0.06, bound=0.06, gap=0.0, binds=("bytes",),
                                relaxing={"bytes": 0.002}, choices=2520),
        files=files,
        notes=("two plans tie",),
        run=Run.now(Machine.here(threads=2), [StageLine(name="solve", seconds=seconds, peak_bytes=10**9)]),
    )  # fmt: skip


def test_a_receipt_is_written_and_read_back_equal(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    line = FileLine.of(tmp_path / "model.safetensors")
    assert line.bytes == 7
    written = receipt(line)
    written.write(tmp_path)
    assert Receipt.read(tmp_path) == written
    assert Receipt.read(tmp_path / "receipt.json") == written
    found = json.loads((tmp_path / "receipt.json").read_text())
    assert found["pennyweight"] == 1
    assert found["budgets"][0]["allowed"] == 67_257_504
    assert isinstance(found["budgets"][0]["spent"], int)
    assert written.figure("perplexity").predicted == 27.5
    assert written.figure("accuracy") is None
    assert str(written.figures[0].ratio) == "1.063 [1.05, 1.08]"
    assert written.run.machine.threads == 2
    assert written.versions["pennyweight"]


def test_one_byte_over_or_a_failed_floor_is_a_failure():
    assert receipt().holds
    assert not receipt(spent=67_257_505).holds
    assert not receipt(upper_holds=False).holds


def test_the_evidence_ignores_times_and_nothing_else():
    assert receipt(seconds=1).evidence_sha256 == receipt(seconds=2).evidence_sha256
    assert receipt().evidence_sha256 != receipt(spent=1).evidence_sha256
    assert receipt().evidence_sha256 != receipt().model_copy(update={"seeds": {"calibration": 1}}).evidence_sha256


def test_files_that_changed_are_named(tmp_path):
    lines = []
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 9)
        lines.append(FileLine.of(tmp_path / name))
    held = receipt(*lines, FileLine(name="../a", bytes=9, sha256=lines[0].sha256))
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"x" * 9)
    (tmp_path / "c").write_bytes(b"c")
    assert held.differences(tmp_path) == [
        "a: missing",
        "b: other content than the receipt's (SHA-256 differs)",
        "c: 1 bytes where the receipt says 9",
        "../a: missing",
    ]


def test_infinite_and_undefined_figures_survive():
    shown = receipt().model_copy(
        update={"figures": (Figure(name="p", unit="", before=None, after=Estimate(value=math.inf, low=math.nan)),)}
    )
    back = Receipt.parse(shown.text()).figures[0].after
    assert back.value == math.inf
    assert math.isnan(back.low)


def test_what_is_no_receipt_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"receipt.json: cannot be read \(No such file"):
        Receipt.read(tmp_path)
    (tmp_path / "receipt.json").write_text('{"pennyweight": 2}')
    with pytest.raises(UserError, match=r"receipt.json: not a receipt of format 1 \(pennyweight: Input should be 1"):
        Receipt.read(tmp_path)
    (tmp_path / "receipt.json").write_text(receipt().text()[:-30])
    with pytest.raises(UserError, match=r"not a receipt of format 1 .*EOF"):
        Receipt.read(tmp_path)
    with pytest.raises(UserError, match=r"surprise: Extra inputs are not permitted"):
        Receipt.parse(receipt().text().replace('"notes"', '"surprise": 1, "notes"'))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file stands where a directory is needed"):
        receipt().write(tmp_path / "file")


GOOD = json.loads(receipt().text())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(deeper for key, value in inner for deeper in places(value, (*path, key)))]


@given(st.data())
def test_any_text_or_changed_receipt_is_read_or_refused_in_one_line(data):
    tree = json.loads(json.dumps(GOOD))
    path = data.draw(st.sampled_from(places(GOOD)[1:]))
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(VALUES)
    text = data.draw(
        st.just(json.dumps(tree))
        | st.just(json.dumps(tree, ensure_ascii=False)[: data.draw(st.integers(0, 3000))])
        | st.text()
        | st.binary()
        | st.just("[" * 100_000)
    )
    text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    try:
        found = Receipt.parse(text)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert Receipt.parse(found.text()).text() == found.text()
        assert len(found.evidence_sha256) == 64
    assert message.splitlines() in ([], [message])
