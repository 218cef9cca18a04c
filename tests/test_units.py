"""Quantities, budgets and floors: what people write is read exactly, and what makes no sense is refused in words."""

import doctest
import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight import units
from pennyweight.errors import UnitError
from pennyweight.units import Budget, Floor, Quantity, parse_seconds, show_bytes, show_count, show_seconds


def test_the_examples_in_the_module_run():
    assert doctest.testmod(units).attempted > 8
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("35MB", 35_000_000, "bytes"),
        ("67.3 MB", 67_300_000, "bytes"),
        ("35mb", 35_000_000, "bytes"),
        ("0.5GiB", 2**29, "bytes"),
        ("1 KiB", 1024, "bytes"),
        ("7 bytes", 7, "bytes"),
        ("1e9 params", 10**9, "params"),
        ("1.5B params", 1_500_000_000, "params"),
        ("2GFLOPs", 2 * 10**9, "flops"),
        ("20ms", Decimal("0.02"), "seconds"),
        ("10min", 600, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("3 mJ", Decimal("0.003"), "joules"),
        ("25%", Decimal("0.25"), "share"),
        ("1.10x", Decimal("1.1"), "ratio"),
        ("12M", 12_000_000, "count"),
        ("1_000_000 B", 1_000_000, "bytes"),
    ],
)
def test_a_quantity_is_read_exactly(text, value, kind):
    assert Quantity.parse(text) == Quantity(Decimal(value), kind)


@given(
    number=st.decimals(min_value="0.000001", max_value="1e12", allow_nan=False, places=6),
    unit=st.sampled_from(
        ["B", "kB", "MB", "MiB", "GB", "ms", "s", "min", "h", "%", "x", " params", "M params", "J", "kWh"]
    ),
)
def test_what_is_written_is_read_back_unchanged(number, unit):
    quantity = Quantity.parse(f"{number}{unit}")
    assert Quantity.parse(str(quantity)) == quantity


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_unit_error_in_one_line(text):
    for read in (Quantity.parse, Budget.parse, Floor.parse):
        try:
            read(text)
        except UnitError as error:
            message = str(error)
        else:
            message = ""
        assert message.splitlines() in ([], [message])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("25 %%", r"no unit is called '%%'; write 35MB or 0.5GiB or 25%"),
        ("0MB", r"'0MB' is not above zero"),
        ("0%", r"not above zero"),
        ("-3MB", r"'-3MB' is not above zero"),
        ("1e999MB", r"beyond anything"),
        ("nanMB", r"not a quantity"),
        ("lots", r"'lots' is not a quantity"),
        ("", r"not a quantity"),
        ("35M", r"'35M' has no unit"),
        ("35", r"'35' has no unit"),
        ("35ms", r"quantity of seconds, which makes no sense here"),
        ("latency=3MB", r"budget 'latency=3MB': .*quantity of bytes.*write 20ms"),
        ("water=3MB", r"no resource is called 'water'; there are bytes, params"),
        ("kv>=3GB", r"a budget is an upper limit; write kv=3GB"),
        ("perplexity<=1.1x", r"perplexity is a quality; give it as --floor"),
        ("kv=", r"budget 'kv=': '' is not a quantity"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_in_words(text, words):
    with pytest.raises(UnitError, match=words) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("25%", "25%"),
        ("<=35MB", "35MB"),
        ("bytes=35000001B", "35000001B"),
        ("size=35MB", "35MB"),
        ("kv=50MB", "kv=50MB"),
        ("kv<=2GB", "kv=2GB"),
        ("params=0.09B", "params=90M params"),
        ("flops=200M", "flops=200MFLOPs"),
        ("latency = 20 ms", "latency=20ms"),
        ("memory=1GiB", "memory=1073741824B"),
        ("energy=2J", "energy=2J"),
        ("latency=80%", "latency=80%"),
    ],
)
def test_a_budget_names_its_resource_and_round_trips(text, written):
    budget = Budget.parse(text)
    assert str(budget) == written
    assert Budget.parse(written) == budget


@given(reference=st.integers(1, 10**13), basis_points=st.integers(1, 10_000))
def test_a_share_of_bytes_is_rounded_down_exactly(reference, basis_points):
    budget = Budget.parse(f"{Decimal(basis_points) / 100}%")
    assert budget.limit_for(reference) == reference * basis_points // 10_000  # integers: one byte over is a failure


def test_an_absolute_budget_ignores_the_reference_and_a_share_does_not():
    assert Budget.parse("35MB").limit_for(1) == 35_000_000
    assert Budget.parse("latency=50%").limit_for(0.5) == 0.25
    assert Budget.parse("latency=50%").relative
    assert not Budget.parse("35MB").relative


@pytest.mark.parametrize(
    ("text", "written", "reference", "good", "bad"),
    [
        ("perplexity<=1.10x", "perplexity<=1.1x", 20.0, 21.9, 22.1),
        ("ppl <= 25", "perplexity<=25", None, 25.0, 25.1),
        ("accuracy>=0.99x", "accuracy>=0.99x", 0.5, 0.495, 0.494),
        ("accuracy>=99%", "accuracy>=0.99", None, 0.99, 0.98),
        ("agreement>=0.9", "agreement>=0.9", None, 0.9, 0.89),
        ("cosine ≥ 0.99", "cosine>=0.99", None, 0.995, 0.98),
        ("kl<=0.05", "kl<=0.05", None, 0.04, 0.06),
    ],
)
def test_a_floor_holds_on_the_right_side(text, written, reference, good, bad):
    floor = Floor.parse(text)
    assert str(floor) == written
    assert Floor.parse(written) == floor
    assert floor.holds(good, reference)
    assert not floor.holds(bad, reference)
    assert not floor.holds(math.nan, reference)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beauty>=1", r"no metric is called 'beauty'; write \"perplexity<=1.10x\""),
        ("perplexity", r"perplexity is better lower; write perplexity<=\.\.\."),
        ("perplexity>=1.1x", r"better lower; write perplexity<=1.1x"),
        ("accuracy<=0.9", r"better higher; write accuracy>=0.9"),
        ("accuracy=0.9", r"better higher; write accuracy>=0.9"),
        ("cosine>=1.2", r"cosine is at most 1"),
        ("agreement>=0.9x", r"compares with the original already; write agreement>=0.9"),
        ("perplexity<=0.5", r"perplexity is at least 1"),
        ("perplexity<=3MB", r"quantity of bytes"),
        ("perplexity<=0x", r"not above zero"),
    ],
)
def test_a_floor_that_makes_no_sense_is_refused_in_words(text, words):
    with pytest.raises(UnitError, match=words):
        Floor.parse(text)


def test_a_duration_needs_its_unit():
    assert parse_seconds("10min") == 600
    with pytest.raises(UnitError, match="'10' has no unit; write 20ms or 10min"):
        parse_seconds("10")


def test_figures_are_shown_with_three_digits():
    assert [show_bytes(n) for n in (0, 999, 1000, 999_499, 999_500, 67_286_016)] == [
        "0 B", "999 B", "1.00 kB", "999 kB", "1.00 MB", "67.3 MB",
    ]  # fmt: skip
    assert show_count(106_168_320) == "106 M"
    assert [show_seconds(s) for s in (2e-5, 0.0205, 4.561, 125, 7320)] == [
        "20 us", "20.5 ms", "4.56 s", "2 min 05 s", "2 h 02 min",
    ]  # fmt: skip
    assert [Quantity.parse(t).show() for t in ("1MiB", "25%", "1.10x", "90M params", "20ms")] == [
        "1.05 MB", "25 %", "1.1x", "90.0 M params", "20 ms",
    ]  # fmt: skip
