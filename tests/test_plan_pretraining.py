"""The plan of a training run: budgets in, one law followed by name, every law shown, prices exact."""

import json
import math

import pytest

import pennyweight as pw
from pennyweight import laws
from pennyweight.cli import main
from pennyweight.errors import OptionError, UnitError
from pennyweight.laws import flops, optimal, published
from pennyweight.plan import pretraining

CURVE = laws.law("sigmoid_of_loss", c=0.6, gamma=-4.0, l=2.2, d=0.25)


def named(plan, words):
    return next(one for one in plan.alternatives if one.name.startswith(words))


def test_compute_is_the_same_however_it_is_paid():
    direct = pw.plan.training(2.0e21)
    hours = 2.0e21 / (989e12 * 0.5) / 3600
    for other in (
        pw.plan.training("2 ZFLOPs"),
        pw.plan(gpu_hours=hours, device="h100", utilization=0.5),
        pw.plan.training(money=3 * hours, price_per_hour=3.0, device=989e12, utilization=0.5),
    ):
        assert other.budget["train_flops"] == pytest.approx(2.0e21)
        assert other.chosen.params == pytest.approx(direct.chosen.params)
    paid = pw.plan(gpu_hours=hours, device="h100", utilization=0.5, price_per_hour=3.0).alternatives[0]
    assert (paid.hours, paid.money) == pytest.approx((hours, 3 * hours))


def test_every_law_answers_for_itself():
    plan = pw.plan.training(1e20)
    by_law = {answer.law: answer for answer in plan.answers}
    assert by_law["chinchilla (refit)"].N == pytest.approx(8.55e8, rel=1e-3)  # the replication's optimum
    assert by_law["chinchilla (refit)"].loss == pytest.approx(2.5521, abs=1e-4)
    assert by_law["chinchilla (Hoffmann et al.)"].N == pytest.approx(7.749e8, rel=1e-3)
    assert by_law["language (Henighan et al.)"].N == pytest.approx(laws.nopt("language", 1e20 / 8.64e19))
    assert by_law["MiniCPM (average)"].ratio == pytest.approx((1e20 / 1e18 / 6) ** 0.1 / 0.01)
    assert all(a.N * a.D * 6 == pytest.approx(1e20) for a in plan.answers)
    low, high = plan.spread["N"]
    assert (low, high) == (min(a.N for a in plan.answers), max(a.N for a in plan.answers))
    span = by_law["chinchilla (refit)"].intervals["N"]
    assert span.low < by_law["chinchilla (refit)"].N < span.high
    assert plan.law == "chinchilla (refit)"


def test_the_refit_reaches_the_replication():
    law = published.refit()
    assert (law.E, law.alpha, law.beta) == pytest.approx((1.81724, 0.347313, 0.367183), abs=1e-4)
    assert law.samples.shape == (200, 5)


def test_prices_of_the_alternatives():
    plan = pw.plan.training(1e21, inference_tokens=5e12, memory="6GB", score=CURVE)
    law = published.refit()
    free = optimal.allocate(law, 1e21)
    for one in plan.alternatives:
        average = one.params * (1 - 0.625 * one.sparsity)
        assert one.train_flops == pytest.approx(6 * average * one.tokens)
        assert one.lifetime_flops == pytest.approx(one.train_flops + 2 * one.stored_params * 5e12)
        mask = one.params if one.sparsity else 0
        assert one.stored_bytes == pytest.approx((one.stored_params * one.bits + mask) / 8)
        counted = average if one.bits == 16 else average * (1 - math.exp(-one.bits / 2.6745))
        assert one.loss == pytest.approx(law(N=counted, D=one.tokens))
        assert one.score == pytest.approx(CURVE(L=one.loss))
        assert one.loss_interval.low <= one.loss <= one.loss_interval.high
        assert one.fits == (one.train_flops <= 1e21 * 1.000001 and one.stored_bytes <= 6e9 * 1.000001)
        share = laws.qat_fraction(one.stored_params, one.tokens, one.bits) if one.bits < 16 else 0
        assert one.qat_share == pytest.approx(share)
    assert plan.chosen.fits
    best = min(one.loss for one in plan.alternatives if one.fits)
    near = [one for one in plan.alternatives if one.fits and one.loss <= best + 0.01]
    assert plan.chosen.lifetime_flops == min(one.lifetime_flops for one in near)
    cheap = named(plan, "the same loss")
    assert cheap.loss == pytest.approx(named(plan, "compute-optimal").loss)
    assert cheap.lifetime_flops < plan.alternatives[0].lifetime_flops
    assert cheap.params < free.N
    half = named(plan, "sparse pre-training to 50%")
    assert half.stored_params / free.N == pytest.approx(0.5 / 0.6875)
    whole = named(plan, "training and serving")
    assert whole.lifetime_flops == pytest.approx(1e21)


def test_scarce_data_are_repeated_as_long_as_that_pays():
    plan = pw.plan.training(1e21, data_tokens=5e9)
    repeated, once = named(plan, "the data repeated"), named(plan, "larger model")
    assert once.tokens == 5e9
    assert repeated.loss < once.loss
    worth = published.effective_tokens(repeated.tokens, 5e9)
    assert repeated.loss == pytest.approx(published.refit()(N=repeated.params, D=worth))
    assert 5e9 < worth < repeated.tokens
    assert published.effective_tokens(4e9, 5e9) == 4e9
    # 4 epochs are nearly as good as new data, many are worth at most 1 + R* of it
    assert published.effective_tokens(4 * 5e9, 5e9) / 20e9 == pytest.approx(0.93, abs=0.03)
    assert published.effective_tokens(1e15, 5e9) == pytest.approx(5e9 * 16.387756)


def test_settings_come_from_their_laws():
    plan = pw.plan.training(3e21)
    chosen, shape = plan.chosen, plan.shape
    config = flops.TransformerConfig(shape.d_model, shape.layers, shape.heads, d_ff=shape.d_ff)
    assert flops.transformer(config).non_embedding == shape.nonvocab_params == pytest.approx(chosen.params, rel=0.05)
    assert 40 < shape.d_model / shape.layers < 250
    step = laws.hparams.step(shape.nonvocab_params, chosen.tokens)
    assert plan.rates["step law"] == step.lr
    assert plan.batches["step law"] == step.batch_tokens
    assert plan.vocabulary["derivative"] == laws.vocab.optimal(chosen.params, method="derivative", width=shape.d_model)
    rate = plan.make_schedule()
    assert rate(plan.warmup_steps) == rate(plan.steps // 2) == pytest.approx(step.lr)
    assert rate(plan.steps) < 0.1 * step.lr
    assert plan.make_schedule("tokens").total == pytest.approx(chosen.tokens)


@pytest.mark.parametrize("size", [1e6, 3e7, 1e9, 7e10])
def test_shapes_meet_their_size(size):
    assert pretraining.shape_of(size).nonvocab_params == pytest.approx(size, rel=0.1)


def test_text_page_and_json(capsys, tmp_path):
    out, facts = tmp_path / "plan.html", tmp_path / "plan.json"
    words = ["plan", "--gpu-hours", "1000", "--device", "a100", "--price", "2", "--memory", "2GB", "--serve", "1T"]
    assert main([*words, "--out", str(out), "--json", str(facts)]) == 0
    said = capsys.readouterr().out
    assert "What each law says of this compute:" in said
    assert "spread of size:" in said
    found = json.loads(facts.read_text())
    assert found["chosen"]["name"] in said
    assert found["answers"][0]["intervals"]["N"][0] < found["answers"][0]["N"]
    page = out.read_text()
    assert "<script" not in page
    pictures = page.split("<svg ")[1:]
    assert ["equal compute" in pictures[0], "equal loss" in pictures[1], "lifetime FLOPs" in pictures[2]] == [True] * 3
    assert pictures[0].count("<polyline") == 3
    assert pictures[1].count("<polyline") >= 4  # lines of equal loss
    assert pictures[2].count("<circle") == len(found["alternatives"])
    assert all('class="chosen"' in picture for picture in pictures[1:])
    assert "Alternatives" in page


def test_lines_of_equal_loss_touch_their_budgets():
    plan = pw.plan.training(4e21)
    law = published.refit()
    for loss, line in plan.surface.items():
        predicted = [law(N=n, D=d) for n, d in line]
        assert predicted == pytest.approx([float(loss)] * len(line), abs=6e-4)  # the name is rounded
    touching = list(plan.surface.values())[2]
    assert min(6 * n * d for n, d in touching) == pytest.approx(4e21, rel=2e-2)


def test_bad_budgets_are_refused_in_one_line(capsys):
    with pytest.raises(OptionError, match="compute given as nothing; give one of flops, gpu_hours or money"):
        pw.plan.training()
    with pytest.raises(OptionError, match="compute given as flops and gpu_hours"):
        pw.plan.training(1e20, gpu_hours=3)
    with pytest.raises(OptionError, match="needs a device"):
        pw.plan.training(gpu_hours=3)
    with pytest.raises(OptionError, match="money needs price_per_hour"):
        pw.plan.training(money=3.0, device="h100")
    with pytest.raises(OptionError, match="no device is called 'abacus'"):
        pw.plan.training(gpu_hours=3, device="abacus")
    with pytest.raises(UnitError, match="no unit is called 'apples'"):
        pw.plan.training("3 apples")
    with pytest.raises(OptionError, match="no law is called 'mine'"):
        pw.plan.training(1e20, law="mine")
    assert main(["plan", "--compute", "1e20", "--budget", "25%"]) == 2
    assert "are of a fit" in capsys.readouterr().err
