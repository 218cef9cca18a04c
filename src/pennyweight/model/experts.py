"""Experts held in one stacked tensor, taken apart into layers of their own.

``transformers`` keeps the experts of a mixture as 3-D parameters and reads them itself, so that no layer of an expert
can be hooked or replaced. `split_experts` puts one small module an expert there: the same function, with layers that
calibration, levers and files treat like any other.

Shape letters: E experts, T tokens, K experts a token, H hidden width, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.model.sites import expert_stacks


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate."""

    def __init__(self, up: nn.Module, down: nn.Module, act_fn: nn.Module, gate: nn.Module | None = None) -> None:
        super().__init__()
        if gate is not None:
            self.gate_proj = gate
        self.up_proj, self.down_proj, self.act_fn = up, down, act_fn

    def forward(self, x: Tensor) -> Tensor:  # (T, H) -> (T, H)
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
        return self.down_proj(self.act_fn(self.up_proj(x)))  # type: ignore[no-any-return]


class SplitExperts(nn.ModuleList):
    """Experts in a list, called as the stacked module was."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts: (T, H), (T, K), (T, K) -> (T, H)."""
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, rank = torch.where(top_k_index == index)
            if len(token):
                share = top_k_weights[token, rank, None]
                total.index_add_(0, token, (expert(hidden_states[token]) * share).to(total.dtype))
        return total


def split_experts(module: nn.Module) -> tuple[str, ...]:
    """Replace every stacked module of experts in ``module`` by a `SplitExperts` of the same function.

    Returns:
        The paths that were changed, in order; empty for a model without stacked experts.

    Raises:
        ModelError: experts that do more than ``down(act(gate(x)) * up(x))``; nothing is changed then.
    """
    made = {
        path: _split(path, layer, stacks) for path, layer in module.named_modules() if (stacks := expert_stacks(layer))
    }
    for path, experts in made.items():
        module.set_submodule(path, experts)
    return tuple(made)


def _split(path: str, layer: nn.Module, stacks: dict[str, nn.Parameter]) -> SplitExperts:
    names = set(stacks)
    ungated = names == {"up_proj", "down_proj"}
    if not (ungated or names == {"gate_up_proj", "down_proj"}) or not _is_plain(layer, ungated):
        raise ModelError(
            f"{path}: {type(layer).__name__} with {', '.join(sorted(names))} does more than "
            "down(act(gate(x)) * up(x)); leave its experts dense"
        )
    act_fn: nn.Module = layer.act_fn  # type: ignore[assignment]
    experts = []
    for index in range(stacks["down_proj"].shape[0]):
        first, *second = _linears(layer, "up_proj" if ungated else "gate_up_proj", index)
        (down,) = _linears(layer, "down_proj", index)
        experts.append(Expert(second[0], down, act_fn, gate=first) if second else Expert(first, down, act_fn))
    return SplitExperts(experts).train(layer.training)


def _is_plain(layer: nn.Module, ungated: bool) -> bool:
    """Whether gate and up lie one behind the other, and meet in the product alone."""
    act_fn: Callable[[Tensor], Tensor] | None = getattr(layer, "act_fn", None)
    if act_fn is None or getattr(layer, "has_post_expert_norm", False):
        return False
    if ungated:
        return True
    if not getattr(layer, "is_concatenated", True):
        return False
    combine = getattr(layer, "_apply_gate", None)
    if combine is None:
        return True
    # the one part that a class may override: ask it rather than trust it
    probe = torch.linspace(-9, 9, 64).reshape(2, 32)
    gate, up = probe.chunk(2, dim=-1)
    return bool(torch.allclose(combine(probe), act_fn(gate) * up))


def _linears(layer: nn.Module, name: str, index: int) -> list[nn.Linear]:
    """The one or two (gate and up) linear layers in slice ``index`` of the stack ``name``, copied."""
    stack: Tensor = getattr(layer, name)
    matrix = stack[index]
    matrix = matrix.T if getattr(layer, "is_transposed", False) else matrix
    bias: Tensor | None = getattr(layer, f"{name}_bias", None)
    parts = 2 if name == "gate_up_proj" else 1
    biases = bias[index].chunk(parts) if bias is not None else (None,) * parts
    return [_linear(m, b) for m, b in zip(matrix.chunk(parts), biases, strict=True)]


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, dtype=matrix.dtype)
    made.weight = nn.Parameter(matrix.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
