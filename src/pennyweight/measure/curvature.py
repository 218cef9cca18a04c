"""Flatness: the trace of the Hessian of a model's loss, and of its Fisher matrix, by random probes.

Row 58. Source: H. Liu et al., "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models",
arXiv:2210.14199: among models of one pre-training loss, the flatter one transfers better. E[z^T H z] over z ~ N(0, I)
is the trace; one Hessian-vector product a probe. Differs from the source: the standard error is reported with it. The
trace is not invariant to reparametrization: compare models of one architecture only.

Shape letters: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pennyweight.errors import DataError, OptionError

Loss = Callable[[nn.Module, Any], Tensor]


class Flatness(NamedTuple):
    """A trace with its standard error over probes; the smaller, the flatter."""

    trace: float
    standard_error: float

    def __float__(self) -> float:
        return self.trace


def flatness(
    model: Any,
    data: Any,
    samples: int = 64,
    params: Sequence[str] | Callable[[str], bool] | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> Flatness:
    """Trace of the Hessian of the mean loss on ``data``, with its standard error.

    Args:
        model: a module, or a Pennyweight model.
        data: what ``loss`` takes. By default ids (B, T), scored by the next token; or (inputs, labels): cross-entropy
            for whole-number labels, half the squared error otherwise.
        samples: probes, one Hessian-vector product each.
        params: names of the parameters that count, or a test of a name; None for all.
        loss: of the model and the data, one number.
        seed: of the probes.

    Raises:
        OptionError: no parameter is meant, or fewer than 2 probes.
        DataError: a loss that is not finite.
    """
    if samples < 2 or int(samples) != samples:
        raise OptionError(f"flatness: samples = {samples}; a standard error needs 2 probes or more, a whole number")
    module, weights = _weights(model, params)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _evaluated(module):
        value = (loss or plain_loss)(module, data)
        if not math.isfinite(float(value.detach())):
            raise DataError(f"flatness: the loss is {float(value.detach())}; give data the model can be scored on")
        slopes = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
        for probe in range(samples):
            z = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
            product = torch.autograd.grad(
                slopes, weights, grad_outputs=z, retain_graph=probe + 1 < samples, materialize_grads=True
            )
            found.append(float(sum((a.double() * b.double()).sum() for a, b in zip(z, product, strict=True))))
    return _summary(found)


def fisher_trace(
    model: Any,
    data: Any,
    samples: int = 64,
    params: Sequence[str] | Callable[[str], bool] | None = None,
    *,
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> Flatness:
    """Trace of the Fisher matrix: the mean over data of E|grad log p(y|x)|^2 with y drawn from the model itself.

    At an optimum where the model is right about the data, it equals the trace of the Hessian. One backward pass a
    probe: signs drawn anew for each prediction make the cross terms of different predictions vanish on average.

    Args:
        model: a module, or a Pennyweight model.
        data: ids (B, T), or (inputs, anything): only the inputs are used.
        samples: probes.
        params: as of `flatness`.
        logits: of the model and the data, (..., classes); None for the model's own on the inputs.
        seed: of labels and signs.
    """
    if samples < 2:
        raise OptionError(f"fisher_trace: samples = {samples}; a standard error needs 2 probes or more")
    module, weights = _weights(model, params)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _evaluated(module):
        scores = (logits or _logits)(module, data)
        log_p = scores.flatten(0, -2).log_softmax(-1)
        for probe in range(samples):
            labels = torch.multinomial(log_p.detach().exp().float().cpu(), 1, generator=generator).to(log_p.device)
            signs = torch.randint(0, 2, labels.shape, generator=generator).to(log_p) * 2 - 1
            value = (log_p.gather(1, labels) * signs).sum()
            slopes = torch.autograd.grad(value, weights, retain_graph=probe + 1 < samples, materialize_grads=True)
            found.append(float(sum(g.double().square().sum() for g in slopes)) / len(log_p))
    return _summary(found)


def plain_loss(module: nn.Module, data: Any) -> Tensor:
    """The loss that `flatness` takes by default."""
    if isinstance(data, Tensor):
        return functional.cross_entropy(_logits(module, data).flatten(0, -2), data[:, 1:].flatten())
    inputs, labels = data
    output = _logits(module, (inputs, labels))
    if labels.is_floating_point():
        return functional.mse_loss(output, labels.view_as(output)) / 2
    return functional.cross_entropy(output.flatten(0, -2), labels.flatten())


def _logits(module: nn.Module, data: Any) -> Tensor:
    output = module(data[:, :-1]) if isinstance(data, Tensor) else module(data[0])
    return output if isinstance(output, Tensor) else output.logits


def _weights(model: Any, params: Sequence[str] | Callable[[str], bool] | None) -> tuple[nn.Module, list[Tensor]]:
    module: nn.Module = model if isinstance(model, nn.Module) else model.module
    named = dict(module.named_parameters())
    if params is None:
        chosen = list(named)
    elif callable(params):
        chosen = [name for name in named if params(name)]
    else:
        if unknown := [name for name in params if name not in named]:
            raise OptionError(
                f"flatness: no parameter is called {unknown[0]!r}; there are {', '.join(list(named)[:5])} ..."
            )
        chosen = list(params)
    if not chosen:
        raise OptionError("flatness: no parameter is meant; give names, or None for all")
    return module, [named[name] for name in chosen]


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, and attention that can be differentiated twice."""
    training, wanted = module.training, [(w, w.requires_grad) for w in module.parameters()]
    module.eval()
    for weight, _ in wanted:
        weight.requires_grad_(weight.is_floating_point())
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        module.train(training)
        for weight, before in wanted:
            weight.requires_grad_(before)


def _summary(found: list[float]) -> Flatness:
    values = torch.tensor(found, dtype=torch.float64)
    return Flatness(float(values.mean()), float(values.std() / math.sqrt(len(found))))


class Chosen(NamedTuple):
    """The model chosen, those within the tolerance of the best loss, and what each measured."""

    name: str
    candidates: tuple[str, ...]
    loss: Mapping[str, float]
    trace: Mapping[str, Flatness]


def by_flatness(
    models: Mapping[str, Any] | Sequence[Any],
    loss_tol: float = 0.01,
    *,
    data: Any = None,
    samples: int = 64,
    loss: Loss | None = None,
    params: Sequence[str] | Callable[[str], bool] | None = None,
    seed: int = 0,
) -> Chosen:
    """Among models whose loss lies within ``loss_tol`` nats of the best, the flattest.

    Args:
        models: by name (or in order): modules to be measured on ``data``, or measured (loss, trace) pairs.
        loss_tol: what counts as the same loss.
        data: to measure modules on; see `flatness`.
        samples: probes a module.
        loss: of a module and the data.
        params: parameters that count.
        seed: of the probes, the same for all.

    Raises:
        OptionError: no models, a tolerance below 0, or modules without data.
    """
    named = dict(models) if isinstance(models, Mapping) else {str(i): one for i, one in enumerate(models)}
    if not named or loss_tol < 0:
        raise OptionError(f"by_flatness: {len(named)} models, loss_tol = {loss_tol}; give at least one, and 0 or more")
    losses, traces = {}, {}
    for name, one in named.items():
        if isinstance(one, (nn.Module,)) or hasattr(one, "module"):
            if data is None:
                raise OptionError("by_flatness: modules need data to be measured on; give data=..., or (loss, trace)")
            module = one if isinstance(one, nn.Module) else one.module
            with torch.no_grad():
                losses[name] = float((loss or plain_loss)(module.eval(), data))
        else:
            value, trace = one
            losses[name] = float(value)
            traces[name] = trace if isinstance(trace, Flatness) else Flatness(float(trace), 0.0)
    if lost := [name for name, value in losses.items() if not math.isfinite(value)]:
        raise DataError(f"by_flatness: the loss of {', '.join(lost)} is not finite; leave them out")
    best = min(losses.values())
    near = tuple(name for name in named if losses[name] <= best + loss_tol)
    for name in near:
        if name not in traces:
            traces[name] = flatness(named[name], data, samples, params, loss=loss, seed=seed)
    if lost := [name for name in near if not math.isfinite(traces[name].trace)]:
        raise DataError(f"by_flatness: the trace of {', '.join(lost)} is not finite; leave them out")
    return Chosen(min(near, key=lambda name: traces[name].trace), near, losses, traces)
