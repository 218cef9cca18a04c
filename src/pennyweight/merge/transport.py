"""Fusing independently trained Transformers: their neurons are matched by optimal transport, and averaged then.

Row 71. Source: M. Imfeld et al., "Transformer Fusion with Optimal Transport", arXiv:2310.05719: maps between the
neurons of two models flow through layers, heads, norms and residual streams; B is the anchor and A is carried over to
it, ``W_A' = n T_out^T W_A T_in n``; hard maps come from an exact assignment, soft ones from Sinkhorn; a wide A gives a
start for a narrow B. Differs from the source: the residual stream is one space with one map, from the activations of
all blocks together, where the source averages a map per branch; whole heads are matched (a key/value head with its
queries), and inside a head only values move, since rotary positions give every query and key channel its own angle;
costs come from activations only.

Shape letters: A, B neurons of the two models; R rows of activations; H heads, G key/value heads, S size of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pennyweight.errors import ModelError, OptionError
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map

Solver = Literal["emd", "sinkhorn"]
_LARGEST = 8192  # neurons of the assignment that unequal widths are spread over


@dataclass(frozen=True)
class Carried:
    """How the neurons of A become those of B.

    Attributes:
        plan: (A, B), rows sum to 1/A and columns to 1/B.
    """

    plan: Tensor

    @property
    def out(self) -> Tensor:
        """(B, A): what a neuron of B produces, as a mean of those of A."""
        return self.plan.T * self.plan.shape[1]

    @property
    def into(self) -> Tensor:
        """(A, B): what a neuron of A would read, as a mean of those of B."""
        return self.plan * self.plan.shape[0]


def transport(cost: Tensor, *, solver: Solver = "emd", regularization: float = 0.08) -> Tensor:
    """The plan (A, B) of least cost (A, B) between uniform masses.

    Args:
        cost: of moving a unit from a row to a column.
        solver: "emd" is exact, a permutation over A where A = B; "sinkhorn" spreads mass.
        regularization: of Sinkhorn, for costs scaled to at most 1.

    Raises:
        OptionError: another solver, or unequal sides that an exact assignment would spread over too many.
    """
    rows, columns = cost.shape
    if solver == "emd":
        size = math.lcm(rows, columns)
        if size > _LARGEST:
            raise OptionError(f"transport: {rows} to {columns} neurons by emd takes {size}; choose sinkhorn")
        spread = cost.repeat_interleave(size // rows, 0).repeat_interleave(size // columns, 1)
        chosen = linear_sum_assignment(spread.double().numpy())
        plan = torch.zeros(rows, columns, dtype=torch.float64)
        at = torch.from_numpy(np.stack(chosen)) // torch.tensor([[size // rows], [size // columns]])
        return plan.index_put_((at[0], at[1]), torch.tensor(1.0 / size, dtype=torch.float64), accumulate=True)
    if solver != "sinkhorn" or regularization <= 0:
        raise OptionError(
            f"transport: solver {solver!r}, regularization {regularization}; give emd, or sinkhorn and > 0"
        )
    kernel = -cost.double() / float(cost.max().clamp(min=1e-30)) / regularization
    left, right = torch.zeros(rows, 1, dtype=torch.float64), torch.zeros(1, columns, dtype=torch.float64)
    for _ in range(1000):
        left = -math.log(rows) - (kernel + right).logsumexp(1, keepdim=True)
        right = -math.log(columns) - (kernel + left).logsumexp(0, keepdim=True)
        if float(((kernel + left + right).exp().sum(1) * rows - 1).abs().max()) < 1e-9:
            break
    return (kernel + left + right).exp()


def fuse(
    first: nn.Module,
    second: nn.Module,
    inputs: Tensor,
    *,
    alpha: float = 0.5,
    solver: Solver = "emd",
    regularization: float = 0.08,
) -> nn.Module:
    """A model of the shape of ``second``: ``(1 - alpha) * first, carried over + alpha * second``.

    Args:
        first: carried over; a pre-normalized decoder with as many blocks and the same vocabulary and head size, of any
            width, number of heads and feed-forward size.
        second: the anchor; neither is changed.
        inputs: token ids (W, T) that both run on.
        alpha: share of ``second``; 0 is ``first`` in the shape of ``second``.
        solver: see `transport`.
        regularization: see `transport`.

    Exact for a copy whose channels, neurons or heads were permuted, up to the order of sums.

    Raises:
        ModelError: models of another kind, or that do not fit each other.
        OptionError: an alpha outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise OptionError(f"fuse: alpha {alpha}; give a share of the second model between 0 and 1")
    sides = [_Side(module, inputs) for module in (first, second)]
    one, two = sides
    if len(one.anatomy.blocks) != len(two.anatomy.blocks) or one.head_size != two.head_size:
        raise ModelError(
            f"fuse: {len(one.anatomy.blocks)} blocks with heads of {one.head_size} and {len(two.anatomy.blocks)} with "
            f"heads of {two.head_size}; give models of equal depth and head size"
        )

    def solved(cost: Tensor) -> Tensor:
        return transport(cost, solver=solver, regularization=regularization)

    fused = copy.deepcopy(second)
    carried = _carry(one, two, solved)
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            moved = carried.pop(name)
            if moved.shape != parameter.shape:
                raise ModelError(
                    f"fuse: {name} is {tuple(moved.shape)} for {tuple(parameter.shape)}; vocabularies differ"
                )
            parameter.copy_((1 - alpha) * moved + alpha * parameter.double())
    return fused


class _Side:
    """A model, its anatomy, and its activations on the inputs."""

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self.module, self.anatomy = module, anatomy.of(module)
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        if heads is None or self.anatomy.embedding is None:
            raise ModelError(f"fuse: {type(module).__name__} tells no number of heads, or has no tokens")
        self.heads = int(heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.embedding = self.anatomy.embedding
        self.width = self.embedding.shape[1]
        self.blocks = [_roles(block.maps) for block in self.anatomy.blocks]
        self.head_size = self.blocks[0]["attention.query"].shape[0] // self.heads
        self.parameters = {name: one.detach().double() for name, one in module.named_parameters()}
        self.seen = self._run(inputs)

    def _run(self, inputs: Tensor) -> dict[str, Tensor]:
        """What maps gave (``path``) and what down maps and norms read (``<path``): (R, width) each."""
        seen: dict[str, Tensor] = {}

        def reads(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                seen["<" + path] = given[0].detach().flatten(0, -2)

            return hook

        def gives(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, result: Tensor) -> None:
                seen[path] = result.detach().flatten(0, -2)

            return hook

        handles = []
        for block in self.blocks:
            for role, one in block.items():
                layer = self.module.get_submodule(one.path)
                if role == "ffn.down":
                    handles.append(layer.register_forward_pre_hook(reads(one.path)))
                elif role in ("attention.query", "attention.key", "attention.value"):
                    handles.append(layer.register_forward_hook(gives(one.path)))
        for path in self.anatomy.norms:
            handles.append(self.module.get_submodule(path).register_forward_pre_hook(reads(path)))
        training = self.module.training
        try:
            with torch.inference_mode():
                self.module.eval()(inputs)
        finally:
            self.module.train(training)
            for handle in handles:
                handle.remove()
        return seen

    def stream(self) -> list[Tensor]:
        """The residual stream before each norm, each scaled to size 1: (R, width)."""
        found = [self.seen["<" + path] for path in self.anatomy.norms]
        return [_scaled(one) for one in found if one.shape[1] == self.width]

    def by_head(self, path: str, heads: int) -> Tensor:
        """(heads, S, R)."""
        return _scaled(self.seen[path]).T.reshape(heads, self.head_size, -1)


_NEEDED = {"attention.query", "attention.key", "attention.value", "attention.output", "ffn.up", "ffn.down"}


def _roles(maps: tuple[Map, ...]) -> dict[str, Map]:
    found = {one.role: one for one in maps}
    strange = [one.name for one in maps if one.role not in _NEEDED | {"ffn.gate"} or one.rows is not None]
    if strange or not found.keys() >= _NEEDED:
        raise ModelError(
            f"fuse: {strange[0] if strange else 'a block'} is not of a plain decoder with separate query, key, value "
            "and feed-forward maps; those can be fused"
        )
    return found


def _scaled(seen: Tensor) -> Tensor:
    return seen.double() / seen.double().square().mean().sqrt().clamp(min=1e-30)


def _distances(one: Tensor, two: Tensor) -> Tensor:
    """Between rows of (A, R) and (B, R): (A, B)."""
    # by differences: products would lose the small distances that tell twins apart
    return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")


def _carry(one: _Side, two: _Side, solved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The parameters of ``one`` in the shapes of ``two``."""
    pairs = list(zip(one.stream(), two.stream(), strict=True))
    rows = max(1, 4096 // len(pairs))  # enough to tell channels apart, few enough for quick distances
    stream = Carried(
        solved(_distances(*(torch.cat([_some(p[n], rows) for p in pairs]).T.contiguous() for n in (0, 1))))
    )
    done: dict[str, Tensor] = {}

    def put(module: _Side, path: str, weight: Tensor, out: Carried | None) -> None:
        done[f"{path}.weight"] = weight
        if f"{path}.bias" in module.parameters:
            bias = module.parameters[f"{path}.bias"]
            done[f"{path}.bias"] = bias if out is None else out.out @ bias

    for ours, theirs in zip(one.blocks, two.blocks, strict=True):
        down = ours["ffn.down"].path
        neurons = Carried(
            solved(
                _distances(
                    *(
                        _some(_scaled(side.seen["<" + path]), 1024).T.contiguous()
                        for side, path in ((one, down), (two, theirs["ffn.down"].path))
                    )
                )
            )
        )
        queries, keys, values, mixed = _heads(one, two, ours, theirs, solved)
        both = {
            "attention.query": (queries, stream),
            "attention.key": (keys, stream),
            "attention.value": (values, stream),
            "attention.output": (stream, mixed),
            "ffn.gate": (neurons, stream),
            "ffn.up": (neurons, stream),
            "ffn.down": (stream, neurons),
        }
        for role, found in ours.items():
            out, into = both[role]
            put(one, theirs[role].path, out.out @ one.parameters[f"{found.path}.weight"] @ into.into, out)
    for norm, its in zip(one.anatomy.norms, two.anatomy.norms, strict=True):
        for kind in ("weight", "bias"):
            scale = one.parameters.get(f"{norm}.{kind}")
            if scale is not None and len(scale) != one.width:
                raise ModelError(f"fuse: {norm} normalizes {len(scale)} of {one.width} channels; not supported")
            if scale is not None:
                done[f"{its}.{kind}"] = stream.out @ scale
    done[f"{two.embedding.path}.weight"] = one.parameters[f"{one.embedding.path}.weight"] @ stream.out.T
    head, last = two.anatomy.head, two.anatomy.norms[-1]
    if one.anatomy.tied and two.anatomy.tied:
        # the one table is carried as an embedding; what it lacks as a head, the last norm makes up for
        done[f"{last}.weight"] = done[f"{last}.weight"] * (one.width / two.width)
    elif head is not None and one.anatomy.head is not None and not two.anatomy.tied:
        put(one, head.path, one.parameters[f"{one.anatomy.head.path}.weight"] @ stream.into, None)
    left = [name for name in two.parameters if name not in done]
    if left:
        raise ModelError(f"fuse: {left[0]} of {type(two.module).__name__} has no place in a plain decoder")
    return done


def _some(seen: Tensor, rows: int) -> Tensor:
    """``rows`` rows of (R, width), spread over all."""
    return seen[torch.linspace(0, len(seen) - 1, min(rows, len(seen))).long()]


def _heads(
    one: _Side, two: _Side, ours: dict[str, Map], theirs: dict[str, Map], solved: Callable[[Tensor], Tensor]
) -> tuple[Carried, Carried, Carried, Carried]:
    """Maps of the rows of query, key and value, and of what the output map reads."""
    size = one.head_size
    queries, keys, values = (
        [side.by_head(maps[f"attention.{role}"].path, heads) for side, maps, heads in sides]
        for role, sides in (
            ("query", ((one, ours, one.heads), (two, theirs, two.heads))),
            ("key", ((one, ours, one.kv_heads), (two, theirs, two.kv_heads))),
            ("value", ((one, ours, one.kv_heads), (two, theirs, two.kv_heads))),
        )
    )
    inside = [[solved(_distances(a, b)) for b in values[1]] for a in values[0]]  # (G, G) plans of (S, S)
    apart = torch.stack([
        torch.stack([(plan * _distances(a, b) ** 2).sum() for plan, b in zip(row, values[1], strict=True)])
        for row, a in zip(inside, values[0], strict=True)
    ])  # fmt: skip
    groups = solved(_distances(keys[0].flatten(1), keys[1].flatten(1)).square() / size + apart)
    mine, other = one.heads // one.kv_heads, two.heads // two.kv_heads
    by_query = torch.zeros(one.heads, two.heads, dtype=torch.float64)
    mixed = torch.zeros(one.heads, size, two.heads, size, dtype=torch.float64)
    for i in range(one.kv_heads):
        for j in range(two.kv_heads):
            a, b = queries[0][i * mine : (i + 1) * mine], queries[1][j * other : (j + 1) * other]
            part = groups[i, j] * solved(_distances(a.flatten(1), b.flatten(1)))
            by_query[i * mine : (i + 1) * mine, j * other : (j + 1) * other] = part
            moved = torch.einsum("ab,st->asbt", part, inside[i][j])
            mixed[i * mine : (i + 1) * mine, :, j * other : (j + 1) * other] = moved
    still = torch.eye(size, dtype=torch.float64) / size
    value = torch.einsum("ij,ijst->isjt", groups, torch.stack([torch.stack(row) for row in inside]))
    return (
        Carried(torch.kron(by_query, still)),
        Carried(torch.kron(groups, still)),
        Carried(value.reshape(one.kv_heads * size, two.kv_heads * size)),
        Carried(mixed.reshape(one.heads * size, two.heads * size)),
    )
