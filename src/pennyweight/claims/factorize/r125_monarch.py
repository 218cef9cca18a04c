"""Row 125, Monarch: the closed form holds the Fourier transform; weighting by inputs lowers the outputs' error."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pennyweight.calibrate import collect
from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import gpt, held_out_losses, one_thread, trainer
from pennyweight.levers.factorize.monarch import MonarchProjection, drawn, multiply_out
from pennyweight.levers.factorize.svd import SVD
from pennyweight.model import anatomy
from pennyweight.train.schedules import cosine
from pennyweight.weights import Dense, LowRank, Monarch

_HEADLINE = "twice as fast to train at comparable quality (GPT-2, ViT); the projection of a dense matrix is closed form"


def fourier(root: int) -> Tensor:
    """The Fourier transform of ``root**2`` points as a real matrix (2 * root**2, 2 * root**2), in double.

    Rows: real parts, then imaginary ones. Columns: those of the points k, k + root, k + 2*root, ... side by side for
    each k, real and imaginary part in turn.
    """
    size = root * root
    angle = torch.arange(size, dtype=torch.float64)[:, None] * torch.arange(size, dtype=torch.float64) % size
    angle = angle.view(size, root, root).transpose(1, 2).reshape(size, size) * (2 * math.pi / size)
    real, imaginary = angle.cos(), -angle.sin()
    tops, bottoms = torch.stack([real, -imaginary], dim=-1), torch.stack([imaginary, real], dim=-1)
    return torch.cat([tops, bottoms]).flatten(1)


@claim(row=125, pace="quick", headline=_HEADLINE)
def monarch_holds_the_fourier_transform(assets: Assets) -> Outcome:
    """256 points: the closed form against a low rank of equal parameters; control: points in their natural order."""
    matrix = fourier(16)
    found = Monarch.nearest(matrix, blocks=16, rank=2)  # rank 1 over complex numbers
    params = found.cost().params
    plain = LowRank.nearest(matrix, params // sum(matrix.shape))
    assert plain.cost().params == params
    natural = torch.cat([matrix[:, at::32] for at in range(32)], dim=1)
    error, baseline = found.error(matrix), plain.error(matrix)
    return Outcome(
        method=error,
        baseline=baseline,
        unit="relative Frobenius error on the Fourier transform of 256 points",
        holds=error < 1e-10 * baseline,
        control=(
            "the same blocks on columns in another order",
            Monarch.nearest(natural, blocks=16, rank=2).error(natural),
        ),
        notes=f"{params / matrix.numel():.4g} of the parameters, both",
    )


@claim(row=125, pace="quick", headline=_HEADLINE)
def weighting_a_monarch_by_its_inputs_lowers_the_error_of_outputs(assets: Assets) -> Outcome:
    """Half the parameters of two blocks of MiniLM, held-out text; control: low rank, weighted, of equal parameters."""
    minilm = assets.minilm()
    seen = collect(minilm.model, minilm.windows("wiki", part="calibration", length=128, count=16))
    fresh = collect(minilm.model, minilm.windows("wiki", part="heldout", length=128, count=8, seed=1))
    rows = []
    for one, matrix in list(zip(minilm.maps("encoder"), minilm.matrices("encoder"), strict=True))[:12]:
        weight, known, judge = Dense(matrix), seen[one.name], fresh[one.name].second_moment
        rivals = [
            lever.solve(weight, known)
            for lever in (
                MonarchProjection(density=0.5),
                MonarchProjection(density=0.5, whiten=False),
                SVD(density=0.5),
            )
        ]
        assert rivals[0].cost() == rivals[1].cost()
        assert abs(rivals[2].cost().params / rivals[0].cost().params - 1) < 0.03
        rows.append([found.error(matrix, judge) for found in rivals])
    method, baseline, control = torch.tensor(rows).mean(0).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error of a map's outputs at half the parameters, held-out text, mean over maps",
        holds=method < 0.9 * baseline,
        control=("low rank of equal parameters, weighted too", control),
    )


def _sparse(width: int) -> nn.Module:
    """A GPT of bytes whose blocks hold random Monarch matrices of a quarter of the parameters."""
    module, g = gpt(width=width), torch.Generator().manual_seed(0)
    for one in anatomy.of(module).layers():
        if one.block is not None and one.kind != "embedding":
            rank = MonarchProjection(blocks=4, density=0.25).rank_for(one.shape)
            size = float(anatomy.matrix(module, one).square().mean().sqrt())
            anatomy.replace(module, one.path, drawn(one.shape, blocks=4, rank=rank, size=size, generator=g))
    return module


@claim(row=125, pace="quick", headline=_HEADLINE)
def a_monarch_goes_on_as_a_dense_network(assets: Assets) -> Outcome:
    """A GPT of bytes, 120 steps sparse, then 60 dense; baseline: all of them sparse; control: all dense."""
    with one_thread():

        def descend(module: nn.Module, steps: int, peak: float) -> float:
            trainer(module, cosine(steps, 10, peak=peak), batch=16).run(steps)
            return float(held_out_losses(module).mean())

        sparse = _sparse(64)
        before = descend(sparse, 120, 5e-3)
        multiply_out(sparse)
        at_once = float(held_out_losses(sparse).mean())
        method = descend(sparse, 60, 2.5e-3)
        going_on = _sparse(64)
        descend(going_on, 120, 5e-3)
        baseline = descend(going_on, 60, 2.5e-3)
        whole = gpt(width=64)
        descend(whole, 120, 5e-3)
        control = descend(whole, 60, 2.5e-3)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="nats a byte after 180 steps, held out",
        holds=abs(at_once - before) < 1e-4 and method < baseline,
        control=("dense from the start", control),
        notes=f"loss at the switch: {before:.6g} sparse, {at_once:.6g} dense",
    )
