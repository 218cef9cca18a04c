"""A recommender made of embedding tables alone: vectors of users and items, smoothed over who took what.

Source: X. He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
arXiv:2002.02126; its loss is that of S. Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback",
2009. Differs from the sources: nothing; with 0 rounds it is plain matrix factorization.

Shape letters: U users, I items, D width, B pairs of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.data.interactions import Interactions
from pennyweight.errors import OptionError
from pennyweight.train.loop import Loss
from pennyweight.train.samples import Batch


class LightGCN(nn.Module):
    """Vectors of all users and items: () -> (U, D), (I, D).

    Args:
        data: whose ``seen`` pairs are the graph.
        width: D.
        rounds: of smoothing; the vectors are the mean over 0 to ``rounds``.
        generator: of the initial tables.

    Raises:
        OptionError: sizes that cannot be.
    """

    graph: Tensor

    def __init__(
        self, data: Interactions, *, width: int = 32, rounds: int = 2, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if width < 1 or rounds < 0:
            raise OptionError(f"LightGCN: width {width}, {rounds} rounds; give 1 or more, and 0 or more")
        self.rounds = rounds
        self.users, self.items = nn.Embedding(data.users, width), nn.Embedding(data.items, width)
        with torch.no_grad():
            for table in (self.users, self.items):
                table.weight.normal_(0, 0.1, generator=generator)
        taken = data.matrix(data.seen)
        of_user, of_item = taken.sum(1).clamp(min=1), taken.sum(0).clamp(min=1)
        user, item = taken.nonzero().T
        weights = (of_user[user] * of_item[item]).double().rsqrt().float()
        graph = torch.sparse_coo_tensor(
            torch.stack([user, item]), weights, taken.shape, is_coalesced=True, check_invariants=False
        )
        self.register_buffer("graph", graph, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        user, item = self.users.weight, self.items.weight
        users, items = user, item
        for _ in range(self.rounds):
            user, item = torch.sparse.mm(self.graph, item), torch.sparse.mm(self.graph.T, user)
            users, items = users + user, items + item
        return users / (self.rounds + 1), items / (self.rounds + 1)


def ranking_loss(data: Interactions, generator: torch.Generator, *, decay: float = 1e-4) -> Loss:
    """BPR: a pair that was taken ranks above one with an item drawn by ``generator``; on batches of users and items."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        users, items = module()
        user, taken = batch
        other = torch.randint(data.items, user.shape, generator=generator)
        left, right, wrong = users[user], items[taken], items[other]
        ranked: Tensor = -functional.logsigmoid((left * (right - wrong)).sum(-1)).mean()
        small: Tensor = (left.square() + right.square() + wrong.square()).sum(-1).mean()
        return ranked + decay * small

    return loss


@torch.no_grad()
def recall(module: nn.Module, data: Interactions, *, count: int = 20) -> Tensor:
    """(U',) share of the held-back items of each user among the ``count`` best of those it did not take, float64."""
    users, items = module()
    scores = (users @ items.T).masked_fill_(data.matrix(data.seen), -torch.inf)
    best = scores.topk(count, dim=1).indices
    held = data.matrix(data.held)
    some = held.any(1)
    return (held.gather(1, best).sum(1)[some] / held.sum(1)[some]).double()
