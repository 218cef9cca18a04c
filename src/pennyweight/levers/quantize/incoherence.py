"""Two bits a weight in a random basis, on a lattice, with error feedback (QuIP#).

Source: A. Tseng, J. Chee, Q. Sun, V. Kuleshov and C. De Sa, "QuIP#: Even Better LLM Quantization with Hadamard
Incoherence and Lattice Codebooks", arXiv:2402.04396: both sides of the matrix are rotated by random signs and a
Hadamard transform, so that no entry and no input stands out; eight weights at a time become a point of the E8P codebook
while later columns make each error good (block LDLQ); at 4 bits a second, finer code holds what the first left. Differs
from the source: the scale is searched on a sample of the vectors, not fixed; no fine-tuning follows (see the repair
stage); there is no code of 3 bits.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.lever import at_least, lever, one_of, option
from pennyweight.solvers.factor import factorize
from pennyweight.solvers.inputs import matrix_of, second_moment_of, without_dead
from pennyweight.solvers.vectors import solve_vectors
from pennyweight.statistics import Statistics
from pennyweight.weights import Lattice, Product, Rotation, Sum, Weight
from pennyweight.weights.lattice import SIZE, nearest_codes, points, stored

_SAMPLE = 4096
#: Root mean square of a matrix on the lattice, as tried; the source takes 1.03 for Gaussian entries.
_SPREADS = (0.85, 0.91, 0.97, 1.03, 1.09)
_FINER = 3.45  # how much finer the second code is, as in the source


@lever(
    "quantize.incoherence",
    reach="weight",
    needs=("second_moment",),
    paper="QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks, arXiv:2402.04396",
)
@dataclass(frozen=True, kw_only=True)
class Incoherence:
    """Rotate at random, round eight weights at a time to a lattice, make errors good: for two bits a weight."""

    bits: int = option(2, one_of(2, 4), "bits of a weight; 4: the second two hold what the first left over")
    rotate: bool = option(True, one_of(True, False), "flip signs and transform both sides; false: the basis as it is")
    seed: int = option(0, at_least(0), "of the signs")
    damping: float = option(0.01, at_least(0), "added to the diagonal of the second moment, as a share of its mean")

    def solve(self, weight: Weight, statistics: Statistics) -> Weight:
        return self.solve_group([weight], statistics)[0]

    @torch.no_grad()
    def solve_group(self, weights: Sequence[Weight], statistics: Statistics) -> list[Weight]:
        """Several weights that read the same inputs: their second moment is rotated and factored once."""
        matrices = [matrix_of(weight, "quantize.incoherence") for weight in weights]
        width = matrices[0].shape[1]
        moment = second_moment_of(statistics, width, "quantize.incoherence")
        matrices = without_dead(matrices, moment.diagonal())
        turn = self._turn(width)
        if self.rotate:
            moment = turn(turn(moment.float()).T)
            matrices = [turn(matrix) for matrix in matrices]
        lower = factorize(moment, damping=self.damping, where="quantize.incoherence").lower
        found = []
        for matrix in matrices:
            back = self._turn(matrix.shape[0])
            core = self._rounded(back(matrix.T).T if self.rotate else matrix, lower)
            found.append(Product(back.T, core, turn) if self.rotate else core)
        return found

    def _turn(self, width: int) -> Rotation:
        return Rotation.random(width, torch.Generator().manual_seed(self.seed))

    def _rounded(self, matrix: Tensor, lower: Tensor) -> Weight:
        scale = _scale(matrix)
        columns = (matrix / scale).T.contiguous()  # (N, M)
        first = torch.empty(matrix.shape[0], -(-matrix.shape[1] // SIZE), dtype=torch.int16)
        second = torch.empty_like(first)

        def settle(start: int, values: Tensor) -> Tensor:
            vectors = torch.nn.functional.pad(values.T, (0, SIZE - len(values)))
            codes = nearest_codes(vectors)
            found = points()[codes]
            first[:, start // SIZE] = stored(codes)
            if self.bits == 4:
                codes = nearest_codes((vectors - found) * _FINER)
                found = found + points()[codes] / _FINER
                second[:, start // SIZE] = stored(codes)
            return found[:, : len(values)].T

        solve_vectors(columns, lower, SIZE, settle)
        rough = Lattice(first, scale, columns=matrix.shape[1])
        return rough if self.bits == 2 else Sum(rough, Lattice(second, scale / _FINER, columns=matrix.shape[1]))

    @classmethod
    def candidates(cls, shape: tuple[int, int]) -> Iterator[Incoherence]:
        for bits in (2, 4):
            yield cls(bits=bits)


def _scale(matrix: Tensor) -> Tensor:
    """(1,) float32, the scale under which a sample of the vectors of ``matrix`` (M, N) is rounded best."""
    flat = matrix.reshape(-1)
    flat = flat[: flat.numel() // SIZE * SIZE].view(-1, SIZE)
    vectors = flat[:: max(1, len(flat) // _SAMPLE)]
    spread = vectors.square().mean().sqrt()
    if not bool(spread > 0):  # no point is zero: make all of them nothing
        return torch.full((1,), torch.finfo(torch.float32).tiny)

    def loss(unit: Tensor) -> float:
        x = vectors / unit
        return float((points()[nearest_codes(x)] - x).square().sum() * unit.square())

    return min((spread / size for size in _SPREADS), key=loss).reshape(1)
