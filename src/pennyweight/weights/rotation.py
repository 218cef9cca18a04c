"""Random rotations that cost next to nothing: signs flipped, then a fast Hadamard transform.

Sources: N. Ailon and B. Chazelle, "The fast Johnson-Lindenstrauss transform and approximate nearest neighbors", SIAM J.
Comput. 39, 2009 (signs and a Hadamard transform); A. Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard
Incoherence and Lattice Codebooks", arXiv:2402.04396 (for weights). A width of 2^k * odd takes a Kronecker product: a
Hadamard matrix of order 2^j * odd that R. Paley's constructions ("On orthogonal matrices", J. Math. Phys. 12, 1933)
give over a prime field, times the transform of what is left of 2^k. Where they give none, the odd part is the Hartley
matrix, whose entries are no larger than sqrt(2) times those of a Hadamard matrix. Differs from the sources: QuIP#
tables a few orders, and falls back on a Fourier transform.

Shape letters: N features, C order of the core, B bytes of the signs; ... any leading dimensions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import ShapeError
from pennyweight.weights.packing import pack, packed_width, unpack
from pennyweight.weights.weight import Cost, Weight, form


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of ``order``, a multiple of 4, if one of Paley's constructions over a prime field gives it."""
    for prime, second in ((order - 1, False), (order // 2 - 1, True)):
        if prime < 3 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)) or prime % 4 != (3, 1)[second]:
            continue
        character = torch.full((prime,), -1.0, dtype=torch.float64)
        character[[i * i % prime for i in range(prime)]] = 1.0
        character[0] = 0.0
        place = torch.arange(prime)
        inner = character[(place[:, None] - place) % prime]
        edged = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
        edged[0, 0] = 0.0
        edged[1:, 1:] = inner
        if second:  # symmetric conference matrix: +-1 becomes a block of signs, 0 another
            eye = torch.eye(prime + 1, dtype=torch.float64)
            one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
            return torch.kron(edged, one) + torch.kron(eye, other)
        edged[1:, 0] = -1.0
        return edged + torch.eye(prime + 1, dtype=torch.float64)
    return None


@lru_cache(maxsize=64)
def core_of(width: int) -> tuple[Tensor, int]:
    """The core (C, C) of a transform of ``width`` features, orthonormal float64, and the stages k behind it."""
    odd, stages = width, 0
    while odd % 2 == 0:
        odd, stages = odd // 2, stages + 1
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), stages
    for taken in range(2, min(stages, 5) + 1):  # beyond 32 * odd the core costs more than it spreads
        found = _paley(odd << taken)
        if found is not None:
            return found / math.sqrt(odd << taken), stages - taken
    angle = 2 * math.pi * torch.outer(torch.arange(odd), torch.arange(odd)).remainder(odd).double() / odd
    return (angle.cos() + angle.sin()) / math.sqrt(odd), stages


@form("rotation")
class Rotation(Weight):
    """An orthogonal matrix (N, N): signs, then a Hadamard transform; ``W = H diag(signs)``, or its transpose.

    Args:
        signs: (B,) uint8, a bit for each feature, 1 = flipped; see `pennyweight.weights.packing`.
        columns: N.
        transposed: stands for the transpose, which is the inverse.

    Cost: no parameters, N/8 bytes; N*(1 + k) FLOPs a row, and 2*N*C where N is no power of two. Exact: orthogonal to
    rounding.
    """

    tensors = ("signs",)
    any_dtype = True
    signs: Tensor

    def __init__(self, signs: Tensor, *, columns: int, transposed: bool = False) -> None:
        super().__init__(shape=(columns, columns))
        if signs.dtype != torch.uint8 or signs.shape != (packed_width(columns, 1),):
            raise ShapeError(
                f"Rotation: {signs.dtype} signs {tuple(signs.shape)} for {columns} features; "
                f"give uint8 ({packed_width(columns, 1)},)"
            )
        self.transposed = transposed
        self.register_buffer("signs", signs)

    @classmethod
    def random(cls, columns: int, generator: torch.Generator) -> Rotation:
        """The rotation of ``columns`` features with signs from ``generator``."""
        return cls(pack(torch.randint(0, 2, (columns,), generator=generator), 1), columns=columns)

    def _diagonal(self, x: Tensor, stages: int) -> Tensor:
        flipped = unpack(self.signs, 1, self.shape[1]).to(torch.float64)
        diagonal: Tensor = (1 - 2 * flipped) * 2.0 ** (-stages / 2)
        return diagonal.to(x.dtype)

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        core, stages = core_of(self.shape[1])
        diagonal = self._diagonal(x, stages)
        if not back:
            x = x * diagonal
        found = x.reshape(x.shape[:-1].numel(), len(core), 1 << stages)
        if len(core) > 1:
            core = (core.T if back else core).to(x)
            found = (found.mT @ core.T).mT
        for stage in range(stages):
            pair = found.reshape(found.shape[0], -1, 2, 1 << stage)
            first, second = pair.unbind(2)
            found = torch.stack((first + second, first - second), dim=2)
        found = found.reshape(x.shape)
        turned: Tensor = found * diagonal if back else found
        return turned

    def forward(self, x: Tensor) -> Tensor:
        return self._turn(x, self.transposed)

    def left(self, x: Tensor) -> Tensor:
        return self._turn(x, not self.transposed)

    def dense(self) -> Tensor:
        return self.left(torch.eye(self.shape[0], device=self.device))

    @property
    def T(self) -> Rotation:
        return Rotation(self.signs, columns=self.shape[0], transposed=not self.transposed)

    def settings(self) -> dict[str, Any]:
        return {"columns": self.shape[1], "transposed": self.transposed}

    def cost(self) -> Cost:
        core, stages = core_of(self.shape[1])
        n = self.shape[1]
        return Cost(
            params=0, bytes=self.signs.numel(), flops=n * (1 + stages) + (2 * n * len(core) if len(core) > 1 else 0)
        )
