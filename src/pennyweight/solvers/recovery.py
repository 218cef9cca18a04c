"""Recovery of a shrunk language model: it learns what the original expected of the same text.

Source: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679
(after structured pruning, the original's distributions alone as the target). Differs from the source: embedding and
head stay as they are, so that the original runs once over the text and its states before the head are kept, which is
less than its logits by far.

Shape letters: C windows, T tokens, R positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import device_of, looking, native_dtype
from pennyweight.evaluate.logits import states_before
from pennyweight.model import anatomy
from pennyweight.solvers.end_to_end import Group, train

_POSITIONS = 128  # at a time: their logits are 25 MB for a vocabulary of 49,152


class Divergence(torch.autograd.Function):
    """Mean KL divergence in nats of positions (R, D) from others (R, D) behind one head (V, D), without its logits.

    No more than a few positions' logits exist at a time; the gradient, ``(q - p) @ head``, is made on the way forward.
    The head gets none.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, head: Tensor) -> Tensor:
        """The divergence; ``wanted`` are the original's states."""
        total, gradient = 0.0, torch.empty_like(states)
        for start in range(0, len(states), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            found = (states[rows].to(head.dtype) @ head.T).float().log_softmax(-1)
            expected = (wanted[rows].to(head.dtype) @ head.T).float().log_softmax(-1)
            share = expected.exp()
            total += float((share * (expected - found)).sum())
            gradient[rows] = ((found.exp() - share).to(head.dtype) @ head).to(states.dtype)
        ctx.save_for_backward(gradient / len(states))
        return torch.tensor(total / len(states), device=states.device)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the states alone."""
        (gradient,) = ctx.saved_tensors
        return scale * gradient, None, None


def head_of(module: nn.Module) -> nn.Linear:
    """The layer that makes logits of states.

    Raises:
        ModelError: none, or one that is no plain matrix.
    """
    found = anatomy.of(module).head
    head = module.get_submodule(found.path) if found is not None else None
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"recovery: {type(module).__name__} has no plain matrix as its head over a vocabulary")
    return head


def states_of(module: nn.Module, windows: Tensor, *, batch: int = 4) -> Tensor:
    """(C, T, D) what reaches the head of ``module`` on ``windows`` (C, T).

    Products run in bfloat16 where the processor has it.

    Raises:
        ModelError: no head, or one that does not take a state a token.
    """
    with looking(module, native_dtype(device_of(module).type)):
        starts = range(0, len(windows), batch)
        return torch.cat([_states(module, windows[start : start + batch]) for start in starts])


def _states(module: nn.Module, ids: Tensor) -> Tensor:
    found = states_before(module, head_of(module), ids)
    if found is None:
        raise ModelError(f"recovery: the head of {type(module).__name__} does not take one state a token")
    return found


def recover(
    module: nn.Module,
    windows: Tensor,
    states: Tensor,
    *,
    steps: int,
    batch: int = 2,
    rate: float = 3e-4,
    warmup: float = 0.1,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Train ``module`` in place towards the model whose ``states`` are given: all but its embedding and head.

    Args:
        module: a shrunk causal language model with the original's embedding, head and width.
        windows: (C, T) token ids.
        states: (C, T, D) of the original on them, from `states_of`.
        steps: of AdamW, along a cosine.
        batch: windows a step.
        rate: at its peak.
        warmup: share of the steps in which it rises.
        seed: of the order of windows.
        report: called with the steps done and all of them.

    Raises:
        OptionError: states of other windows or another width.
    """
    head = head_of(module)
    if states.shape != (*windows.shape, head.in_features):
        raise OptionError(
            f"recovery: states {tuple(states.shape)} for windows {tuple(windows.shape)} and a head of "
            f"{head.in_features} inputs; give those of the original, whose head is as wide as this model's"
        )
    fixed = head.weight.detach().to(native_dtype(head.weight.device.type))

    def loss(model: nn.Module, part: tuple[Tensor, ...]) -> Tensor:
        found = _states(model, part[0])
        rows, wanted = found.flatten(0, 1), part[1].flatten(0, 1)
        divergence: Tensor = Divergence.apply(rows, wanted, fixed)  # type: ignore[no-untyped-call]  # torch's own
        return divergence

    ends = (anatomy.of(module).embedding, anatomy.of(module).head)
    kept = {id(value) for one in ends if one is not None for value in module.get_submodule(one.path).parameters()}
    trained = [value for value in module.parameters() if id(value) not in kept]
    train(
        module, [Group(trained, rate)], windows, loss, steps=steps, batch=batch, warmup=warmup, clip=1.0, seed=seed,
        beside=[states], report=report,
    )  # fmt: skip
