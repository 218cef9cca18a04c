"""Row 50, generative laws: a floor in the law predicts larger models; what it says of the entropy they say as well."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets

_SYMBOLS, _RANKS, _STEPS = 96, (1, 2, 3, 4, 6, 8, 12, 16, 24), 600
_HEADLINE = "power law plus constant over many orders of magnitude (abstract)"
_NEAR = 0.03  # nats, from the entropy


@cache
def _losses() -> tuple[list[tuple[float, float]], float]:
    """(parameters, loss) of trained bigram models of rising rank, and the entropy of the Markov source they learn."""
    g = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(_SYMBOLS, _SYMBOLS, generator=g, dtype=torch.float64))[0] for _ in (0, 1)
    )
    spectrum = 60.0 * torch.arange(1, _SYMBOLS + 1, dtype=torch.float64) ** -0.9  # structure at every scale, as in text
    chain = ((left * spectrum) @ right.T).softmax(-1)
    stationary = torch.linalg.matrix_power(chain, 4096)[0]
    joint = stationary[:, None] * chain
    entropy = float(-(joint * chain.log()).sum())
    points = []
    for rank in _RANKS:
        into, out = (
            (0.3 * torch.randn(_SYMBOLS, rank, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2)
        )
        bias = torch.zeros(_SYMBOLS, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam((into, out, bias), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):  # on the source itself, so that nothing but size is scarce
            loss = -(joint * (into @ out.T + bias).log_softmax(-1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        points.append((float(rank * 2 * _SYMBOLS + _SYMBOLS), float(loss.detach())))
    return points, entropy


@claim(row=50, pace="quick", headline=_HEADLINE)
@tiny.one_thread()
def a_floor_predicts_larger_models(assets: Assets) -> Outcome:
    """Nine factor models of a Markov source of known entropy, trained to convergence; the two largest are held out."""
    points, entropy = _losses()
    sizes, losses = np.array(points).T
    errors = {}
    for form in ("power_const", "power"):
        law = laws.fit((sizes[:-2], losses[:-2]), form, holdout=False)
        errors[form] = float(np.abs(np.asarray(law(sizes[-2:])) / losses[-2:] - 1).mean())
    same = float(np.abs(losses[-3] / losses[-2:] - 1).mean())
    return Outcome(
        method=errors["power_const"],
        baseline=errors["power"],
        unit="relative error on the two largest models, fitted without them",
        holds=errors["power_const"] < 0.7 * min(errors["power"], same),
        control=("the loss of the largest model fitted, unchanged", same),
        notes=f"entropy {entropy:.4f}; losses " + ", ".join(f"{int(n)}: {loss:.3f}" for n, loss in points),
    )


@claim(row=50, pace="quick", headline=_HEADLINE)
@tiny.one_thread()
def the_floor_is_nearer_to_the_entropy_than_the_largest_model(assets: Assets) -> Outcome:
    """The same models, all nine: the floor of their law, and the loss of the largest, beside the entropy."""
    points, entropy = _losses()
    sizes, losses = np.array(points).T
    found = laws.entropy_estimate((sizes, losses))
    gap, plain = abs(found.value - entropy), abs(float(losses[-1]) - entropy)
    (n, above), (m, below) = points[-2:]
    line = (m * below - n * above) / (m - n)  # straight in 1/size
    return Outcome(
        method=gap,
        baseline=plain,
        unit="nats from the true entropy",
        holds=gap < _NEAR and gap < plain,
        control=("a line in 1/size through the two largest models", abs(line - entropy)),
        notes=f"floor {found.value:.4f}, entropy {entropy:.4f}, largest model {losses[-1]:.4f}: the baseline as it is",
    )
