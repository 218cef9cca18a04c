"""A plan for training: what a budget of compute is best spent on, by every law that has a say.

Compute, data, served tokens and memory at deployment go in; size, tokens, shape, vocabulary, batch, rate, schedule,
sparsity, width and the share of quantization-aware training come out, each with the law it is from, and the
alternatives with what they cost. Laws disagree: each one's answer is shown with the spread, and the plan itself follows
one of them by name.

Sources beside the laws' own modules: row 6, T. Jin et al., "The Journey Matters: Average Parameter Count over
Pre-training Unifies Sparse and Dense Scaling Laws", arXiv:2501.12486 (loss follows the average count of parameters;
pruning from 25 to 75 % of training along a cubic averages 1 - 0.625 s of them); T. Kumar et al., "Scaling Laws for
Precision", arXiv:2411.04330 (b-bit weights count as N (1 - exp(-b/gamma)) parameters; gamma = 2.6745 from memory of
its table, an option here); N. Sardana et al., arXiv:2401.00448 (training and inference as one budget). Differs from
the sources: combining the three is ours, and no paper has measured the combination.

Letters: N parameters without vocabulary, D tokens, C = 6 N D FLOPs, b bits a stored parameter, s sparsity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pennyweight import laws
from pennyweight.errors import BudgetError, OptionError
from pennyweight.laws import flops as accounting
from pennyweight.laws import hparams, lr, optimal, published, trajectory, vocab
from pennyweight.laws.average import mean_sparsity
from pennyweight.laws.forms import Array, find
from pennyweight.laws.law import Law, LawReceipt, Range
from pennyweight.laws.qat import GAMMA_BITS, effective_params, qat_fraction
from pennyweight.measure import devices
from pennyweight.units import Quantity

#: Dense 16-bit FLOP/s of one device, from its data sheet.
DEVICES = {
    name: device.flops_per_second["fp16"] for device in devices.published() for name in (device.name, *device.aliases)
}
WIDTHS = (16.0, 8.0, 6.0, 4.0, 3.0, 2.0)
SPARSITIES = (0.5, 0.75)
#: Options this close in predicted loss count as equal, and the one that is cheaper to serve wins.
SAME_LOSS = 0.01


@dataclass(frozen=True)
class Shape:
    """A decoder of the planned size.

    Attributes:
        d_model: width.
        layers: blocks.
        heads: of ``d_model / heads`` each.
        d_ff: inner width of the gated feed-forward.
        nonvocab_params: exact count without embedding and head.
    """

    d_model: int
    layers: int
    heads: int
    d_ff: int
    nonvocab_params: int


@dataclass(frozen=True)
class Alternative:
    """One way to spend the budget, and what it costs.

    Attributes:
        name: in words.
        params: of the model in training.
        stored_params: of the model deployed (fewer after sparse training).
        bits: a stored parameter.
        tokens: of training; ``qat_share`` of them quantization-aware.
        train_flops: of training.
        serve_flops: a served token.
        lifetime_flops: training and serving.
        stored_bytes: at deployment; of sparse models with a bit a place for the mask.
        loss: predicted, nats a token, and its interval over the law's bootstrap.
        score: of the downstream task, and its interval, where a score curve was given.
        hours: of one device; None without one.
        money: None without a price.
        fits: within budget, data and memory.
        why: what keeps it from fitting, or what must be known of it.
    """

    name: str
    params: float
    stored_params: float
    bits: float
    tokens: float
    train_flops: float
    serve_flops: float
    lifetime_flops: float
    stored_bytes: float
    loss: float
    loss_interval: Range | None = None
    score: float | None = None
    score_interval: Range | None = None
    sparsity: float = 0.0
    qat_share: float = 0.0
    hours: float | None = None
    money: float | None = None
    fits: bool = True
    why: str = ""


@dataclass(frozen=True)
class TrainingPlan:
    """The plan, the laws' own answers, and the alternatives.

    Attributes:
        budget: what was asked, in plain units.
        answers: each law's compute-optimal split.
        law: the one the plan follows.
        chosen: the alternative taken.
        alternatives: all of them.
        shape: of the chosen size.
        vocabulary: size by each method.
        batches: tokens a step by each law.
        rates: peak learning rate by each law.
        schedule: in words; `make_schedule` makes it.
        steps: of the optimizer.
        warmup_steps: of them.
        reason: why this alternative.
        warnings: what must be known.
        contours: loss against size at a tenth of the budget, at it and at ten times, by compute.
        surface: tokens against size where the predicted loss is the same, by loss.
    """

    budget: dict[str, Any]
    answers: list[published.Answer]
    law: str
    chosen: Alternative
    alternatives: list[Alternative]
    shape: Shape
    vocabulary: dict[str, int]
    batches: dict[str, float]
    rates: dict[str, float]
    schedule: str
    steps: int
    warmup_steps: int
    reason: str
    warnings: list[str] = field(default_factory=list)
    contours: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
    surface: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Least and most of N, D and tokens a parameter over the laws."""
        return {
            name: (min(getattr(a, name) for a in self.answers), max(getattr(a, name) for a in self.answers))
            for name in ("N", "D", "ratio")
        }

    def make_schedule(self, unit: str = "steps") -> Any:
        """The schedule itself, `pennyweight.train.schedules.wsd`."""
        from pennyweight.train.schedules import wsd

        peak = self.rates["step law"]
        if unit == "steps":
            return wsd(self.steps, self.warmup_steps, peak=peak)
        if unit != "tokens":
            raise OptionError(f"make_schedule: unit {unit!r}; give steps or tokens")
        return wsd(self.chosen.tokens, self.warmup_steps * self.batches["step law"], peak=peak, unit="tokens")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        from dataclasses import asdict

        found = asdict(self)
        found["spread"] = {name: list(span) for name, span in self.spread.items()}
        for answer, plain in zip(self.answers, found["answers"], strict=True):
            plain["ratio"] = answer.ratio
        return dict(json.loads(json.dumps(found)))

    def table(self) -> str:
        """The plan in plain text."""
        from pennyweight.plan.pretraining_text import text

        return text(self)

    def html(self) -> str:
        """The plan as one self-contained page."""
        from pennyweight.plan.pretraining_page import page

        return page(self)

    def __str__(self) -> str:
        return self.table()


def training(
    flops: float | str | None = None,
    *,
    gpu_hours: float | str | None = None,
    device: str | float | None = None,
    utilization: float = 0.4,
    money: float | None = None,
    price_per_hour: float | None = None,
    data_tokens: float | str | None = None,
    inference_tokens: float | str = 0.0,
    memory: float | str | None = None,
    bits: Sequence[float] = WIDTHS,
    context: int = 2048,
    law: str | Law = "chinchilla (refit)",
    score: Any = None,
    gamma_bits: float = GAMMA_BITS,
    sparsities: Sequence[float] = SPARSITIES,
) -> TrainingPlan:
    """Plan a training run.

    Args:
        flops: training compute, 1e21 or "1 ZFLOPs".
        gpu_hours: instead: hours of one ``device`` at ``utilization``.
        device: a name of `DEVICES`, or its peak FLOP/s.
        utilization: share of the peak that useful FLOPs reach.
        money: instead: an amount, with ``price_per_hour`` of the device.
        price_per_hour: of the device, in the unit of ``money``.
        data_tokens: unique tokens there are; None for no limit.
        inference_tokens: served over the model's life.
        memory: bytes for the weights at deployment, "16GB".
        bits: widths of a stored parameter to consider.
        context: tokens of a sequence.
        law: the one to follow: the name of a law of `published.split_laws`, or a `Law` of N and D of your own
            (chinchilla, reference or minicpm), bootstrapped for intervals; it is then shown beside the others.
        score: a ``sigmoid_of_loss`` law, or (loss, score) points to fit one; None predicts no score.
        gamma_bits: of the precision law.
        sparsities: final shares of zeros to consider for sparse pre-training.

    Raises:
        BudgetError: no compute, or a memory that no width fits.
        OptionError: two kinds of compute, an unknown device or law, a law that is not one of N and D, or that has no
            best split.
    """
    laws_known = published.split_laws()
    if isinstance(law, str):
        if law not in laws_known:
            raise OptionError(f"plan: no law is called {law!r}; there are {', '.join(laws_known)}")
        name, chosen_law = law, laws_known[law]
    else:
        name, chosen_law = law.source, _split_law(law)
    peak = _peak(device)
    compute, said = _compute(flops, gpu_hours, peak, utilization, money, price_per_hour)
    unique = None if data_tokens is None else _amount(data_tokens, "data_tokens", "count")
    served = 0.0 if inference_tokens in (0, 0.0) else _amount(inference_tokens, "inference_tokens", "count")
    stored = None if memory is None else _amount(memory, "memory", "bytes")
    for option, value, low, high in (("gamma_bits", gamma_bits, 0, math.inf), ("context", context, 0, math.inf)):
        if not low < value < high:
            raise OptionError(f"plan: {option} = {value!r}; give a positive number")
    if not bits or min(bits) <= 0 or any(not 0 < s < 1 for s in sparsities):
        raise OptionError(
            f"plan: bits = {list(bits)}, sparsities = {list(sparsities)}; give widths > 0, shares in (0, 1)"
        )
    curve = _score_law(score)
    own = None if isinstance(law, str) else _own_answer(name, chosen_law, compute)
    make = _Maker(chosen_law, compute, unique, served, stored, gamma_bits, curve, peak, utilization, price_per_hour)
    found = _alternatives(make, bits, sparsities)
    chosen, reason = _choose(found, served)
    shape = shape_of(chosen.params)
    tokens = chosen.tokens
    step = hparams.step(shape.nonvocab_params, tokens, context)
    loss = chosen.loss
    batches = {
        "step law": step.batch_tokens,
        "MiniCPM (C4 loss)": laws.batch_by_loss(loss),
        "critical batch (Kaplan et al.)": trajectory.critical_batch(loss),
        "critical batch (Su et al., C4)": trajectory.critical_batch(loss, constants=trajectory.C4),
    }
    rates = {
        "step law": step.lr,
        # with mu-parametrization and sequences of 4,096, as its authors count
        "power law (mu-parametrization)": lr.power(tokens, step.batch_tokens / 4096),
    }
    steps = max(10, round(tokens / step.batch_tokens))
    warmup = min(2000, max(1, steps // 20))
    methods: tuple[Any, ...] = ("isoflops", "derivative", "parametric")
    vocabulary = {}
    for method in methods:
        given = None if method == "derivative" else chosen.train_flops
        try:
            vocabulary[str(method)] = vocab.optimal(chosen.params, flops=given, method=method, width=shape.d_model)
        except (BudgetError, OptionError, ValueError) as error:
            make.warnings.append(f"vocabulary by {method}: {error}")
    answers = published.answers(compute)
    if own is not None:
        answers.insert(0, own)
        make.warnings.append(
            f"losses are those of {name}; batches by loss take them as nats a token of their authors' text"
        )
    warnings = list(dict.fromkeys([*make.warnings, *_warnings(answers, name, chosen, bits)]))
    return TrainingPlan(
        budget={
            "compute": said, "train_flops": compute, "data_tokens": unique, "inference_tokens": served,
            "memory_bytes": stored, "device_flops": peak, "utilization": utilization if peak else None,
            "price_per_hour": price_per_hour,
        },
        answers=answers,
        law=name,
        chosen=chosen,
        alternatives=found,
        shape=shape,
        vocabulary=vocabulary,
        batches=batches,
        rates=rates,
        schedule=f"warm-up over {warmup:,} steps, stable, then exponential decay over the last 10 % (wsd)",
        steps=steps,
        warmup_steps=warmup,
        reason=reason,
        warnings=warnings,
        contours=_contours(chosen_law, compute),
        surface=_surface(chosen_law, compute),
    )  # fmt: skip


def _peak(device: str | float | None) -> float | None:
    if device is None:
        return None
    if isinstance(device, str):
        if device.lower() not in DEVICES:
            raise OptionError(f"plan: no device is called {device!r}; there are {', '.join(DEVICES)}, or give FLOP/s")
        return DEVICES[device.lower()]
    if not device > 0:
        raise OptionError(f"plan: device = {device!r}; give its peak FLOP/s, or a name")
    return float(device)


def _amount(value: float | str, name: str, kind: Any) -> float:
    number = Quantity.parse(value, expect=(kind,)).number if isinstance(value, str) else float(value)
    if not (number > 0 and math.isfinite(number)):
        raise BudgetError(f"plan: {name} = {value!r}; give a positive number")
    return number


def _compute(
    flops: float | str | None,
    gpu_hours: float | str | None,
    peak: float | None,
    utilization: float,
    money: float | None,
    price: float | None,
) -> tuple[float, str]:
    ways = [way for way, value in (("flops", flops), ("gpu_hours", gpu_hours), ("money", money)) if value is not None]
    if len(ways) != 1:
        raise OptionError(
            f"plan: compute given as {' and '.join(ways) or 'nothing'}; give one of flops, gpu_hours or money"
        )
    if flops is not None:
        number = _amount(flops, "flops", "flops")
        return number, f"{number:.3g} FLOPs"
    if peak is None:
        raise OptionError(f"plan: {ways[0]} needs a device; give one of {', '.join(DEVICES)}, or its peak FLOP/s")
    if not 0 < utilization <= 1:
        raise OptionError(f"plan: utilization = {utilization!r}; give a share of the peak in (0, 1]")
    if money is not None:
        if price is None or not price > 0:
            raise OptionError(f"plan: money needs price_per_hour, the price of a device-hour; given: {price!r}")
        hours = _amount(money, "money", "count") / price
        said = f"{money:g} at {price:g} a device-hour"
    else:
        hours = _amount(gpu_hours, "gpu_hours", "count")  # type: ignore[arg-type]
        said = f"{hours:,.6g} device-hours"
    number = hours * 3600 * peak * utilization
    return number, f"{said}, {peak:.3g} FLOP/s at {utilization:.0%}: {number:.3g} FLOPs"


#: Constants of a law of N and D in the order of ``chinchilla``: E, A, alpha, B, beta; None for a floor of 0.
_SPLITS: dict[str, tuple[str | None, ...]] = {
    "chinchilla": ("E", "A", "alpha", "B", "beta"),
    "minicpm": ("L0", "C_N", "alpha", "C_D", "beta"),
    "reference": (None, "a", "alpha", "b", "beta"),
}


def _split_law(law: Law) -> Law:
    """The same law, written as ``chinchilla``, whose optimum and its intervals have closed forms."""
    if law.form.name not in _SPLITS:
        raise OptionError(
            f"plan: {law.form.name} is a law of {', '.join(law.variables)}, which does not split compute into size and "
            f"tokens; give one of N and D: {', '.join(_SPLITS)}"
        )
    form, order = find("chinchilla"), _SPLITS[law.form.name]

    def reordered(natural: Array) -> Array:  # (..., P) -> (..., 5)
        columns = [0.0 * natural[..., 0] if one is None else natural[..., law.form.names.index(one)] for one in order]
        return np.stack(columns, axis=-1)

    samples = None if law.samples is None else form.internal(reordered(law.form.natural(law.samples)))
    constants = dict(zip(form.names, reordered(law.parameters).tolist(), strict=True))
    if not (constants["alpha"] > 0 and constants["beta"] > 0 and constants["A"] > 0 and constants["B"] > 0):
        said = ", ".join(f"{name} = {constants[name]:.4g}" for name in ("A", "alpha", "B", "beta"))
        raise OptionError(
            f"plan: {law.source}: a law with {said} has no best split of compute: loss must fall both with size and "
            "with tokens; fit it to runs that vary both"
        )
    return replace(law, form=form, constants=constants, samples=samples)


def _reach(receipt: LawReceipt) -> str | None:
    """What must be said of a point outside the fitted range, however near."""
    if receipt.extrapolation is None or receipt.extrapolation.factor <= 1:
        return receipt.warning
    return receipt.extrapolation.text


def _own_answer(name: str, law: Law, compute: float) -> published.Answer:
    best = optimal.allocate(law, compute)
    assert best.receipt is not None, "every allocation has the receipt of its prediction"
    return published.Answer(
        name, best.N, best.D, best.loss, "as its points", best.intervals, law.source, _reach(best.receipt)
    )


def _score_law(score: Any) -> Law | None:
    if score is None or isinstance(score, Law):
        if score is not None and score.form.name != "sigmoid_of_loss":
            raise OptionError(
                f"plan: score is a {score.form.name}; give a sigmoid_of_loss law, or (loss, score) points"
            )
        return score
    return laws.fit(score, "sigmoid_of_loss", holdout=False)


@dataclass
class _Maker:
    """Prices alternatives."""

    law: Law
    compute: float
    unique: float | None
    served: float
    memory: float | None
    gamma: float
    curve: Law | None
    peak: float | None
    utilization: float
    price: float | None
    warnings: list[str] = field(default_factory=list)

    def __call__(
        self, name: str, params: float, tokens: float, *, bits: float = 16.0, sparsity: float = 0.0, why: str = ""
    ) -> Alternative:
        """``params`` is the average over training; sparse runs start larger and end smaller."""
        start = params / (1 - mean_sparsity(sparsity))
        stored_params = start * (1 - sparsity)
        worth = published.effective_tokens(tokens, self.unique) if self.unique is not None else tokens
        found = self.law.predict(N=effective_params(params, bits, self.gamma), D=worth)
        train = accounting.training(params, tokens)
        serve = accounting.INFERENCE * stored_params
        stored = (stored_params * bits + (start if sparsity else 0.0)) / 8  # zeros cost a bit each to be told apart
        reasons = [why] if why else []
        fits = True
        if train > self.compute * (1 + 1e-6):
            fits = False
            reasons.append(f"needs {train / self.compute:.2f} times the compute")
        if self.memory is not None and stored > self.memory * (1 + 1e-6):
            fits = False
            reasons.append(f"needs {stored / self.memory:.2f} times the memory")
        if self.unique is not None and tokens > self.unique * (1 + 1e-6):
            reasons.append(f"sees its data {tokens / self.unique:.1f} times")
        score = interval = None
        if self.curve is not None:
            score = float(self.curve(L=found.value))
            if found.interval is not None:
                ends = sorted((float(self.curve(L=found.interval.low)), float(self.curve(L=found.interval.high))))
                interval = Range(*ends)
        hours = accounting.device_hours(train, peak=self.peak, utilization=self.utilization) if self.peak else None
        return Alternative(
            name=name,
            params=start,
            stored_params=stored_params,
            bits=bits,
            tokens=tokens,
            train_flops=train,
            serve_flops=serve,
            lifetime_flops=train + serve * self.served,
            stored_bytes=stored,
            loss=found.value,
            loss_interval=found.interval,
            score=score,
            score_interval=interval,
            sparsity=sparsity,
            # of the deployed weights: S counts tokens a stored byte
            qat_share=qat_fraction(stored_params, tokens, bits) if bits < 16 else 0.0,
            hours=hours,
            money=None if hours is None or self.price is None else hours * self.price,
            fits=fits,
            why="; ".join(reasons),
        )

    def best_tokens(self, params: float) -> float:
        return self.compute / (accounting.TRAINING * params)


def _alternatives(make: _Maker, bits: Sequence[float], sparsities: Sequence[float]) -> list[Alternative]:
    free = optimal.allocate(make.law, make.compute)
    found = [make("compute-optimal", free.N, free.D)]
    plain = found[0]
    limited = make.unique is not None and free.D > make.unique
    if limited:
        assert make.unique is not None
        once = make.compute / (accounting.TRAINING * make.unique)
        found.append(make("larger model, data once", once, make.unique))
        found.append(_repeated(make))
    for factor, words in ((2.0, "half the size, trained longer"), (4.0, "a quarter of the size, trained longer")):
        found.append(make(words, free.N / factor, free.D * factor))
    if make.served:
        whole = optimal.allocate(make.law, make.compute, inference_tokens=make.served)
        found.append(make("training and serving paid from this budget", whole.N, whole.D))
        cheapest = optimal.cheapest(make.law, plain.loss, inference_tokens=make.served)
        saved = 1 - cheapest.total_flops / plain.lifetime_flops
        found.append(
            make("the same loss at least lifetime cost", cheapest.N, cheapest.D, why=f"saves {saved:.0%} over its life")
        )
    for width in bits:
        if width < 16:
            found.append(make(f"compute-optimal, trained to {width:g} bits", free.N, free.D, bits=width))
        if make.memory is not None:
            most = make.memory * 8 / width
            if most < free.N:
                found.append(
                    make(f"as large as memory holds at {width:g} bits", most, make.best_tokens(most), bits=width)
                )
    for sparsity in sparsities:
        found.append(make(f"sparse pre-training to {sparsity:.0%} zeros", free.N, free.D, sparsity=sparsity))
        if make.memory is not None:
            # average parameters of a sparse run whose end fits the memory at 4 bits
            width = min((b for b in bits if b >= 4), default=min(bits))
            most = make.memory * 8 / ((1 - sparsity) * width + 1) * (1 - mean_sparsity(sparsity))
            if most < free.N:
                words = f"sparse to {sparsity:.0%} zeros at {width:g} bits, as large as memory holds"
                found.append(make(words, most, make.best_tokens(most), bits=width, sparsity=sparsity))
    return found


def _repeated(make: _Maker) -> Alternative:
    """The best number of passes over the data there is."""
    assert make.unique is not None
    best = None
    for step in range(201):
        passes = 100 ** (step / 200)
        one = make("the data repeated as often as pays", make.best_tokens(make.unique * passes), make.unique * passes)
        if best is None or one.loss < best.loss:
            best = one
    assert best is not None
    return best


def _choose(found: Sequence[Alternative], served: float) -> tuple[Alternative, str]:
    fitting = [one for one in found if one.fits]
    if not fitting:
        raise BudgetError(
            "plan: no alternative fits compute and memory together; allow fewer bits, or raise one of them"
        )
    least = min(one.loss for one in fitting)
    near = [one for one in fitting if one.loss <= least + SAME_LOSS]
    if len(near) == 1:
        return near[0], "the least predicted loss of those that fit"
    by: Callable[[Alternative], tuple[float, float]] = (
        (lambda one: (one.lifetime_flops, one.stored_bytes)) if served else (lambda one: (one.stored_bytes, one.loss))
    )
    chosen = min(near, key=by)
    what = "over its life" if served else "to store"
    return chosen, f"of the {len(near)} that fit within {SAME_LOSS} nats of the least loss, the cheapest {what}"


def _warnings(answers: Sequence[published.Answer], name: str, chosen: Alternative, bits: Sequence[float]) -> list[str]:
    found = [f"{answer.law}: {answer.warning}" for answer in answers if answer.warning and answer.law == name]
    sizes = [answer.N for answer in answers]
    if max(sizes) > 3 * min(sizes):
        found.append(
            f"the laws disagree on size by a factor of {max(sizes) / min(sizes):.1f}; a sweep (laws.bench) can tell"
        )
    if min(bits) < 16:
        found.append("losses at fewer bits follow the precision law, whose constant is another family's")
    if chosen.sparsity:
        found.append("sparse pre-training needs kernels that use zeros, or its compute is that of the dense start")
    return found


def _contours(law: Law, compute: float) -> dict[str, list[tuple[float, float]]]:
    """IsoFLOP curves: loss against size at the budget, a tenth and ten times of it."""
    found = {}
    for factor in (0.1, 1.0, 10.0):
        best = optimal.allocate(law, compute * factor)
        sizes = [best.N * 10 ** (step / 20) for step in range(-24, 25)]
        found[f"{compute * factor:.2g} FLOPs"] = [(n, float(law(N=n, D=compute * factor / (6 * n)))) for n in sizes]
    return found


def _surface(law: Law, compute: float) -> dict[str, list[tuple[float, float]]]:
    """Lines of equal loss over size and tokens: those that touch the budget times 0.01 to 100 at its best split."""
    middle = optimal.allocate(law, compute).N
    sizes = [middle * 10 ** (step / 16) for step in range(-24, 25)]
    found = {}
    for factor in (0.01, 0.1, 1.0, 10.0, 100.0):
        loss = optimal.allocate(law, compute * factor).loss
        tokens = np.asarray(law.inverse("D", loss, N=np.array(sizes)))
        found[f"{loss:.3f}"] = [(n, float(d)) for n, d in zip(sizes, tokens, strict=True) if 0 < d < math.inf]
    return found


def shape_of(params: float, *, aspect: float = 100.0) -> Shape:
    """The decoder nearest to ``params`` (without vocabulary) with a width of about ``aspect`` times its depth.

    Gated feed-forward of 8/3 the width, heads of 64 or 128; T. Henighan et al. find language models best near an
    aspect of 100, and flat around it.
    """
    best: tuple[float, Shape] | None = None
    for unit in (16, 64, 128):
        width = unit
        while 4 * width * width < 4 * params and width <= (1024 if unit == 16 else 65536):
            even = 64 if width >= 512 else 8
            d_ff = round(8 * width / 3 / even) * even
            block = 4 * width * width + 3 * width * d_ff + 2 * width
            for layers in {max(1, math.floor(params / block)), max(1, math.ceil(params / block))}:
                head = 128 if width % 128 == 0 and width >= 1024 else min(unit, 64)
                cost = accounting.transformer(
                    accounting.TransformerConfig(width, layers, max(1, width // head), d_ff=d_ff, vocab_size=0)
                )
                miss = abs(math.log(cost.non_embedding / params))
                flat = 0.1 * abs(math.log(width / layers / aspect))
                if best is None or miss + flat < best[0]:
                    best = miss + flat, Shape(width, layers, max(1, width // head), d_ff, cost.non_embedding)
            width += unit
    if best is None:
        raise BudgetError(f"plan: {params:.3g} parameters are too few for a decoder; raise the compute")
    return best[1]
