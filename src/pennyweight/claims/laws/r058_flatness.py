"""Row 58, flatness: at its optimum a model's Hessian trace is its Fisher trace, and not before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.measure import fisher_trace, flatness

_CLASSES, _SYMBOLS = 8, 12


class _Table(nn.Module):
    """A bigram model through a narrow hidden layer: over-parametrized where the table is simple."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(_SYMBOLS, 24, generator=g) * 0.5)
        self.out = nn.Parameter(torch.randn(24, _CLASSES, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = torch.tanh(self.into[x]) @ self.out
        return logits


def _expected(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy under the true conditional: the population loss, with no sampling noise left."""
    inputs, truth = data
    found: Tensor = -(truth * module(inputs).log_softmax(-1)).sum(-1).mean()
    return found


@claim(
    row=58,
    pace="quick",
    headline="at one loss the flatter model transfers better (abstract; no figure)",
)
@tiny.one_thread()
def hessian_is_fisher_at_the_optimum(assets: Assets) -> Outcome:
    """A bigram model with a known truth: as it starts, and at its optimum; gaps relative to the Fisher trace."""
    g = torch.Generator().manual_seed(0)
    truth = torch.softmax(1.5 * torch.randn(_SYMBOLS, _CLASSES, generator=g), -1)
    data = torch.arange(_SYMBOLS), truth
    module = _Table(g)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    gaps: list[tuple[float, float]] = []

    def note() -> None:
        hessian = flatness(module, data, 1000, loss=_expected)
        fisher = fisher_trace(module, data, 1000)
        error = (hessian.standard_error**2 + fisher.standard_error**2) ** 0.5
        gaps.append((abs(hessian.trace - fisher.trace) / fisher.trace, error / fisher.trace))

    for step in range(3000):
        if step == 0:
            note()
        optimizer.zero_grad()
        _expected(module, data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    note()
    excess = float((_expected(module, data) + (truth * truth.log()).sum(-1).mean()).detach())
    (early, _), (late, error) = gaps
    return Outcome(
        method=late,
        baseline=early,
        unit="relative gap between Hessian and Fisher trace",
        holds=late < 3 * error and early > 3 * late,
        control=("three standard errors of the gap at the optimum", 3 * error),
        interval=(max(0.0, late - 1.96 * error), late + 1.96 * error),
        notes=f"excess loss at the optimum {excess:.1e} nats; that flat models transfer better is not claimed here",
    )
