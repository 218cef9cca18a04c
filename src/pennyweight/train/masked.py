"""Weights trained through masks: the rules by which gradients pass, and the masks of the layers of a model.

Rows 45, 48, 97, 140, 147 and 196. Sources, each at its rule below: straight-through masks with a decay of what is
pruned (SR-STE: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
arXiv:2102.04010), the same decay behind the momentum (W. Huang et al., arXiv:2407.20584), masks that fade in (A. R.
Bambhaniya et al., arXiv:2402.04744), patterns drawn from learned odds (G. Fang et al., arXiv:2409.17481), scores
trained through the choice they make (Y. Li et al., arXiv:2205.11005), and gates of known odds to be zero (C. Louizos
et al., "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312). Differs from the sources: every
rule is the identity, to the bit, where its mask is all ones.

Masks are True where a weight is kept. Shape letters: M out features, N in features, P patterns, m entries of a group;
... any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights import Dense

# ---- rules: what is computed with, and what gradient the weight gets


def hard(weight: Tensor, mask: Tensor) -> Tensor:
    """The kept entries; the others are zero and get no gradient."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """The kept entries; all get the gradient of what is computed with (STE)."""
    found: Tensor = _Through.apply(weight, mask, 0.0, 0.0)  # type: ignore[no-untyped-call]
    return found


def sr_ste(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """`straight_through`, and the gradient of a pruned entry has ``decay`` times the entry added (SR-STE)."""
    found: Tensor = _Through.apply(weight, mask, 0.0, decay)  # type: ignore[no-untyped-call]
    return found


def soft(weight: Tensor, mask: Tensor, leak: float, *, through: bool = False) -> Tensor:
    """The kept entries, and ``leak`` times the pruned ones (row 97).

    Args:
        weight: of any shape.
        mask: of the same.
        leak: 1 is dense, 0 is `hard`.
        through: give pruned entries the whole gradient, not ``leak`` times it.
    """
    if through:
        found: Tensor = _Through.apply(weight, mask, leak, 0.0)  # type: ignore[no-untyped-call]
        return found
    return torch.where(mask, weight, weight * leak)


class _Through(torch.autograd.Function):
    """Computes with the kept entries and ``leak`` times the others; passes gradients on, a decay added."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, leak: float, decay: float) -> Tensor:
        ctx.save_for_backward(*((weight, mask) if decay else ()))
        ctx.decay = decay
        # a product is ten times as fast as a choice on a CPU
        return torch.where(mask, weight, weight * leak) if leak else weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            grad = torch.addcmul(grad, weight, (~mask).to(weight.dtype), value=ctx.decay)
        return grad, None, None, None


def score_through(scores: Tensor, mask: Tensor) -> Tensor:
    """``mask`` in numbers, chosen by ``scores`` of the same shape: they get its gradient as it is (rows 140, 251)."""
    found: Tensor = _ScoreThrough.apply(scores, mask)  # type: ignore[no-untyped-call]
    return found


class _ScoreThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gumbel_mask(
    logits: Tensor,  # (..., P)
    patterns: Tensor,  # (P, m)
    *,
    scale: float,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:  # (..., m)
    """Masks drawn softly: patterns in the proportions of a Gumbel softmax over ``scale * logits`` (row 45).

    Each mask sums to what the patterns sum to; it becomes one of them, drawn with the odds of
    ``softmax(scale * logits)``, as the temperature goes to 0. Gradients reach the logits as they are.

    Args:
        logits: of each group.
        patterns: the masks that are allowed, as numbers.
        scale: of the logits; small steps of an optimizer need a large one.
        temperature: above 0.
        generator: of the draw, on the logits' device; None draws nothing, which is the softmax itself.
    """
    by_pattern = logits.movedim(-1, 0)  # (P, ...): a softmax over the last of few places takes ten times as long
    wanted = by_pattern * (scale / temperature)
    if generator is not None:
        tiny = torch.finfo(logits.dtype).tiny
        noise = torch.rand(by_pattern.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        noise.clamp_(min=tiny).log_().neg_().clamp_(min=tiny).log_()
        wanted = wanted.sub(noise, alpha=1 / temperature)
    shares = wanted.softmax(0).reshape(len(patterns), -1)  # (P, groups)
    return (patterns.to(logits.dtype).T @ shares).T.view(*logits.shape[:-1], -1)


def patterns_of(kept: int, of: int) -> Tensor:
    """(P, of) bool: every way to keep ``kept`` of ``of``, in the order of the places kept.

    Raises:
        OptionError: none, or more ways than can be told apart one by one (256).
    """
    if not 0 < kept <= of or math.comb(of, kept) > 256:
        raise OptionError(f"patterns of {kept}:{of}; give 0 < kept <= of with 256 ways or fewer, such as 2:4")
    places = torch.combinations(torch.arange(of), kept)
    return torch.zeros(len(places), of, dtype=torch.bool).scatter_(1, places, True)


# ---- hard-concrete gates (row 147)

#: The stretched interval that is clamped to 0 to 1, and the temperature; those of the source.
STRETCH, TEMPERATURE = (-0.1, 1.1), 2 / 3


def hard_concrete(log_alpha: Tensor, *, generator: torch.Generator, temperature: float = TEMPERATURE) -> Tensor:
    """Gates drawn within 0 to 1, exactly 0 with the odds of ``1 - open_probability(log_alpha)``.

    Gradients reach ``log_alpha`` where a gate is neither 0 nor 1.
    """
    low, high = STRETCH
    eps = torch.finfo(log_alpha.dtype).eps
    shape, device = log_alpha.shape, log_alpha.device
    uniform = torch.rand(shape, generator=generator, dtype=log_alpha.dtype, device=device).clamp(eps, 1 - eps)
    drawn = ((uniform.log() - (-uniform).log1p() + log_alpha) / temperature).sigmoid()
    return (drawn * (high - low) + low).clamp(0, 1)


def open_probability(log_alpha: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """The odds that a gate of `hard_concrete` is not 0; their sum is the expected number of open ones, the L0 norm."""
    low, high = STRETCH
    return (log_alpha - temperature * math.log(-low / high)).sigmoid()


def settled_gates(log_alpha: Tensor, *, temperature: float = TEMPERATURE, sharpness: float = 0.8) -> Tensor:
    """Gates to use once trained, without a draw: as many are 0 as are expected to be, those of lowest ``log_alpha``.

    Args:
        log_alpha: (G,) gates among which the zeros are chosen.
        temperature: as trained.
        sharpness: the open ones are ``sigmoid(sharpness * log_alpha / temperature)``; 0.8 as in the source.
    """
    if log_alpha.ndim != 1:
        raise ShapeError(f"settled_gates: gates of shape {tuple(log_alpha.shape)}; give one row of them")
    closed = round(float((1 - open_probability(log_alpha, temperature=temperature)).sum()))
    found = (sharpness * log_alpha / temperature).sigmoid()
    lowest = log_alpha.detach().argsort(stable=True)[:closed]
    return found.index_fill(0, lowest, 0.0)


# ---- the masks of some layers

Rule = Literal["hard", "through", "sr-ste", "soft", "soft-through"]
_RULES = ("hard", "through", "sr-ste", "soft", "soft-through")


class Masked(nn.Module):
    """The parametrization of one weight: what its layer computes with, by a rule.

    Attributes:
        mask: of the weight's shape, True where kept; saved with the layer.
        held: with the rule "hard", what pruned entries were when they were pruned; saved too.
        rule: see the functions of this module.
        decay: of the rule "sr-ste".
        leak: of the rules "soft" and "soft-through".
    """

    mask: Tensor
    held: Tensor | None

    def __init__(self, weight: Tensor, rule: Rule = "hard", *, decay: float = 0.0, leak: float = 0.0) -> None:
        super().__init__()
        if rule not in _RULES:
            raise OptionError(f"masks: rule {rule!r}; give one of {', '.join(_RULES)}")
        self.rule, self.decay, self.leak = rule, decay, leak
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("held", weight.detach().clone() if rule == "hard" else None)

    def forward(self, weight: Tensor) -> Tensor:
        match self.rule:
            case "hard":
                return hard(weight, self.mask)
            case "through":
                return straight_through(weight, self.mask)
            case "sr-ste":
                return sr_ste(weight, self.mask, self.decay)
            case _:
                return soft(weight, self.mask, self.leak, through=self.rule == "soft-through")

    @torch.no_grad()
    def choose(self, weight: Tensor, mask: Tensor) -> None:
        """Take ``mask`` from now on."""
        self.mask.copy_(mask)
        if self.held is not None:
            self.held.copy_(weight)

    @torch.no_grad()
    def restore(self, weight: Tensor) -> None:
        """With the rule "hard", give pruned entries the value back that they had when they were pruned."""
        if self.held is not None:
            # momentum and weight decay move parameters without a gradient
            weight.copy_(torch.where(self.mask, weight, self.held))


class LayerMask(NamedTuple):
    """What the mask of one layer keeps.

    Attributes:
        name: of the layer: its place in the list.
        kept: weights.
        total: weights, pruned ones included.
    """

    name: str
    kept: int
    total: int


class Masks:
    """The masks of some layers while they are trained; in any training loop.

    A layer computes with its weight through a mask, by ``rule``. Parameters stay the objects they are, so that the
    optimizer may be made before or after. Masks are saved and loaded with the state dict of the module.

        masks = Masks(layers, "through")
        masks.choose([kept(matrix.abs()) for matrix in masks.matrices()])
        ...  # train
        masks.finish()

    Args:
        layers: modules with a ``weight``, or `Dense` weights; none twice, no weight shared between two.
        rule: how gradients pass; see the functions of this module.
        decay: of the rule "sr-ste".
        leak: of the rules "soft" and "soft-through".
        names: of the layers, for reports; None numbers them.
        where: named in errors.

    Raises:
        ShapeError: no layer, a layer without weight, or a weight that two layers share.
        OptionError: an unknown rule.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        rule: Rule = "hard",
        *,
        decay: float = 0.0,
        leak: float = 0.0,
        names: Sequence[str] | None = None,
        where: str = "masks",
    ) -> None:
        self.layers = list(layers)
        self._parameter = ["matrix" if isinstance(layer, Dense) else "weight" for layer in self.layers]
        weights = [getattr(layer, name, None) for layer, name in zip(self.layers, self._parameter, strict=True)]
        if not weights or not all(isinstance(weight, nn.Parameter) for weight in weights):
            raise ShapeError(f"{where}: give at least one layer, each with a weight of its own, such as nn.Linear")
        if len({id(weight) for weight in weights}) != len(weights):
            raise ShapeError(f"{where}: two of the layers share a weight; give one of them")
        self.names = list(names) if names is not None else [str(index) for index in range(len(weights))]
        assert len(self.names) == len(self.layers)
        self.parts = [Masked(weight, rule, decay=decay, leak=leak) for weight in weights]  # type: ignore[arg-type]
        self.parameters: list[nn.Parameter] = weights  # type: ignore[assignment]
        for layer, name, part in zip(self.layers, self._parameter, self.parts, strict=True):
            # safe without the check of torch, which runs the rule once more
            parametrize.register_parametrization(layer, name, part, unsafe=True)

    def __iter__(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its mask, which follows later choices."""
        return iter(zip(self.parameters, (part.mask for part in self.parts), strict=True))

    def matrices(self) -> list[Tensor]:
        """The weights as they are underneath, as (M, N) with the inputs last, detached."""
        return [self._flat(layer, weight.detach()) for layer, weight in zip(self.layers, self.parameters, strict=True)]

    def kept(self) -> list[Tensor]:
        """The masks as (M, N), of the same order as `matrices`."""
        return [self._flat(layer, part.mask) for layer, part in zip(self.layers, self.parts, strict=True)]

    def choose(self, masks: Sequence[Tensor]) -> int:
        """Take ``masks``, (M, N) each as `matrices` are; how many entries changed sides."""
        flipped = 0
        for layer, weight, part, mask in zip(self.layers, self.parameters, self.parts, masks, strict=True):
            flat = self._flat(layer, part.mask)
            if mask.shape != flat.shape or mask.dtype != torch.bool:
                raise ShapeError(f"masks: a {mask.dtype} mask {tuple(mask.shape)}; give bool {tuple(flat.shape)}")
            flipped += int((flat != mask).sum())
            part.choose(weight, mask.T if isinstance(layer, Conv1D) else mask.view(part.mask.shape))
        return flipped

    def set(self, *, decay: float | None = None, leak: float | None = None) -> None:
        """Change ``decay`` or ``leak`` from now on."""
        for part in self.parts:
            part.decay = part.decay if decay is None else decay
            part.leak = part.leak if leak is None else leak

    def restore(self) -> None:
        """Call after each step of the optimizer with the rule "hard": pruned entries stay what they were."""
        for weight, part in zip(self.parameters, self.parts, strict=True):
            part.restore(weight)

    @torch.no_grad()
    def clear_moments(self, optimizer: Optimizer) -> None:
        """Zero what ``optimizer`` remembers of pruned entries, so that one taken up again starts without a past."""
        for weight, mask in self:
            for held in optimizer.state.get(weight, {}).values():
                if isinstance(held, Tensor) and held.shape == mask.shape:
                    held.masked_fill_(~mask, 0)

    @property
    def sparsity(self) -> float:
        """Share of zeros in all the layers now."""
        report = self.report()
        return 1 - sum(one.kept for one in report) / sum(one.total for one in report)

    def report(self) -> list[LayerMask]:
        """What each layer keeps now."""
        return [
            LayerMask(name, int(part.mask.sum()), part.mask.numel())
            for name, part in zip(self.names, self.parts, strict=True)
        ]

    def finish(self) -> None:
        """Write the zeros into the weights and leave plain layers behind."""
        self.set(leak=0.0)
        for layer, name in zip(self.layers, self._parameter, strict=True):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)

    @staticmethod
    def _flat(layer: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.T if isinstance(layer, Conv1D) else tensor.flatten(1)


# ---- the decay behind the momentum (row 48)


class MaskedAdamW(Optimizer):
    """AdamW that draws pruned weights towards zero with a decay added to the first moment, not to the gradient.

    Row 48. Source: W. Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
    arXiv:2407.20584, and its official implementation. With m the running mean of gradients and S the pruned entries,
    ``u = m + mask_decay * w[S]`` is both what the weight moves along and what the second moment is made of (with no
    decay, too: its first steps are up to 1 / (1 - beta1) times as long as Adam's, so warm up). Differs from the source:
    its code negates an integer mask bit by bit, which pushes kept weights away from zero; here the decay reaches
    pruned entries alone, as the paper says. A parameter without a mask is updated as by ``torch.optim.AdamW``.

    Args:
        params: parameters or groups of them.
        masks: (parameter, mask) pairs such as `Masks`: masks are read at each step.
        lr: learning rate.
        betas: of the running means of gradients, and of the squares of u (of gradients where there is no mask).
        eps: added to the denominator.
        weight_decay: decoupled, of all weights of the group.
        mask_decay: see above.
        anneal: steps over which it rises from 0, as the paper has it; 0 for at once.

    Raises:
        OptionError: a number outside its range.
    """

    def __init__(
        self,
        params: ParamsT,
        masks: Iterable[tuple[nn.Parameter, Tensor]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mask_decay: float = 0.0,
        anneal: int = 0,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "mask_decay": mask_decay, "anneal": anneal}
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise OptionError(f"MaskedAdamW: {name} = {value}; give a finite number of 0 or more")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise OptionError(f"MaskedAdamW: betas {betas}; give two numbers from 0 up to, not including, 1")
        self._masks: Mapping[nn.Parameter, Tensor] = dict(masks)
        super().__init__(params, {**numbers, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, self.state[weight], group)
        return loss

    def _update(self, weight: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        assert weight.grad is not None
        state["step"] += 1
        (beta1, beta2), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(weight.grad, 1 - beta1)
        mask, update, squared = self._masks.get(weight), mean, weight.grad
        if mask is not None:
            done = (state["step"] - 1) / group["anneal"] if group["anneal"] else 1.0
            pull = group["mask_decay"] * min(1.0, done)
            update = squared = torch.addcmul(mean, weight, (~mask).to(weight.dtype), value=pull) if pull else mean
        square.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
        scale = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        weight.addcdiv_(update, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
