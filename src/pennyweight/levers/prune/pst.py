"""PST: sparse tuning where neither the weights nor the scores they are chosen by are trained in full.

Row 140. Source: Y. Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", arXiv:2205.11005,
and its official implementation: the weight is ``W + beta * U V`` with W frozen; it is kept where
``|W + beta * U V| + alpha_1 * A B + alpha_2 * (r 1^T + 1 c^T)`` is largest in its layer, and the score gets the mask's
gradient as it is. The share of zeros rises along a cubic between two plateaus. In the end the product is merged, and a
sparse matrix is left. Differs from the source: the loss may be the divergence from the original; kept values are stored
in 16 bits.

Shape letters: M out features, N in features, K rank of the update, Q rank of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group
from pennyweight.solvers.masks import DTYPES, smallest
from pennyweight.solvers.sparse_tuning import Trained, Tuning, check_rank, drawn, linear_maps
from pennyweight.train.masked import score_through
from pennyweight.train.sparsity_schedules import Ramp, between_plateaus
from pennyweight.weights import Sparse
from pennyweight.work import Work

_NAME = "prune.pst"


class Scored(Trained):
    """``(W + beta * up @ down) * mask``, the mask of the largest learned scores; W stays as it is.

    Starts as the mask of the largest ``|W|``: ``up``, ``score_up``, ``score_rows`` and ``score_columns`` are 0.

    Args:
        matrix: W, (M, N).
        rank: K.
        score_rank: Q; 0 for rows and columns alone.
        beta: of the update.
        alpha: of the low-rank part of the scores, and of rows and columns.
        generator: of the first values.

    Attributes:
        sparsity: share of zeros now.
    """

    matrix: Tensor

    def __init__(
        self, matrix: Tensor, *, rank: int, score_rank: int, beta: float = 1.0, alpha: tuple[float, float] = (1.0, 1.0),
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        rows, columns = matrix.shape
        super().__init__(shape=(rows, columns))
        self.beta, self.alpha, self.sparsity = beta, alpha, 0.0
        self.register_buffer("matrix", matrix.detach().float().clone())
        self.up, self.down = nn.Parameter(drawn(rows, rank, generator)), nn.Parameter(torch.zeros(rank, columns))
        self.score_up = nn.Parameter(drawn(rows, score_rank, generator))
        self.score_down = nn.Parameter(torch.zeros(score_rank, columns))
        self.score_rows, self.score_columns = nn.Parameter(torch.zeros(rows, 1)), nn.Parameter(torch.zeros(columns))

    def weight(self) -> Tensor:
        """The weight before it is masked, (M, N)."""
        return torch.addmm(self.matrix, self.up, self.down, alpha=self.beta)

    def scores(self, weight: Tensor) -> Tensor:
        """(M, N); larger stays."""
        low, lines = self.alpha
        learned = low * (self.score_up @ self.score_down) + lines * (self.score_rows + self.score_columns)
        return weight.abs() + learned

    def kept(self, scores: Tensor) -> Tensor:
        """(M, N) bool: all but the smallest share of ``scores``."""
        flat = scores.detach().flatten()
        return ~smallest(flat[None], round(self.sparsity * flat.numel()))[0].view(self.shape)

    def dense(self) -> Tensor:
        weight = self.weight()
        scores = self.scores(weight)
        return score_through(scores, self.kept(scores)) * weight

    @torch.no_grad()
    def frozen(self, dtype: torch.dtype) -> Sparse:
        """What it computes with, the kept values in ``dtype``."""
        weight = self.weight()
        return Sparse.keep(weight.to(dtype), self.kept(self.scores(weight)))


class Sparsening:
    """A callback that sets the share of zeros of some layers along a schedule."""

    def __init__(self, layers: list[Scored], schedule: Ramp) -> None:
        self.layers, self.schedule, self.steps = layers, schedule, 0
        self._set()

    def step(self) -> None:
        """Call after each step of the optimizer."""
        self.steps += 1
        self._set()

    def _set(self) -> None:
        for layer in self.layers:
            layer.sparsity = self.schedule.sparsity(self.steps)


@lever(
    _NAME,
    reach="model",
    row=140,
    paper="Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, arXiv:2205.11005",
)
@dataclass(frozen=True, kw_only=True)
class PST(Tuning):
    """Train a low-rank update and low-rank scores until weights are sparse; sparse matrices are left."""

    sparsity: float = option(0.9, between(0, 1), "share of zeros in each layer")
    rank: int = option(8, at_least(1), "rank of the update")
    score_rank: int = option(8, at_least(0), "rank of the learned scores; 0: rows and columns alone")
    beta: float = option(1.0, at_least(0), "multiplies the update")
    alpha_low: float = option(1.0, at_least(0), "multiplies the low-rank scores")
    alpha_lines: float = option(1.0, at_least(0), "multiplies the scores of rows and columns")
    score_rate: float | None = option(None, at_least(0), "learning rate of the scores; none: that of the update")
    before: float = option(0.1, between(0, 1), "share of the steps before the first weight goes")
    after: float = option(0.3, between(0, 1), "share of the steps after the last one went")
    dtype: str = option("float16", one_of(*DTYPES), "what kept values are stored in")

    def change(self, model: Model, work: Work) -> None:
        maps, loss = linear_maps(work, _NAME), self.loss(model, _NAME)
        g = torch.Generator().manual_seed(work.seed)
        layers = {}
        for path in dict.fromkeys(one.path for one in maps):
            found = next(one for one in anatomy.of(model.module).layers() if one.path == path)
            layers[path] = self.layer(anatomy.matrix(model.module, found), g)
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer)
        ramp = between_plateaus(self.steps, self.sparsity, before=self.before, after=self.after)
        self.tune(
            model, work, self.groups(list(layers.values())), loss, stage="pst",
            callbacks=[Sparsening(list(layers.values()), ramp)],
        )  # fmt: skip
        for path, layer in layers.items():
            layer.sparsity = self.sparsity
            anatomy.replace(model.module, path, layer.frozen(DTYPES[self.dtype]))

    def layer(self, matrix: Tensor, generator: torch.Generator) -> Scored:
        """What stands for ``matrix`` (M, N) while it is trained.

        Raises:
            OptionError: a rank that the matrix does not have.
        """
        check_rank(max(self.rank, self.score_rank), (matrix.shape[0], matrix.shape[1]), _NAME)
        return Scored(
            matrix, rank=self.rank, score_rank=self.score_rank, beta=self.beta,
            alpha=(self.alpha_low, self.alpha_lines), generator=generator,
        )  # fmt: skip

    def groups(self, layers: list[Scored]) -> list[Group]:
        """What is trained, and how fast; nothing of it decays, since that would move masks."""
        updates = [one for layer in layers for one in (layer.up, layer.down)]
        scores = [
            one for layer in layers for one in (layer.score_up, layer.score_down, layer.score_rows, layer.score_columns)
        ]
        return [Group(updates, self.rate), Group(scores, self.rate if self.score_rate is None else self.score_rate)]
