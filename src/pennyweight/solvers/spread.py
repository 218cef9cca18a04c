"""How the zeros of a model are spread over its matrices.

"global" compares all weights at once, "layer" gives every matrix the same share, "erk" (Erdos-Renyi) keeps a share that
goes with (out + in) / (out * in): small and oblong matrices keep more.

Source of "erk": U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134, section 3. Differs
from the source: counts are exact, where it draws each place by chance.

Shape letters: L matrices, M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pennyweight.errors import OptionError
from pennyweight.solvers.masks import Selection

SCOPES = ("global", "layer", "erk")


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """The share of zeros (L,) in matrices of ``shapes``, ``sparsity`` in all; what would be more than full is full.

    Exact: the shares weighted by their sizes add up to ``sparsity``.

    Raises:
        OptionError: no matrix, or a sparsity outside 0 to 1.
    """
    if not shapes or not 0 <= sparsity <= 1:
        raise OptionError(f"erk: {len(shapes)} matrices at sparsity {sparsity}; give one or more, and 0 to 1")
    sizes = [float(torch.Size(shape).numel()) for shape in shapes]
    odds = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    full: set[int] = set()
    while True:
        kept = (1 - sparsity) * sum(sizes) - sum(sizes[at] for at in full)
        rest = [at for at in range(len(shapes)) if at not in full]
        scale = kept / sum(odds[at] * sizes[at] for at in rest) if rest else 0.0
        over = {at for at in rest if scale * odds[at] > 1 + 1e-12}
        if not over:
            return [0.0 if at in full else 1 - min(1.0, scale * odds[at]) for at in range(len(shapes))]
        most = max(
            odds[at] for at in over
        )  # the fullest first, as the source does: the others get less once it is full
        full |= {at for at in over if odds[at] == most}


def spread(scores: Sequence[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """Masks, True where kept, of ``scores`` (M, N) each: the smallest go, ``sparsity`` of them in all.

    Exact to one weight a matrix, or to one of all when ``scope`` is "global"; ties go by position.

    Raises:
        OptionError: an unknown scope.
    """
    if scope not in SCOPES:
        raise OptionError(f"scope {scope!r}; give {', '.join(SCOPES)}")
    if scope != "erk":
        return Selection(sparsity=sparsity, scope="global" if scope == "global" else "matrix").kept(scores)
    shares = erk([each.shape for each in scores], sparsity)
    return [Selection(sparsity=part).kept([each])[0] for part, each in zip(shares, scores, strict=True)]
