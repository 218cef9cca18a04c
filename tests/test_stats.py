"""The statistics against closed forms, SciPy, brute force and simulation."""

import math
from itertools import chain, combinations, product

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.measure import stats
from pennyweight.measure.power import detectable, power, samples_needed


def windows(seed, n=32, loss=3.0, shift=0.05, spread=0.03, tokens=None):
    """Losses before and after: large shared spread over windows, small spread of the difference."""
    g = np.random.default_rng(seed)
    before = loss + 0.4 * g.standard_normal(n)
    after = before + shift + spread * g.standard_normal(n)
    if tokens is None:
        return before, after
    noise = g.standard_normal((n, tokens))
    noise -= noise.mean(1, keepdims=True)
    return before[:, None] + noise, after[:, None] + noise


# --- intervals


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda g: g.normal(0.1, 0.05, 32), 0.1),
        (lambda g: g.exponential(0.1, 32), 0.1),  # skewed: where BCa covers 92 %, the percentile interval 91 %
        (lambda g: 0.3 * g.standard_t(6, 12) + 0.1, 0.1),  # heavy tails, few windows
    ],
    ids=["normal", "skewed", "heavy"],
)
def test_interval_covers_the_true_mean_as_often_as_it_says(draw, mean):
    g = np.random.default_rng(7)
    inside = [mean in stats.bootstrap(draw(g), resamples=499, seed=int(g.integers(2**32))) for _ in range(2000)]
    assert 0.93 <= np.mean(inside) <= 0.97


def test_interval_agrees_with_student_where_student_is_exact():
    values = np.random.default_rng(0).standard_normal(200)
    found = stats.bootstrap(values)
    low, high = scipy.stats.t.interval(0.95, 199, values.mean(), scipy.stats.sem(values))
    assert found.standard_error == pytest.approx(scipy.stats.sem(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.method == "studentized bootstrap"


def test_interval_of_a_median_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(1.0, 101)
    found = stats.bootstrap(values, lambda sample: np.median(sample, axis=-1))
    other = scipy.stats.bootstrap(
        (values,), np.median, method="percentile", rng=np.random.default_rng(2), vectorized=True
    )
    assert found.value == np.median(values)
    assert (found.low, found.high) == pytest.approx(
        (other.confidence_interval.low, other.confidence_interval.high), abs=0.03
    )


def test_interval_of_columns_keeps_the_pairs_together():
    pairs = np.random.default_rng(3).exponential(1.0, (40, 1)) * np.array([[1.0, 2.0]])
    found = stats.bootstrap(pairs, lambda s: np.median(s[..., 1], axis=-1) / np.median(s[..., 0], axis=-1))
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)


def test_paired_ratio_is_the_ratio_of_perplexities_and_far_tighter_than_unpaired():
    before, after = windows(4, tokens=16)
    found = stats.paired_ratio(torch.from_numpy(before).float(), torch.from_numpy(after).float())
    assert found.value == pytest.approx(math.exp(after.mean()) / math.exp(before.mean()), rel=1e-6)
    difference = after.mean(1) - before.mean(1)
    assert found.standard_error == pytest.approx(found.value * scipy.stats.sem(difference), rel=1e-5)
    alone = stats.bootstrap(after)
    assert found.high - found.low < 0.2 * (math.exp(alone.high) - math.exp(alone.low)) / math.exp(before.mean())


def test_the_spread_over_tokens_is_not_taken_for_information():
    # the same 8 windows with each token repeated 100 times: not one bit more is known
    before, after = windows(5, n=8, tokens=4)
    once, often = (stats.paired_ratio(np.repeat(before, k, 1), np.repeat(after, k, 1)) for k in (1, 100))
    assert (once.low, once.high) == pytest.approx((often.low, often.high), rel=1e-9)


def test_identical_models_have_ratio_one_without_doubt():
    before, _ = windows(6, tokens=5)
    found = stats.paired_ratio(before, before)
    assert (found.low, found.value, found.high, found.standard_error) == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("values", [[0.1, 0.3], [0.0] * 30 + [0.1, 0.2], [0.1, 0.1, 0.3]])
def test_too_few_distinct_values_fall_to_student_and_say_so(values):
    found = stats.bootstrap(values)
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    assert found.method == "Student t"
    assert (found.low, found.high) == pytest.approx((np.mean(values) - reach, np.mean(values) + reach))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 40), scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
@settings(max_examples=50, deadline=None)
def test_interval_moves_with_shift_and_scale(seed, n, scale, shift):
    values = np.random.default_rng(seed).exponential(1.0, n)
    plain = stats.bootstrap(values, resamples=199)
    moved = stats.bootstrap(values * scale + shift, resamples=199)
    assert plain.low <= plain.value <= plain.high
    rounding = 1e-6 * scale + 1e-12 * abs(shift)
    assert moved.low == pytest.approx(plain.low * scale + shift, abs=rounding * 1e3, rel=1e-6)
    assert moved.high == pytest.approx(plain.high * scale + shift, abs=rounding * 1e3, rel=1e-6)


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter(monkeypatch):
    before, after = windows(8)
    whole = stats.paired_ratio(before, after, seed=1)
    assert stats.paired_ratio(before, after, seed=1) == whole
    assert stats.paired_ratio(before, after, seed=2) != whole
    monkeypatch.setattr(stats, "_CHUNK", 1000)
    assert stats.paired_ratio(before, after, seed=1) == whole


# --- non-inferiority and its power


def test_verdict_is_the_one_sided_t_test():
    before, after = windows(9, shift=0.05)
    found = stats.non_inferiority(before, after, 1.10)
    oracle = scipy.stats.ttest_1samp(after - before, math.log(1.10), alternative="less")
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-9)
    assert found.upper == pytest.approx(math.exp(oracle.confidence_interval(0.95).high), rel=1e-9)
    assert found.holds
    assert found.n == 32
    assert found.resampled_upper == pytest.approx(found.upper, rel=2e-3)
    assert found.resampling_agrees


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 64), ratio=st.floats(0.9, 1.3))
@settings(max_examples=60, deadline=None)
def test_verdict_holds_exactly_when_the_limit_is_under_the_margin(seed, n, ratio):
    before, after = windows(seed, n=n)
    found = stats.non_inferiority(before, after, ratio, resamples=99)
    assert found.holds == (found.upper < ratio) == (found.p_value < 0.05)
    assert (found.needed is None) == (found.estimate >= ratio)


def test_a_floor_that_is_just_missed_passes_five_times_in_a_hundred():
    passes = [stats.non_inferiority(*windows(s, shift=math.log(1.1)), 1.1, resamples=99).holds for s in range(2000)]
    assert np.mean(passes) == pytest.approx(0.05, abs=0.015)


def test_detectable_difference_is_detected_eight_times_in_ten():
    n, spread = 12, 0.03
    distance = detectable(spread / math.sqrt(n), n)
    passes = [
        stats.non_inferiority(*windows(s, n=n, shift=math.log(1.1) - distance, spread=spread), 1.1, resamples=99).holds
        for s in range(2000)
    ]
    assert np.mean(passes) == pytest.approx(0.8, abs=0.03)


def test_detectable_of_a_verdict_is_a_ratio():
    before, after = windows(10)
    found = stats.non_inferiority(before, after, 1.1)
    assert math.log(found.detectable) == pytest.approx(detectable(scipy.stats.sem(after - before), 32), rel=1e-9)


@pytest.mark.parametrize(("size", "n"), [(0.2, 156), (0.5, 27), (0.8, 12)])
def test_sample_sizes_are_those_of_the_tables(size, n):
    # one sample, one-sided 5 %, power 80 %: Cohen's small, medium and large effects (G*Power 3, pwr.t.test)
    assert samples_needed(size, 1.0) == n


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("distance", [0.1, 0.7, 2.0])
def test_power_is_the_integral_over_the_spread_that_is_seen(n, distance):
    # the mean is normal, the variance seen chi-squared: integrate one given the other
    critical, freedom = scipy.stats.t.ppf(0.95, n - 1), n - 1
    expected, _ = scipy.integrate.quad(
        lambda v: (
            scipy.stats.norm.sf(critical * math.sqrt(v / freedom) - distance * math.sqrt(n))
            * scipy.stats.chi2.pdf(v, freedom)
        ),
        0,
        np.inf,
    )
    assert power(distance, 1.0, n) == pytest.approx(expected, abs=1e-6)


@given(distance=st.floats(0.01, 5), spread=st.floats(0.1, 2), wanted=st.floats(0.5, 0.99))
@settings(max_examples=60, deadline=None)
def test_samples_needed_is_the_least_number_with_that_power(distance, spread, wanted):
    n = samples_needed(distance, spread, wanted=wanted)
    assert n >= 2
    assert power(distance, spread, n) >= wanted - (1e-4 if n > 10_000 else 1e-6)
    assert n == 2 or power(distance, spread, n - 1) < wanted + 1e-6


def test_power_is_continuous_where_the_normal_takes_over():
    for distance in (0.01, 0.02, 0.03):
        assert power(distance, 1.0, 10_000) == pytest.approx(power(distance, 1.0, 10_001), abs=2e-4)


def test_power_with_many_samples_is_the_closed_form():
    expected = scipy.stats.norm.sf(scipy.stats.norm.ppf(0.95) - 0.02 * math.sqrt(40_000))
    assert power(0.02, 1.0, 40_000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("ratio", "holds"), [(1.0, True), (1.01, True), (0.999, False)])
def test_a_lossless_change_holds_any_floor_from_one_on(ratio, holds):
    before, _ = windows(11)
    found = stats.non_inferiority(before, before, ratio)
    assert (found.holds, found.upper, found.detectable) == (holds, 1.0, 1.0)
    assert found.resampling_agrees


def test_a_drop_and_a_limit_are_the_same_test():
    g = np.random.default_rng(12)
    before = (g.random(400) < 0.9).astype(float)
    after = np.where(g.random(400) < 0.03, 0.0, before)
    found = stats.non_inferiority_drop(before, after, 0.05)
    oracle = scipy.stats.ttest_rel(before, after + 0.05, alternative="less")
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-9)
    assert stats.below(before - after, 0.05) == found
    assert found.unit == "difference"


def test_better_scores_count_as_better():
    g = np.random.default_rng(13)
    low, high = 0.5 + 0.01 * g.standard_normal(20), 0.9 + 0.01 * g.standard_normal(20)
    assert stats.non_inferiority_drop(low, high, 0.0).holds
    assert not stats.non_inferiority_drop(high, low, 0.3).holds
    assert stats.paired_difference(low, high).value == pytest.approx(0.4, abs=0.02)


# --- several candidates


def closure(p):
    """Holm by its definition: the closed test with Bonferroni, every subset that holds i rejected."""
    subsets = list(chain.from_iterable(combinations(range(len(p)), k) for k in range(1, len(p) + 1)))
    return [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(len(p))]


@given(p=st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.05, 1.0]), min_size=1, max_size=6))
@settings(deadline=None)
def test_holm_is_the_closed_bonferroni_test(p):
    np.testing.assert_allclose(stats.holm(p), closure(p), rtol=1e-12)


def test_holm_of_nothing_is_nothing():
    assert stats.holm([]).shape == (0,)


@pytest.mark.parametrize("p", [[-0.1], [1.1], [float("nan")], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(DataError, match="p-values"):
        stats.holm(p)


def test_several_candidates_are_corrected_together():
    # all sit at the margin: alone one of twenty passes by chance, together none may, 95 times of 100
    def any_holds(seed, each):
        pairs = [windows(100 * seed + k, shift=math.log(1.1)) for k in range(10)]
        before = pairs[0][0]
        afters = {str(k): before + (after - own) for k, (own, after) in enumerate(pairs)}
        if each:
            return any(v.holds for v in stats.non_inferiority_each(before, afters, 1.1, resamples=99).values())
        return any(stats.non_inferiority(before, after, 1.1, resamples=99).holds for after in afters.values())

    corrected = np.mean([any_holds(seed, True) for seed in range(200)])
    alone = np.mean([any_holds(seed, False) for seed in range(200)])
    assert corrected <= 0.09
    assert alone > 0.25


# --- ties


def test_tied_is_the_two_one_sided_tests():
    first, second = windows(14, shift=0.001, spread=0.01)
    found = stats.tied(first, second, 1.01)
    reach, difference = math.log(1.01), second - first
    upper = scipy.stats.ttest_1samp(difference, reach, alternative="less").pvalue
    lower = scipy.stats.ttest_1samp(difference, -reach, alternative="greater").pvalue
    assert found.p_equal == pytest.approx(max(upper, lower), rel=1e-9)
    assert found.p_different == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("shift", "spread", "outcome"),
    [
        (0.0, 0.005, "tied"),
        (0.003, 0.001, "tied"),
        (0.1, 0.02, "first"),
        (-0.1, 0.02, "second"),
        (0.0, 0.2, "undecided"),
    ],
)
def test_outcomes(shift, spread, outcome):
    found = stats.tied(*windows(15, shift=shift, spread=spread))
    assert found.outcome == outcome
    assert found.ratio.level == pytest.approx(0.9)


@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-0.1, 0.1), spread=st.floats(0.001, 0.1))
@settings(max_examples=30, deadline=None)
def test_a_tie_does_not_depend_on_the_order(seed, shift, spread):
    first, second = windows(seed, shift=shift, spread=spread)
    one, other = stats.tied(first, second), stats.tied(second, first)
    assert one.p_equal == pytest.approx(other.p_equal, rel=1e-9)
    swapped = {"first": "second", "second": "first"}
    assert one.outcome == swapped.get(other.outcome, other.outcome)


def test_identical_plans_are_tied():
    before, _ = windows(16)
    found = stats.tied(before, before)
    assert (found.outcome, found.p_equal, found.p_different) == ("tied", 0.0, 1.0)


# --- bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_window_is_named(value):
    before, after = windows(17, tokens=4)
    after[5, 2] = value
    with pytest.raises(DataError, match="after: window 5 of 32 holds 1 value"):
        stats.paired_ratio(before, after)


CALLS = [
    lambda b, a: stats.paired_ratio(b, a),
    lambda b, a: stats.non_inferiority(b, a, 1.1),
    lambda b, a: stats.tied(b, a),
    lambda b, a: stats.below(a, 1.0),
    lambda b, a: stats.bootstrap(a, lambda sample: np.median(sample, axis=-1)),
]


@pytest.mark.parametrize("call", CALLS)
def test_one_window_is_not_enough(call):
    with pytest.raises(DataError, match="at least 2"):
        call([3.0], [3.1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: stats.paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0]), ShapeError, "2 windows before, 3 after"),
        (lambda: stats.paired_ratio([], []), DataError, "at least one window"),
        (lambda: stats.bootstrap(np.zeros((2, 2, 2))), ShapeError, "one value a window"),
        (lambda: stats.bootstrap([1.0, math.nan], lambda s: np.median(s, axis=-1)), DataError, "NaN or infinite"),
        (lambda: stats.bootstrap([1.0, 2.0], level=95), OptionError, r"0\.95"),
        (lambda: stats.bootstrap([1.0, 2.0], resamples=10), OptionError, "at least 99"),
        (lambda: stats.non_inferiority([1, 2], [1, 2], -1), OptionError, "positive"),
        (lambda: stats.non_inferiority([1, 2], [1, 2], math.nan), OptionError, "positive"),
        (lambda: stats.tied([1, 2], [1, 2], 1.0), OptionError, "exceed 1"),
        (lambda: samples_needed(0.0, 1.0), OptionError, "above 0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_half_precision_tensors_are_read():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.bfloat16)
    assert stats.bootstrap(values).value == pytest.approx(6.2)


def test_every_shape_of_the_same_windows_gives_the_same_answer():
    before, after = windows(18, tokens=6)
    for left, right in product((before, before.mean(1)), (after, after.mean(1))):
        assert stats.paired_ratio(left, right).value == pytest.approx(
            stats.paired_ratio(before, after).value, rel=1e-12
        )
