"""Codebook weights: packed indices into tables of values, k-means or given.

Sources: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982 (the fit);
T. Dettmers et al., "QLoRA", arXiv:2305.14314, section 3 (the normal-float table).

Shape letters: M out features, N in features, G groups of a row, K values of a table, B bytes of a row of codes; R rows
and T groups that tables are told apart by (M or 1, G or 1); P tables, S entries of one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, OptionError, ShapeError
from pennyweight.weights.by_rows import by_rows
from pennyweight.weights.dense import Dense
from pennyweight.weights.grid import check_importance, group_count, grouped, scaled
from pennyweight.weights.packing import pack, unpack
from pennyweight.weights.quantized import check_packed
from pennyweight.weights.transposed import Transposed
from pennyweight.weights.weight import Cost, Weight, check_finite, form


def normal_float(bits: int) -> Tensor:
    """(2**bits,) the quantiles of a normal distribution scaled to -1 ... 1, zero among them: NF4 at 4 bits."""
    if not 2 <= bits <= 8:
        raise OptionError(f"normal_float: {bits} bits; give 2 to 8")
    half = 2 ** (bits - 1)
    # the tail left out is half of what equal shares would leave, meant over the two unequal sides
    offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    upper = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return (values / values.abs().max()).float()


@form("codebook")
class Codebook(Weight):
    """``W[i, j] = table[code[i, j]] * scale``: packed indices into tables of values.

    Args:
        packed: (M, B) uint8, see `pennyweight.weights.packing`.
        table: (R, T, K), K at most 2**bits: one table for the matrix (1, 1, K), for each row (M, 1, K) or for each
            group of each row (M, G, K).
        scale: (M, G) or (1, 1), or None.
        bits: 1 to 8.
        columns: N.
        group_size: input features that share a scale or a table, None for the whole row; the last may be shorter.

    Tables and scales are trained, codes are not. Computes in float32 (float64 where the table is).

    Cost: M*N codes packed, and the tables and scales; 2*M*N FLOPs a row. Exact when each table holds every value that
    its entries take.
    """

    tensors = ("packed", "table")
    parts = ("scale",)
    packed: Tensor
    scale: Weight | None

    def __init__(
        self,
        packed: Tensor,
        table: Tensor,
        scale: Weight | None = None,
        *,
        bits: int,
        columns: int,
        group_size: int | None = None,
    ) -> None:
        check_packed(packed, bits, columns, "Codebook")
        super().__init__(shape=(packed.shape[0], columns))
        fitting = (self.shape[0], group_count(columns, group_size))
        if table.ndim != 3 or table.shape[0] not in (1, fitting[0]) or table.shape[1] not in (1, fitting[1]):
            raise ShapeError(
                f"Codebook: table {tuple(table.shape)} for {self.shape} in groups of {group_size}; "
                f"give (1, 1, values), ({fitting[0]}, 1, values) or ({fitting[0]}, {fitting[1]}, values)"
            )
        if not table.is_floating_point() or not 1 <= table.shape[2] <= 2**bits:
            raise FormError(
                f"Codebook: a {table.dtype} table of {table.shape[2]} values; give 1 to {2**bits} floating ones"
            )
        if scale is not None and scale.shape not in (fitting, (1, 1)):
            raise ShapeError(
                f"Codebook: scale {scale.shape} for {self.shape} in groups of {group_size}; give {fitting}"
            )
        check_finite(table, "Codebook: table")
        self.bits, self.group_size = bits, group_size
        self.register_buffer("packed", packed)
        self.table = table if isinstance(table, nn.Parameter) else nn.Parameter(table)
        self.scale = scale
        if table.shape[2] < 2**bits and packed.device.type != "meta" and int(self.codes().max()) >= table.shape[2]:
            raise FormError(f"Codebook: codes reach {int(self.codes().max())} in tables of {table.shape[2]} values")

    @classmethod
    def nearest(
        cls,
        matrix: Tensor,
        *,
        bits: int,
        table: Tensor | None = None,
        tables: Literal["matrix", "row", "group"] = "matrix",
        group_size: int | None = None,
        importance: Tensor | None = None,
        rounds: int = 30,
        dtype: torch.dtype = torch.float16,
    ) -> Codebook:
        """``matrix`` (M, N) in the values of tables that are given, or fitted by k-means.

        Args:
            matrix: (M, N).
            bits: 1 to 8.
            table: (K,) values within -1 ... 1, such as `normal_float`; each group of each row then has a scale that
                takes its largest magnitude to that of the table. None fits tables of 2**bits values by k-means.
            tables: what shares a fitted table. With "matrix" and a ``group_size``, groups have scales as well.
            group_size: input features of a group; None for the whole row.
            importance: (N,) or (M, N), how much the squared error of an entry counts in the fit.
            rounds: of the k-means, which ends sooner when nothing moves.
            dtype: of tables fitted and scales.

        Raises:
            OptionError: a table with ``tables`` other than "matrix", bits out of range.
            ShapeError: ``importance`` does not fit.
            FormError: NaN or infinity.
        """
        if matrix.ndim != 2:
            raise ShapeError(
                f"Codebook.nearest: a tensor of shape {tuple(matrix.shape)} is not a matrix; give (out, in)"
            )
        if not 1 <= bits <= 8 or tables not in ("matrix", "row", "group") or (table is not None and tables != "matrix"):
            raise OptionError(
                f"Codebook.nearest: {bits} bits, tables {tables!r} ({'fitted' if table is None else 'given'}); give "
                f"1 to 8 bits and matrix, row or group (a given table is for the matrix)"
            )
        check_finite(matrix, "Codebook.nearest: matrix")
        x = matrix.detach().float()
        weight = check_importance(importance, x, "Codebook.nearest")
        scale = None
        if tables == "matrix" and (table is not None or group_size is not None):
            held = grouped(x, weight, group_size)[0].abs().amax(-1)
            held = torch.where(held > 0, held, torch.ones_like(held))
            if table is not None:
                held = held / table.abs().max()
            scale = Dense(check_finite(_positive(held, dtype), "Codebook.nearest: scale"))
            spread = scaled(torch.ones_like(x), scale.dense().detach(), group_size)
            # an error in units of the scale counts by the square of it
            x, weight = x / spread, spread.square() * (1 if weight is None else weight)
        if table is not None:
            values = table.detach().to(x).sort().values.view(1, 1, -1)
        else:
            values = _fitted(x, weight, tables, group_size, 2**bits, rounds).to(dtype)
        codes = _nearest(x, values.float(), group_size)
        return cls(pack(codes, bits), values, scale, bits=bits, columns=x.shape[1], group_size=group_size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.table.dtype, torch.float32)  # as `dense` computes

    def codes(self) -> Tensor:
        """(M, N) uint8."""
        return unpack(self.packed, self.bits, self.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self, x)

    def dense(self) -> Tensor:
        return self._values(self.codes(), self.table, None if self.scale is None else self.scale.dense())

    def _values(self, codes: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
        found = look_up(table.to(self.dtype), codes, self.group_size)
        return found if scale is None else scaled(found, scale, self.group_size)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        table = self.table if self.table.shape[0] == 1 else self.table[flat]
        if self.scale is None:
            scale = None
        else:
            scale = self.scale.dense() if self.scale.shape == (1, 1) else self.scale.rows(flat)
        found = self._values(unpack(self.packed[flat], self.bits, self.shape[1]), table, scale)
        return found.view(*index.shape, self.shape[1])

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "columns": self.shape[1], "group_size": self.group_size}

    def cost(self) -> Cost:
        count = self.shape[0] * self.shape[1]
        scale = Cost() if self.scale is None else self.scale.cost()
        stored = self.packed.numel() + self.table.nbytes + scale.bytes
        return Cost(count + self.table.numel() + scale.params, stored, 2 * count)


def look_up(table: Tensor, codes: Tensor, group_size: int | None) -> Tensor:
    """(M, N) entries: ``codes`` (M, N) in ``table`` (R, T, K), differentiable in the table."""
    rows, groups, count = table.shape
    index = codes.to(torch.int32)
    if rows > 1:
        index = index + torch.arange(rows, dtype=torch.int32, device=codes.device)[:, None] * (groups * count)
    if groups > 1:
        assert group_size is not None
        column = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device)
        index = index + torch.div(column, group_size, rounding_mode="floor") * count
    return table.reshape(-1).index_select(0, index.reshape(-1)).view(codes.shape)


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in ``dtype``, none of them rounded to zero."""
    return scale.to(dtype).clamp_min(torch.finfo(dtype).smallest_normal)


def _nearest(x: Tensor, table: Tensor, group_size: int | None) -> Tensor:
    """(M, N) uint8 indices of the nearest values of sorted tables (R, T, K)."""
    middle = ((table[..., 1:] + table[..., :-1]) / 2).contiguous()
    if table.shape[:2] == (1, 1):
        return torch.bucketize(x, middle.view(-1)).to(torch.uint8)
    if table.shape[1] == 1:
        return torch.searchsorted(middle[:, 0], x.contiguous()).to(torch.uint8)
    groups = grouped(x, None, group_size)[0].contiguous()
    return torch.searchsorted(middle, groups).to(torch.uint8).flatten(1)[:, : x.shape[1]]


def _fitted(x: Tensor, weight: Tensor | None, tables: str, group_size: int | None, count: int, rounds: int) -> Tensor:
    """(R, T, K) sorted tables by weighted k-means."""
    if tables == "group":
        groups, weights = grouped(x, weight, group_size)
        return k_means(groups.flatten(0, 1), weights.flatten(0, 1), count, rounds).view(*groups.shape[:2], count)
    weight = torch.ones_like(x) if weight is None else weight
    if tables == "matrix":
        x, weight = x.reshape(1, -1), weight.reshape(1, -1)
    return k_means(x, weight, count, rounds)[:, None]


def k_means(x: Tensor, weight: Tensor, count: int, rounds: int) -> Tensor:
    """(P, ``count``) sorted centers of weighted one-dimensional k-means over (P, S), every table at once.

    Starts once from equal shares of the weight and once from the whole range, and keeps the better for each table.
    Where there are no more than ``count`` distinct values, they are the centers.
    """
    x, order = x.sort(dim=-1)
    # double: the sums below are differences of running totals
    weight = weight.double().gather(-1, order).clamp_min(0)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
    wide = x.double()
    totals = [_running(t) for t in (weight, weight * wide, weight * wide * wide)]
    best = _distinct(x, count).double()
    loss, best = _lloyd(wide, totals, best, rounds)
    share = (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5) / count
    place = torch.searchsorted(totals[0][:, 1:].contiguous(), share * totals[0][:, -1:]).clamp_max(x.shape[1] - 1)
    for start in (wide.gather(-1, place), wide[:, :1] + share * (wide[:, -1:] - wide[:, :1])):
        found_loss, found = _lloyd(wide, totals, start, rounds)
        best = torch.where((found_loss < loss)[:, None], found, best)
        loss = torch.minimum(loss, found_loss)
    return best


def _distinct(x: Tensor, count: int) -> Tensor:
    """(P, ``count``) the first distinct values of sorted ``x`` (P, S), the last one repeated where there are fewer."""
    new = torch.ones_like(x, dtype=torch.bool)
    new[:, 1:] = x[:, 1:] != x[:, :-1]
    rank = (new.long().cumsum(-1) - 1).clamp_max(count - 1)
    number = rank[:, -1:]
    values = torch.zeros(x.shape[0], count, dtype=x.dtype, device=x.device)
    # entries past the first `count` values all land on the last one: any of them is as good a start
    values.scatter_(1, rank, x)
    places = torch.arange(count, device=x.device).expand(x.shape[0], -1)
    return values.gather(1, torch.minimum(places, number))


def _running(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _lloyd(x: Tensor, totals: list[Tensor], center: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """The loss (P,) and the centers (P, K) that Lloyd's rounds reach from ``center``."""
    ends = x.new_zeros(x.shape[0], 1, dtype=torch.long), x.new_full((x.shape[0], 1), x.shape[1], dtype=torch.long)
    loss = x.new_full((x.shape[0],), torch.inf)
    for _ in range(max(1, rounds)):
        cut = torch.searchsorted(x, ((center[:, 1:] + center[:, :-1]) / 2).contiguous())
        edges = torch.cat([ends[0], cut, ends[1]], dim=1)
        mass, first, second = (t.gather(1, edges).diff(dim=1) for t in totals)
        center = torch.where(mass > 0, first / mass, center).cummax(1).values  # an empty cell stays, in order
        before, loss = loss, (second - 2 * center * first + center.square() * mass).sum(1)
        if bool((loss >= before * (1 - 1e-6)).all()):
            break
    return loss, center
