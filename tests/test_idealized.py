"""Idealized runtimes (row 202): the published table's figures, exact recovery, and what a query costs."""

import csv
from importlib.resources import files

import pytest
from families import build

from pennyweight.errors import DataError, OptionError
from pennyweight.measure.idealized import Idealized, Run, fit, time_queries


@pytest.fixture(scope="module")
def table():
    text = (files("pennyweight.claims.tables") / "helm_a100_runtimes.csv").read_text("utf-8")
    found = {}
    for row in csv.DictReader(text.splitlines()):
        run = Run(int(row["prompt_tokens"]), int(row["output_tokens"]), float(row["seconds_mean"]))
        found.setdefault(row["model"], []).append(run)
    return found


@pytest.mark.parametrize(
    ("model", "token", "first"),
    [
        ("gptj_6b", 0.0210, {512: 0.042, 1024: 0.077}),
        ("openai_davinci", 0.0814, {512: 0.179, 1920: 0.582}),
        ("bloom", 0.0612, {}),
    ],
)
def test_the_published_runtimes_give_the_published_terms(table, model, token, first):
    found = fit(table[model])
    assert found.token_seconds == pytest.approx(token, abs=5e-5)
    assert {prompt: found.runtime(prompt, 1) for prompt in first} == pytest.approx(first)
    assert found.r_squared >= 0.9997
    assert max(abs(found.runtime(run.prompt, run.output) / run.seconds - 1) for run in table[model]) <= 0.05


def test_a_published_query(table):
    found = fit(table["gptj_6b"])
    # the notebook rounds the slope to milliseconds; unrounded it comes to 1.366
    assert found.runtime(512, 1) + 63 * round(found.token_seconds, 3) == pytest.approx(1.365)
    assert found.runtime(512, 64) == pytest.approx(found.runtime(512, 1) + 63 * found.token_seconds)


def exact(prompt, output):
    return 0.5 + 0.01 * prompt + 0.2 * (output - 1)


@pytest.mark.parametrize("opaque", [False, True])
def test_runs_that_follow_the_model_are_recovered(opaque):
    outputs = (2, 9) if opaque else (1, 9)
    found = fit([Run(p, o, exact(p, o)) for p in (10, 50, 200) for o in outputs], opaque=opaque)
    for prompt, output in ((10, 1), (30, 7), (125, 100), (1000, 3)):  # between, and beyond
        assert found.runtime(prompt, output) == pytest.approx(exact(prompt, output))
    assert found.r_squared == pytest.approx(1)


def test_short_prompts_take_what_the_shortest_takes():
    found = fit([Run(10, 1, 0.5), Run(10, 5, 0.9)])
    assert found.runtime(1, 1) == 0.5


def test_an_opaque_first_token_is_never_under_that_of_the_shortest_prompt():
    runs = [Run(1, 1, 1.0), Run(1, 3, 1.2), Run(9, 1, 0.4), Run(9, 3, 0.6)]
    assert fit(runs, opaque=True).first_seconds == pytest.approx((1.0, 1.0))


def test_of_equal_queries_the_shortest_run_counts():
    runs = [Run(p, o, exact(p, o)) for p in (10, 50) for o in (1, 9)]
    assert fit([*runs, *(Run(run.prompt, run.output, 2 * run.seconds) for run in runs)]) == fit(runs)


def test_price_and_energy_count_devices():
    found = Idealized((1,), (1.0,), 0.5, 1.0)
    assert found.price(1, 3, device_hour=36, devices=4) == pytest.approx(2 * 4 * 0.01)
    assert found.joules(1, 3, watts=100, devices=2) == pytest.approx(400)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([Run(4, 2, 1.0), Run(4, 3, 1.0)], "opaque=True"),
        ([Run(4, 1, 1.0), Run(5, 1, 1.0)], "as many tokens"),
        ([Run(4, 0, 1.0)], "is no run"),
        ([Run(4, 1, float("nan"))], "is no run"),
    ],
)
def test_too_few_runs_are_said(runs, said):
    with pytest.raises(DataError, match=said):
        fit(runs)


def test_queries_are_timed_and_sizes_checked():
    module = build("llama")
    runs = time_queries(module, prompts=(4, 8), outputs=(1, 3), repeats=2)
    assert [(run.prompt, run.output) for run in runs] == 2 * [(4, 1), (4, 3), (8, 1), (8, 3)]
    assert fit(runs).token_seconds > 0
    with pytest.raises(OptionError, match="at least 1"):
        time_queries(module, prompts=(0,))
    with pytest.raises(OptionError, match="at least 1"):
        fit(runs).runtime(0, 1)
