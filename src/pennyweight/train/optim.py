"""AdamP and SGDP: momentum optimizers whose steps do not inflate scale-invariant weights.

Row 60. Source: B. Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
arXiv:2006.08217, and its official implementation, whose update this follows number by number.

A weight behind a normalization can be scaled without changing the loss, so its gradient is orthogonal to it. Momentum
is not: it sums gradients of earlier weights, each step lengthens the weight, and the *effective* step, measured on the
direction of the weight, decays sooner than the schedule says. Both optimizers take the radial part out of the step of
those weights that look scale-invariant, and of no others.

Shape letters: R rows of a view (output channels, or 1), K entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pennyweight.elementwise import numbers
from pennyweight.errors import OptionError


class _Projected(Optimizer):
    """What both share: the walk over parameters, the projection and the decoupled weight decay."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    raise OptionError(f"{type(self).__name__}: sparse gradients; use SparseAdam for that parameter")
                direction, rate = self._direction(weight, weight.grad, self.state[weight], group)
                decay = group["weight_decay"] * group["lr"] * self._decay_factor(group)
                # 1-D parameters (biases, gains) are never projected
                if weight.ndim > 1 and _project(direction, weight, weight.grad, group["delta"], group["eps"]):
                    decay *= group["wd_ratio"]
                if decay:
                    weight.mul_(1 - decay)
                weight.add_(direction, alpha=-rate)
        return loss

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """The step before projection, which is done in its memory, and what it is multiplied by."""
        raise NotImplementedError  # each optimizer of this file has its own; the base is never made

    def _decay_factor(self, group: dict[str, Any]) -> float:
        return 1.0


class AdamP(_Projected):
    """Adam without the radial part of its steps on scale-invariant weights; decoupled weight decay as in AdamW.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the running means of gradients and of their squares.
        eps: added to the denominator, and to norms.
        weight_decay: decoupled; times ``wd_ratio`` for weights that were projected.
        delta: a weight counts as scale-invariant while |cos(gradient, weight)| of every row is below
            ``delta / sqrt(K)``.
        wd_ratio: see ``weight_decay``.
        nesterov: look ahead with the current gradient.

    Raises:
        OptionError: a number outside its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise OptionError(f"AdamP: betas {betas}; give two numbers from 0 up to, not including, 1")
        _check("AdamP", lr=lr, eps=eps, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta}
        super().__init__(params, {**options, "wd_ratio": wd_ratio, "nesterov": nesterov})

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        (beta1, beta2), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        ahead = mean.mul(beta1).add_(grad, alpha=1 - beta1) if group["nesterov"] else mean
        return ahead / scale, group["lr"] / (1 - beta1 ** state["step"])


class SGDP(_Projected):
    """SGD with momentum, without the radial part of its steps on scale-invariant weights; decoupled weight decay.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of the running sum of gradients. Without it gradients are orthogonal already, and this is SGD.
        dampening: share of each gradient left out of the sum.
        weight_decay: decoupled, divided by ``1 - momentum``, so that it weighs as much as in SGD; times ``wd_ratio``
            for weights that were projected.
        nesterov: look ahead with the current gradient.
        eps: added to norms.
        delta: see `AdamP`.
        wd_ratio: see ``weight_decay``.

    Raises:
        OptionError: a number outside its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        if not 0 <= momentum < 1:
            raise OptionError(f"SGDP: momentum {momentum}; give a number from 0 up to, not including, 1")
        _check("SGDP", lr=lr, eps=eps, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**options, "nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio})

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        summed = state["momentum"].mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
        # without look-ahead the sum itself is handed out and projected: the official code does so, the paper's
        # algorithm projects a copy (its norms on the toy of the tests: 3.095 after 20 steps, the official 3.231)
        return grad.add(summed, alpha=group["momentum"]) if group["nesterov"] else summed, group["lr"]

    def _decay_factor(self, group: dict[str, Any]) -> float:
        return float(1 / (1 - group["momentum"]))


def _project(direction: Tensor, weight: Tensor, grad: Tensor, delta: float, eps: float) -> bool:
    """Take the part along ``weight`` out of ``direction``, in place, if the weight looks scale-invariant.

    First by output channel, then as a whole: the first view in which every row's *gradient* (not the momentum) is
    orthogonal enough to the weight is the one projected in.
    """
    for start in (1, 0):
        rows = weight.flatten(start).view(weight.shape[0] if start else 1, -1)  # (R, K)
        slopes, steps = grad.reshape(rows.shape), direction.reshape(rows.shape)
        cosine = functional.cosine_similarity(slopes, rows, dim=1, eps=eps).abs()
        if cosine.max() < delta / math.sqrt(rows.shape[1]):
            unit = rows / rows.norm(dim=1, keepdim=True).add_(eps)
            direction.copy_((steps - unit * (unit * steps).sum(1, keepdim=True)).view_as(direction))
            return True
    return False


class EffectiveSteps:
    """How far weights turn, |w'/|w'| - w/|w|| between two looks, and their norms: of weights of 2 and more dims.

    A callback of `Trainer`, or call ``step()`` after each step of an optimizer.

    Attributes:
        norms: name -> the norm at each look, the first at the start.
        turns: name -> the effective step between looks; one fewer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.ndim > 1}
        if not self._weights:
            raise OptionError(f"effective_step: {type(module).__name__} has no weight of two dimensions or more")
        self.norms: dict[str, list[float]] = {name: [] for name in self._weights}
        self.turns: dict[str, list[float]] = {name: [] for name in self._weights}
        self._directions: dict[str, Tensor] = {}
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Look now."""
        for name, weight in self._weights.items():
            norm = weight.norm()
            direction = weight / norm
            if name in self._directions:
                self.turns[name].append(float((direction - self._directions[name]).norm()))
            self._directions[name] = direction
            self.norms[name].append(float(norm))

    def growth(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Last norm / first norm of each weight."""
        return {name: self.norms[name][-1] / self.norms[name][0] for name in (names or self.norms)}


def effective_step(model: nn.Module) -> EffectiveSteps:
    """Watch norms and effective steps of the weights of ``model`` from now on; see `EffectiveSteps`.

    Raises:
        OptionError: no weight of two dimensions or more.
    """
    return EffectiveSteps(model)


def _check(name: str, **options: float) -> None:
    numbers(name, **options)
    for option, value in options.items():
        if not 0 <= value < math.inf:
            raise OptionError(f"{name}: {option} = {value}; give a finite number of 0 or more")
