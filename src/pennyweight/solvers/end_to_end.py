"""Training a few parameters of a whole language model: scales, steps, adapters; everything else stays as it is.

Shape letters: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import device_of, first_tensor, looking, native_dtype, run
from pennyweight.model.model import Model
from pennyweight.train import Samples, Trainer
from pennyweight.train.loop import Callback, Loss
from pennyweight.train.schedules import cosine

Target = Literal["text", "original"]
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """Parameters that learn at one rate.

    Attributes:
        parameters: to train.
        rate: of AdamW, at its peak.
        decay: weight decay.
    """

    parameters: Sequence[nn.Parameter]
    rate: float
    decay: float = 0.0


def loss_towards(target: Target, model: Model, lever: str) -> Loss:
    """A loss in nats a token: of the text's next tokens, or the divergence from ``model`` as it is now, a copy of it.

    Raises:
        OptionError: in the words of ``lever``: a model that predicts no next tokens.
    """
    if model.kind != "causal-lm":
        raise OptionError(
            f"{lever}: trains causal language models end to end, and {model.name} is of kind {model.kind}"
        )
    if target == "text":
        return _next_tokens
    teacher = copy.deepcopy(model.module).eval().requires_grad_(False)

    def divergence(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            wanted = _log_probabilities(teacher, batch[0])
        found = _log_probabilities(module, batch[0])
        return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    return divergence


def _next_tokens(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    ids = batch[0]
    return functional.nll_loss(_log_probabilities(module, ids[:, :-1]), ids[:, 1:].flatten())


def _log_probabilities(module: nn.Module, ids: Tensor) -> Tensor:
    return first_tensor(run(module, ids)).flatten(0, 1).float().log_softmax(-1)


def train(
    module: nn.Module,
    groups: Sequence[Group],
    windows: Tensor,
    loss: Loss,
    *,
    steps: int,
    batch: int,
    warmup: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    report: Report | None = None,
    callbacks: Sequence[Callback] = (),
    optimizer: Callable[[ParamsT], Optimizer] = torch.optim.AdamW,
    beside: Sequence[Tensor] = (),
) -> None:
    """Train the parameters of ``groups`` in place, for ``steps`` of AdamW along a cosine to a twentieth of each rate.

    Matrix products run in bfloat16 where the processor has them. Dropout, where the model has some, is off.

    Args:
        module: a causal language model that holds them.
        groups: what is trained.
        windows: (B, T) token ids, drawn in an order of ``seed``.
        loss: as `loss_towards` gives it.
        steps: of the optimizer.
        batch: windows a step.
        warmup: share of the steps in which rates rise.
        clip: largest norm of the gradient.
        seed: of the order.
        report: called with the steps done and all of them.
        callbacks: called after each step, in order.
        optimizer: made of the groups.
        beside: further tensors with a row a window, which the loss gets after the token ids.

    Raises:
        ModelError: a loss that is not finite.
    """
    parameters = [
        {"params": list(g.parameters), "lr": g.rate, "lr_scale": g.rate, "weight_decay": g.decay}
        for g in groups
        if g.parameters and g.rate > 0
    ]
    if not parameters or steps < 1:
        return
    trained = [parameter for group in parameters for parameter in group["params"]]  # type: ignore[attr-defined]
    with only(module, trained), _evaluating(module) as still:
        trainer = Trainer(
            still, optimizer(parameters), Samples(windows, *beside, seed=seed), batch=min(batch, len(windows)),
            loss=lambda _, samples: loss(module, samples), schedule=cosine(steps, warmup * steps, floor=0.05),
            clip=clip, dtype="auto", callbacks=callbacks,
        )  # fmt: skip
        trainer.run(steps, report=None if report is None else lambda done, _: report(done, steps))


def mean_loss(module: nn.Module, windows: Tensor, loss: Loss, *, batch: int) -> float:
    """The mean of ``loss`` over ``windows``, in the precision that `train` computes in."""
    dtype = native_dtype(device_of(module).type)
    total = 0.0
    with looking(module, dtype):
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            total += len(part) * float(loss(module, (part,)))
    return total / len(windows)


@contextmanager
def only(module: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """For a while nothing but ``trained`` asks for gradients, and gradients are on."""
    wanted = {id(parameter) for parameter in trained}
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
            parameter.grad = None


class _Still(nn.Module):
    """A module in evaluation mode that stays in it: the noise of dropout would come from no seed of ours."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> _Still:
        self.training = mode  # and leave the module alone
        return self


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield _Still(module)
    finally:
        for part in training:
            part.training = True


def divided(windows: Tensor, validation: int, lever: str) -> tuple[Tensor, Tensor]:
    """Windows to train on, and the last ``validation`` of them to choose by: (B - validation, ...), (validation, ...).

    Raises:
        DataError: in the words of ``lever``: none is left to train on.
    """
    if len(windows) <= validation:
        raise DataError(
            f"{lever}: {len(windows)} calibration windows, {validation} of them to choose by; give more data, "
            f"or a smaller validation"
        )
    return windows[: len(windows) - validation], windows[len(windows) - validation :]
