"""Expert Merging: how much of each expert goes into each tensor, learned from a few unlabelled samples.

Row 10. Source: D. Zhang et al., "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking", arXiv:2509.25712, and its code: ``base + sum_k sigmoid(a_kl) tau_kl``, a the only parameters, trained
so that on samples of task k logits and hidden states are those of expert k; in the ++ stage important tensors are cut
into chunks with a coefficient each. Differs from the source: the importance of a tensor is that of a layer there;
nothing is dropped out.

Shape letters: E experts, C chunks of a tensor, W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pennyweight.errors import ModelError, OptionError
from pennyweight.model import anatomy


@dataclass(frozen=True)
class Learned:
    """A learned merge.

    Attributes:
        tensors: the merged parameters.
        coefficients: of each tensor: (E, C), between 0 and 1; those of no chunk stay at the initial value.
        losses: of each step.
    """

    tensors: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    losses: list[float]


def merge_experts(
    base: nn.Module,
    experts: Sequence[nn.Module],
    samples: Sequence[Tensor],
    *,
    initial: float = 0.1,
    rate: float = 0.5,
    epochs: int = 1,
    batch: int = 1,
    temperature: float = 1.0,
    hidden_weight: float = 0.1,
    regularization: float = 0.1,
    blocks: Sequence[int] | None = None,
    chunks: Mapping[str, int] | None = None,
    shares: Sequence[float] | None = None,
) -> Learned:
    """Learn coefficients that make the merged model behave like each expert on that expert's samples.

    Args:
        base: what the experts came from; a model of token ids (W, T) with repeated blocks. Nothing given is changed.
        experts: E of them.
        samples: windows (W, T) of each expert's task, unlabelled; the paper takes 5 to 10.
        initial: value of the coefficients, and what they are drawn to.
        rate: of the optimizer, in logits of the coefficients.
        epochs: passes over the samples.
        batch: windows of each task a step; the source accumulates the gradients of several, too.
        temperature: of the soft labels.
        hidden_weight: of the mean squared error of hidden states.
        regularization: of the mean distance to ``initial``.
        blocks: whose outputs are aligned; None for the middle one.
        chunks: coefficients of each tensor, see `importance_chunks`; 0 for a fixed one; None for 1 each.
        shares: how much each task counts; None for 1 each.

    Raises:
        OptionError: numbers out of range, or as many samples as there are no experts.
        ModelError: experts of another shape.
    """
    if not experts or len(samples) != len(experts) or (shares is not None and len(shares) != len(experts)):
        raise OptionError(f"merge_experts: {len(experts)} experts, {len(samples)} sets of samples; give one for each")
    if (
        not 0 < initial < 1
        or rate <= 0
        or temperature <= 0
        or min(epochs, batch) < 1
        or hidden_weight < 0
        or regularization < 0
    ):
        raise OptionError(
            f"merge_experts: initial {initial}, rate {rate}, temperature {temperature}, epochs {epochs}, "
            f"batch {batch}, weights {hidden_weight}, {regularization}; "
            "give an initial value between 0 and 1, numbers above 0, weights of 0 or more"
        )
    origin = {name: one.detach() for name, one in base.named_parameters()}
    deltas = {name: _deltas(name, one, experts) for name, one in origin.items()}
    counts = {name: 1 if chunks is None else chunks.get(name, 0) for name in origin}
    start = torch.tensor(initial).logit()
    logits = {name: start.repeat(len(experts), n).requires_grad_() for name, n in counts.items() if n}
    if not logits:
        raise OptionError("merge_experts: no tensor has a chunk; give a larger budget")
    paths = [block.path for block in anatomy.of(base).blocks]
    watched = [paths[n] for n in ([len(paths) // 2] if blocks is None else blocks)]
    with torch.no_grad():
        taught = [_watched(expert, windows, watched) for expert, windows in zip(experts, samples, strict=True)]

    def merged() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = {n: logits[n].sigmoid() if n in logits else torch.full((len(experts), 1), initial) for n in origin}
        return {name: one + scaled(deltas[name], found[name]) for name, one in origin.items()}, found

    optimizer = torch.optim.Adam(list(logits.values()), lr=rate)
    weights = shares or [1.0] * len(experts)
    losses = []
    for step in range(epochs * -(-max(len(windows) for windows in samples) // batch)):
        tensors, coefficients = merged()
        loss = torch.zeros(())
        for task, windows in enumerate(samples):
            at = (step * batch + torch.arange(min(batch, len(windows)))) % len(windows)
            found, hidden = _watched(base, windows[at], watched, tensors)
            wanted, theirs = taught[task]
            aligned = soft_cross_entropy(found, wanted[at], temperature)
            if watched and hidden_weight:
                errors = [functional.mse_loss(one, other[at]) for one, other in zip(hidden, theirs, strict=True)]
                aligned = aligned + hidden_weight * torch.stack(errors).mean()
            loss = loss + weights[task] * aligned / len(samples)
        count = sum(len(one.flatten()) for one in logits.values())
        drawn = sum(((coefficients[name] - initial).abs().sum() for name in logits), torch.zeros(())) / count
        loss = loss + regularization * drawn
        gradients = torch.autograd.grad(loss, list(logits.values()))
        for one, gradient in zip(logits.values(), gradients, strict=True):
            one.grad = gradient
        nn.utils.clip_grad_norm_(list(logits.values()), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        tensors, coefficients = merged()
    return Learned(tensors, {name: one.detach() for name, one in coefficients.items()}, losses)


def importance_chunks(
    base: nn.Module, experts: Sequence[nn.Module], learned: Learned, *, budget: int, power: float = 0.5
) -> dict[str, int]:
    """How many coefficients each tensor deserves: ``floor(budget * I^power / sum I^power)``.

    Args:
        base: as in `merge_experts`.
        experts: as there.
        learned: of the first stage, one coefficient a tensor and expert.
        budget: coefficients an expert, in all.
        power: evens importance out below 1.

    ``I`` is ``sum_k |coefficient_k| * mean |tau_k| * elements``. Tensors of 0 keep the initial value.
    """
    importance = {}
    for name, one in base.named_parameters():
        strength = learned.coefficients[name].abs().mean(1)  # (E,)
        sizes = _deltas(name, one.detach(), experts).abs().flatten(1).mean(1)
        importance[name] = float((strength * sizes).sum()) * one.numel()
    total = sum(value**power for value in importance.values()) or 1.0
    most = {name: one.numel() for name, one in base.named_parameters()}
    return {name: min(most[name], int(budget * value**power / total)) for name, value in importance.items()}


def scaled(deltas: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_k c_k delta_k`` of deltas (E, ...), each flattened into C chunks of their own coefficient (E, C)."""
    experts, chunks = coefficients.shape
    flat = deltas.reshape(experts, -1)
    size = -(-flat.shape[1] // chunks)
    spread = coefficients.repeat_interleave(size, 1)[:, : flat.shape[1]]
    return (flat * spread).sum(0).reshape(deltas.shape[1:])


def soft_cross_entropy(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """``-T^2 sum p log q`` of logits (..., V), the mean over what comes before."""
    target = (wanted.detach() / temperature).softmax(-1)
    return -(target * (found / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2


def _deltas(name: str, base: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    others = [dict(expert.named_parameters()).get(name) for expert in experts]
    for other in others:
        if other is None or other.shape != base.shape:
            shape = "missing" if other is None else tuple(other.shape)
            raise ModelError(f"merge_experts: {name} is {tuple(base.shape)} in the base and {shape} in an expert")
    return torch.stack([other.detach() - base for other in others if other is not None])


def _watched(
    module: nn.Module, ids: Tensor, paths: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the outputs of the blocks at ``paths``."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, result: Tensor | tuple[Tensor, ...]) -> None:
            seen[path] = result if isinstance(result, Tensor) else result[0]

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        output = module(ids) if tensors is None else functional_call(module, dict(tensors), (ids,))
    finally:
        for handle in handles:
            handle.remove()
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits, [seen[path] for path in paths]
