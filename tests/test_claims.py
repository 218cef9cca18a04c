"""Rows and claims: the registry, the runner, the page, and that a claim turns red when its method is taken out."""

import json
from types import SimpleNamespace

import pytest
import torch

from pennyweight import rows
from pennyweight.claims import Outcome, claim, claims, earlier, page, run, sources
from pennyweight.claims import claim as declare
from pennyweight.claims import runner as runner_module
from pennyweight.claims.quantize import r226_taxonomy
from pennyweight.cli import main
from pennyweight.errors import DataError, OptionError
from pennyweight.levers.quantize.scheme import Scheme

REGISTRY = __import__("pennyweight.claims.claim", fromlist=["_REGISTRY"])._REGISTRY


@pytest.fixture
def three(monkeypatch):
    """Three claims instead of those of the package: one holds, one does not, one breaks."""
    claims()
    kept = dict(REGISTRY)
    REGISTRY.clear()

    @declare(row=196, pace="quick", headline="10x fewer weights")
    def sparse_beats_small(assets):
        return Outcome(method=1.0, baseline=2.0, unit="nats", holds=True, control=("a | b", 1.5), interval=(0.9, 1.1))

    @declare(row=118, pace="quick", headline="none")
    def rounding_is_free(assets):
        return Outcome(method=3.0, baseline=2.0, unit="error", holds=False, notes="as expected")

    @declare(row=5, pace="slow", headline="none")
    def something_breaks(assets):
        raise ValueError("two\nlines")

    yield
    REGISTRY.clear()
    REGISTRY.update(kept)


def test_claims_run_one_record_each_in_order_of_rows(three):
    records = list(run(slow=True))
    assert [(r.row, r.name, r.holds) for r in records] == [
        (5, "something_breaks", False), (118, "rounding_is_free", False), (196, "sparse_beats_small", True),
    ]  # fmt: skip
    assert records[0].error.startswith("ValueError: two lines (something_breaks, line ")
    assert "BROKEN" in records[0].line
    assert "DOES NOT HOLD: 3 against 2 (error)" in records[1].line
    assert "holds: 1 [0.9, 1.1] against 2 (nats); a | b: 1.5" in records[2].line
    assert {"row", "name", "holds", "method", "baseline", "control", "unit", "seconds"} <= set(records[2].plain())
    assert json.loads(json.dumps(records[2].plain()))["control"] == ["a | b", 1.5]
    assert [r.row for r in run()] == [118, 196]  # quick ones
    assert [r.row for r in run([5])] == [5]  # asked for by row: slow ones, too
    with pytest.raises(OptionError, match=r"no claim is about row 6; rows with claims: 5, 118, 196"):
        run([5, 6])


def test_what_was_finished_is_not_run_again(three, tmp_path, monkeypatch):
    keep = tmp_path / "new" / "kept.jsonl"
    list(run([118], keep=keep))
    first = list(run([196], keep=keep))
    assert main(["claims", "run", "--rows", "196", "--keep", str(keep), "--all"]) == 0
    assert len(keep.read_text().splitlines()) == 2  # nothing was added
    ran = []
    monkeypatch.setattr(runner_module, "run_one", lambda one, assets: ran.append(one.row) or first[0])
    assert list(run([196], keep=keep)) == first  # control and interval too
    assert ran == []
    list(run(slow=True, keep=keep))
    assert ran == [5]
    monkeypatch.setattr(runner_module, "digest", lambda one: "of other code")
    list(run([118, 196], keep=keep))
    assert ran == [5, 118, 196]
    monkeypatch.setattr(runner_module, "digest", lambda one: "of still other code")
    before = earlier(keep)
    assert {record.row for record in before.values()} == {118, 196}  # not 5, which broke
    text = page(first, machine="here", waiting=["dense_beats_sparse", "some_claim", first[0].name], before=before)
    assert text.count(" † | ") == 2
    assert "Not run when this was written: dense beats sparse, some claim." in text
    keep.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is no record"):
        list(run([196], keep=keep))
    text = page(first, machine="here", waiting=["some_claim"])
    assert "Not run when this was written: some claim." in text


def test_the_page_is_written_of_records_without_a_run(three, tmp_path, monkeypatch, capsys):
    keep, out = tmp_path / "kept.jsonl", tmp_path / "claims.md"
    list(run([118], keep=keep))
    monkeypatch.setattr(runner_module, "digest", lambda one: "of other code")
    list(run([196], keep=keep))
    monkeypatch.setattr(runner_module, "run_one", None)
    assert main(["claims", "page", str(out), "--keep", str(keep)]) == 0
    assert "1 claims as they are" in capsys.readouterr().out
    text = out.read_text()
    assert "1 of 2 claims hold" in text
    assert "rounding is free †" in text
    assert "sparse beats small |" in text
    assert "Not run when this was written: something breaks." in text
    assert main(["claims", "page", str(out), "--keep", str(tmp_path / "none")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_record_is_out_of_date_when_code_that_its_claim_reaches_has_changed(tmp_path):
    lorc, qmoe = (next(one for one in claims() if one.row == row) for row in (118, 36))
    reached = {file.name for file in sources._reached(sources._HOME / "claims/quantize/r118_lorc.py")}
    assert reached >= {"r118_lorc.py", "lorc.py", "low_rank.py", "assets.py", "claim.py", "loading.py"}
    # what packages hand on and the claim takes no part of, those that run it, and the words of rows
    assert not reached & {"qmoe.py", "structured.py", "runner.py", "rows.py", "test_claims.py"}
    assert "qmoe.py" in {file.name for file in sources._reached(sources._HOME / "claims/quantize/r036_qmoe.py")}
    assert sources.digest(lorc) != sources.digest(qmoe)
    file = tmp_path / "new.py"
    digests = []
    for text in ('"""Words."""\nx = 1\n', '"""Other words."""\nx = 1  # said\n', '"""Words."""\nx = 2\n'):
        file.write_text(text)
        digests.append(sources._read.__wrapped__(file).digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_command_line_says_so_when_a_claim_does_not_hold(three, capsys, tmp_path):
    assert main(["claims", "run", "--rows", "196"]) == 0
    assert main(["claims", "run", "--rows", "196,118", "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [json.loads(line)["row"] for line in lines] == [118, 196]
    assert main(["claims", "run", "--all", "--page", str(tmp_path / "claims.md")]) == 1
    text = (tmp_path / "claims.md").read_text()
    assert "1 of 3 claims hold" in text
    assert "| 196 To prune or not | sparse beats small | yes | 1 [0.9, 1.1] | 2 | 1.5 (a \\| b) | nats |" in text
    assert "| **no** |" in text
    assert "broken: ValueError: two lines" in text
    assert "* Row 118: as expected" in text
    capsys.readouterr()
    assert main(["claims", "list", "--json"]) == 0
    assert [one["room"] for one in json.loads(capsys.readouterr().out)] == ["quantize", "quantize", "prune"]


def test_a_claim_that_takes_too_long_is_marked_on_the_page(three, monkeypatch):
    now = iter([0.0, 21.0])
    monkeypatch.setattr(runner_module.time, "perf_counter", lambda: next(now))
    assert "| 21.0 (over 20) |" in page(run([196]), machine="here")


def test_a_figure_that_is_not_a_number_breaks_the_claim():
    with pytest.raises(AssertionError, match="not finite"):
        Outcome(method=float("nan"), baseline=1.0, unit="", holds=True)


def test_every_claim_of_the_package_is_in_the_file_of_its_row():
    for one in claims():
        *_, room, file = one.check.__module__.split(".")
        assert file.startswith(f"r{one.row:03}_")
        assert room == one.room == rows.row(one.row).room
        assert one.headline
        assert one.text.startswith(f"Row {one.row}")


def test_there_are_255_rows_in_16_rooms_and_what_is_here_is_computed():
    assert [row.number for row in rows.rows()] == list(range(1, 256))
    assert len(rows.rooms()) == 16
    assert all(row.name and row.paper for row in rows.rows())
    assert {row.room for row in rows.rows("merge")} == {"merge"}
    assert rows.row(226).paper == "A Survey of Quantization Methods for Efficient Neural Network Inference"
    with pytest.raises(OptionError, match="there is no row 256; rows go from 1 to 255"):
        rows.row(256)
    here = rows.coverage()
    assert "quantize.scheme" in here[226].levers
    assert "codebooks_beat_uniform_values_at_equal_bits" in here[226].claims
    assert here[226].words.startswith("lever quantize.scheme; claim ")
    assert "dcpt" in here[85].laws
    assert rows.Coverage().words == ""


class Miniature:
    """Stands in for the models: its own matrices, and inputs with outliers, one-sided as behind a GELU."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(226)
        self.model = SimpleNamespace(module=torch.nn.Sequential(*(torch.nn.Linear(48, 24) for _ in range(3))))

    def minilm(self):
        return self

    def maps(self, part):
        return [SimpleNamespace(path=str(n), shape=(24, 48)) for n in range(3)]

    def matrices(self, part):
        return [layer.weight.detach() for layer in self.model.module]

    def windows(self, text, *, part, length, count):
        return part

    def inputs(self, one, windows):
        x = torch.nn.functional.gelu(2 * torch.randn(256, 48, generator=self.generator))
        x[::100, 7] = 30.0  # a few outliers, always in the same channel
        return x


CLAIMS = [
    r226_taxonomy.codebooks_beat_uniform_values_at_equal_bits,
    r226_taxonomy.clipped_ranges_beat_min_max_on_activations,
    r226_taxonomy.integers_alone_give_what_simulated_quantization_gives,
]


@pytest.mark.parametrize("check", CLAIMS, ids=lambda check: check.__name__)
def test_the_claims_of_row_226_hold_in_miniature(check):
    with torch.no_grad():
        assert check(Miniature()).holds


def test_the_claims_of_row_226_turn_red_without_their_method(monkeypatch):
    uniform = Scheme.weight

    def no_codebook(self, matrix):
        return uniform(Scheme(bits=3, range="mse", granularity="channel") if self.values == "k-means" else self, matrix)

    with torch.no_grad():
        monkeypatch.setattr(Scheme, "weight", no_codebook)
        assert not CLAIMS[0](Miniature()).holds
        monkeypatch.undo()
        found = r226_taxonomy.find_range
        monkeypatch.setattr(r226_taxonomy, "find_range", lambda x, method, **o: found(x, "min-max", **o))
        assert not CLAIMS[1](Miniature()).holds
        monkeypatch.undo()
        exact = r226_taxonomy.IntegerLinear.integers
        monkeypatch.setattr(r226_taxonomy.IntegerLinear, "integers", lambda self, codes: exact(self, codes) + 2)
        assert not CLAIMS[2](Miniature()).holds


def test_the_decorator_leaves_the_function_as_it_is():
    kept = dict(REGISTRY)

    @claim(row=1, pace="quick", headline="none")
    def plain(assets):
        return Outcome(method=1, baseline=1, unit="", holds=True)

    assert plain(None).holds
    REGISTRY.clear()
    REGISTRY.update(kept)
