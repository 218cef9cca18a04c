"""TopKLD against sums by hand and its two limits; its lever against plain rounding; the law of total bits."""

import math

import numpy as np
import pytest
import torch
from families import VOCABULARY, build
from torch.nn import functional

from pennyweight.errors import BudgetError, DataError, OptionError, ShapeError
from pennyweight.evaluate.agreement import agreement
from pennyweight.laws import show
from pennyweight.laws.bit_level import BitLevelLaw, fit_bit_level
from pennyweight.laws.law import law
from pennyweight.lever import make
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy
from pennyweight.model.loading import load, of_module
from pennyweight.model.saving import save
from pennyweight.solvers.topkld import topkld
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, Quantized
from pennyweight.work import Work


def logits(*shape, seed=0):
    return torch.randn(2, *shape, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("top", ["reverse", "forward"])
def test_its_limits_are_the_two_divergences(top):
    student, teacher = logits(4, 3)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    reverse = functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    whole, none = (reverse, forward) if top == "reverse" else (forward, reverse)
    torch.testing.assert_close(topkld(student, teacher, 9, top=top), whole)
    torch.testing.assert_close(topkld(student, teacher, 0, top=top), none)


@pytest.mark.parametrize("k", range(10))
def test_it_is_the_sum_over_both_parts_by_hand(k):
    student, teacher = (part.softmax(-1) for part in logits())
    order = sorted(range(9), key=lambda token: -float(teacher[token]))
    total = 0.0
    for place, token in enumerate(order):
        p, q = float(teacher[token]), float(student[token])
        total += q * math.log(q / p) - q + p if place < k else p * math.log(p / q) - p + q
    assert float(topkld(student.log(), teacher.log(), k)) == pytest.approx(total)


def test_it_is_zero_only_where_both_agree_and_ties_go_to_the_first():
    student, teacher = logits(50)
    assert bool((topkld(student, teacher, 4) > 0).all())
    torch.testing.assert_close(
        topkld(teacher + 3, teacher, 4), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-12
    )
    even = torch.zeros(9, dtype=torch.float64)
    tilted = torch.arange(9.0, dtype=torch.float64)
    q = tilted.softmax(-1)
    parts = torch.cat([(q * (q * 9).log() - q + 1 / 9)[:2], (-(q * 9).log() / 9 - 1 / 9 + q)[2:]])
    torch.testing.assert_close(topkld(tilted, even, 2), parts.sum())


def test_its_gradient_is_right_and_the_teacher_gets_none():
    student, teacher = (part.clone().requires_grad_() for part in logits(2))
    assert torch.autograd.gradcheck(lambda one: topkld(one, teacher.detach(), 3), (student,))
    topkld(student, teacher, 3).sum().backward()
    assert teacher.grad is None


def windows(count=12, length=20):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def changed(options, where=lambda found: found.block is not None):
    model = of_module(build("llama"))
    maps = tuple(found for found in model.anatomy.maps() if where(found))
    make("quantize.topkld", options).change(model, Work(model=model, windows=windows(), maps=maps))
    return model, maps


def test_without_steps_it_is_plain_rounding():
    model, maps = changed({"bits": 3, "group_size": 16, "steps": 0, "k": 5})
    original = build("llama")
    for found in maps:
        weight = model.module.get_submodule(found.path).weight
        matrix = anatomy.matrix(original, found).detach()
        plain = RTN(bits=3, group_size=16, zero="integer").solve(Dense(matrix), NO_STATISTICS)
        assert isinstance(weight, Quantized)
        assert torch.equal(weight.dense(), plain.dense())
        assert weight.cost() == plain.cost()


@pytest.mark.parametrize("k", [0, 5, VOCABULARY])
def test_training_draws_the_student_to_the_original_and_survives_a_file(k, tmp_path):
    original = build("llama")
    options = {"bits": 2, "group_size": 16, "k": k, "rate": 3e-3, "scale_rate": 1e-3, "batch": 6}
    plain, _ = changed(options | {"steps": 0})
    model, maps = changed(options | {"steps": 40})
    before, after = (float(agreement(original, one.module, windows(24)[12:]).kl.mean()) for one in (plain, model))
    assert after < 0.8 * before
    untouched = {name: p for name, p in original.named_parameters() if "embed" in name or "lm_head" in name}
    for name, parameter in untouched.items():
        assert torch.equal(model.module.get_parameter(name), parameter)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.module(windows()).logits, model.module(windows()).logits)
    assert all(model.module.get_submodule(found.path).weight.bits == 2 for found in maps)


def test_only_selected_maps_are_rounded():
    model, maps = changed({"steps": 2, "k": 3, "group_size": 16}, lambda found: found.role.startswith("ffn"))
    kinds = {found.path: type(model.module.get_submodule(found.path).weight) for found in model.anatomy.maps()}
    assert {path for path, kind in kinds.items() if kind is Quantized} == {found.path for found in maps}


def test_what_cannot_be_is_refused():
    student, teacher = logits()
    with pytest.raises(OptionError, match=r"k = 10, top = 'reverse' for 9 tokens; give 0 to 9"):
        topkld(student, teacher, 10)
    with pytest.raises(ShapeError, match=r"logits of \(8,\) and \(9,\)"):
        topkld(student[:8], teacher, 1)
    with pytest.raises(OptionError, match="k = 500 of 64 tokens; give at most 64"):
        changed({"k": 500})
    with pytest.raises(OptionError, match=r"quantize.topkld: bits = 9 is out of range"):
        make("quantize.topkld", {"bits": 9})
    bert = of_module(build("bert"))
    with pytest.raises(OptionError, match="trains on next tokens, and BertForMaskedLM is of kind masked-lm"):
        make("quantize.topkld").change(bert, Work(model=bert, windows=windows(), maps=()))


PLANTED = {"E": 0.8, "A": 30.0, "alpha": 0.4, "theta": 6.0, "kappa": 1.5, "psi": 0.05}


def test_the_law_of_total_bits_is_found_again_and_buys_the_best_width():
    truth = BitLevelLaw(law("bit_level", **PLANTED))
    sizes, widths = np.array([1e4, 3e4, 1e5, 3e5, 1e6]), np.array([2.0, 3, 4, 6, 8])
    size, bits = (part.ravel() for part in np.meshgrid(sizes, widths))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(size.size))
    found = fit_bit_level({"N": size, "bits": bits, "loss": truth.loss(size, bits) * noise})
    np.testing.assert_allclose(found.loss(size, bits), truth.loss(size, bits), rtol=0.005)
    for total in (2e5, 1e6, 5e6):
        exact = min((float(truth.loss(total / width, width)), width) for width in (2, 3, 4, 5, 6, 8, 16))
        bought = truth.best(total)
        assert (bought.loss, bought.bits) == pytest.approx(exact)
        assert bought.bits * bought.params == pytest.approx(total)
        # what the fitted law buys is nearly as good, by the true one
        guess = found.best(total)
        assert float(truth.loss(guess.params, guess.bits)) < 1.01 * exact[0]
    losses = [one.loss for one in truth.envelope((1e5, 1e6, 1e7))]
    assert losses == sorted(losses, reverse=True)
    assert show("bit_level").row == 112
    rows = [{"N": a, "bits": b, "loss": float(truth.loss(a, b))} for a, b in zip(size, bits, strict=True)]
    assert fit_bit_level(rows).loss(5e4, 5) == pytest.approx(float(truth.loss(5e4, 5)), rel=1e-3)
    with pytest.raises(BudgetError, match="0 total bits"):
        truth.best(0)
    with pytest.raises(DataError, match="no column bits; give N, bits and loss"):
        fit_bit_level({"N": [1.0], "loss": [1.0]})
