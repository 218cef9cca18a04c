"""The laws of weights: what every form keeps, alone and in every nesting.

A law is a function of a weight and of the matrix that it must stand for, built without it. A new form adds one function
to `FORMS`: it draws a weight of shape (m, n) and its matrix, which all the laws are then held to, by themselves and
inside random expressions (`nested`).

Shape letters: m out features, n in features.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Callable
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.errors import FormError, ShapeError
from pennyweight.weights import (
    BlockDiagonal,
    BlockSparse,
    Codebook,
    DeepHash,
    Dense,
    Diagonal,
    DictionaryCoded,
    EntropyCoded,
    Grid,
    GridCoded,
    Hadamard,
    Hashed,
    Integers,
    Kronecker,
    Lattice,
    LowRank,
    Monarch,
    NofM,
    Permutation,
    Premerged,
    Product,
    Quantized,
    RandomBasis,
    Rotation,
    SharedRows,
    Sparse,
    Stacked,
    Sum,
    TensorTrain,
    Transposed,
    VectorCodebook,
    Weight,
    rebuild,
    stored_bytes,
    structure,
)
from pennyweight.weights.entropy import scale_bytes
from pennyweight.weights.lattice import magnitudes
from pennyweight.weights.rotation import core_of

Drawn = tuple[Weight, Tensor]
Form = Callable[[Generator, int, int], Drawn]


def draw(g: Generator, *shape: int) -> Tensor:
    """Normal float32 numbers."""
    return torch.randn(*shape, generator=g)


def whole(g: Generator, below: int, *shape: int) -> Tensor:
    """Whole numbers of 0 ... below - 1."""
    return torch.randint(0, below, shape, generator=g)


# --- one drawn weight of each form, and the matrix it must be, by another way


def dense(g: Generator, m: int, n: int) -> Drawn:
    matrix = draw(g, m, n)
    return Dense(matrix), matrix


def low_rank(g: Generator, m: int, n: int) -> Drawn:
    up, down = draw(g, m, 2), draw(g, 2, n)
    return LowRank(up, down), up @ down


def low_rank_nothing(g: Generator, m: int, n: int) -> Drawn:
    return LowRank(draw(g, m, 0), draw(g, 0, n)), torch.zeros(m, n)


def integers(g: Generator, m: int, n: int) -> Drawn:
    codes = whole(g, 32, m, n)
    return Integers.of(codes, 5), codes.float()


def on_grid(bits: int, group_size: int | None, kind: str, scale_dtype: torch.dtype = torch.float16) -> Form:
    """Random codes on a random grid; the matrix by a loop over groups."""

    def quantized(g: Generator, m: int, n: int) -> Drawn:
        size = group_size or n
        groups = -(-n // size)
        codes = whole(g, 2**bits, m, n)
        scale = (draw(g, m, groups).abs() + 0.1).to(scale_dtype)
        whole_zero, float_zero = whole(g, 2**bits, m, groups), draw(g, m, groups).to(scale_dtype)
        zero = {"none": None, "integer": whole_zero, "float": float_zero}[kind]
        matrix = torch.empty(m, n)
        for row in range(m):
            for column in range(n):
                step, code = scale[row, column // size].float(), codes[row, column].float()
                if zero is None:
                    matrix[row, column] = step * (code - 2 ** (bits - 1))
                elif kind == "integer":
                    matrix[row, column] = step * (code - zero[row, column // size])
                else:
                    matrix[row, column] = step * code + zero[row, column // size].float()
        stored = zero.to(torch.uint8) if kind == "integer" and zero is not None else zero
        return Quantized.from_codes(codes, Grid(bits, group_size, scale, stored, kind)), matrix  # type: ignore[arg-type]

    quantized.__name__ = f"quantized_{bits}_{group_size}_{kind}"
    return quantized


def quantized_e4m3(g: Generator, m: int, n: int) -> Drawn:
    values, scale = (3 * draw(g, m, n)).to(torch.float8_e4m3fn), draw(g, m, 1).abs() + 0.1
    weight = Quantized.from_codes(values.view(torch.uint8), Grid(8, None, scale, None, "none", "e4m3"))
    return weight, values.float() * scale


def quantized_twice(g: Generator, m: int, n: int) -> Drawn:
    groups = -(-n // 4)
    held, scales = on_grid(6, None, "none", torch.float32)(g, m, groups)
    codes = whole(g, 8, m, n)
    grid = Grid(3, 4, scales, None, "none", stored_scale=held)
    return Quantized.from_codes(codes, grid), scales.repeat_interleave(4, 1)[:, :n] * (codes - 4)


def quantized_per_tensor(g: Generator, m: int, n: int) -> Drawn:
    codes, scale, zero = whole(g, 8, m, n), draw(g, 1, 1).abs() + 0.1, whole(g, 8, 1, 1)
    weight = Quantized.from_codes(codes, Grid(3, None, scale, zero.to(torch.uint8), "integer"))
    return weight, scale * (codes - zero)


def codebook(g: Generator, m: int, n: int) -> Drawn:
    codes, table, scale = whole(g, 5, m, n), draw(g, 1, 1, 5), draw(g, m, -(-n // 3))
    weight = Codebook(Integers.of(codes, 3).packed, table, Dense(scale), bits=3, columns=n, group_size=3)
    return weight, torch.from_numpy(table.numpy()[0, 0][codes.numpy()]) * scale.repeat_interleave(3, 1)[:, :n]


def codebook_of_groups(g: Generator, m: int, n: int) -> Drawn:
    codes, table = whole(g, 4, m, n).numpy(), draw(g, m, -(-n // 3), 4)
    rows, columns = np.indices((m, n))
    weight = Codebook(Integers.of(torch.from_numpy(codes), 2).packed, table, bits=2, columns=n, group_size=3)
    return weight, torch.from_numpy(table.numpy()[rows, columns // 3, codes])


def vector_codebook(g: Generator, m: int, n: int) -> Drawn:
    codes, table = whole(g, 5, m, -(-n // 3)), draw(g, 5, 3)
    weight = VectorCodebook(Integers.of(codes, 3).packed, table, bits=3, columns=n)
    return weight, torch.cat([table[column.long()] for column in codes.T], dim=1)[:, :n]


def entropy_coded(g: Generator, m: int, n: int) -> Drawn:
    codes = (2 * draw(g, m, n)).round()
    row, column = scale_bytes(draw(g, m).abs() + 0.1), scale_bytes(draw(g, n).abs() + 0.1)
    value = [torch.from_numpy(2.0 ** ((part.double().numpy() - 128) / 16)) for part in (row, column)]
    matrix = 0.5 * codes.double() * value[0][:, None] * value[1]
    return EntropyCoded.encode(codes, row, column, step=0.5), matrix.float()


def dictionary_coded(g: Generator, m: int, n: int) -> Drawn:
    codes, levels = whole(g, 3, m, n) * (torch.rand(m, n, generator=g) < 0.4), draw(g, m, 2)
    table = np.concatenate([np.zeros((m, 1), dtype=np.float32), levels.numpy()], axis=1)
    return DictionaryCoded.encode(codes, levels), torch.from_numpy(np.take_along_axis(table, codes.numpy(), axis=1))


def lattice(g: Generator, m: int, n: int) -> Drawn:
    codes, scale = whole(g, 1 << 16, m, -(-n // 8)), draw(g, m)
    matrix = torch.empty(m, 8 * codes.shape[1])
    table = magnitudes().numpy()
    for row, column in np.ndindex(m, codes.shape[1]):
        code = int(codes[row, column])
        signs = [-1 if code >> (8 + place) & 1 else 1 for place in range(7)]
        point = np.array([*signs, 1]) * table[code & 255]
        point[7] *= -1 if point.sum() % 2 else 1
        matrix[row, 8 * column : 8 * column + 8] = scale[row] * torch.from_numpy(
            point + (-0.25 if code >> 15 else 0.25)
        )
    signed = torch.from_numpy(codes.numpy().astype(np.uint16).view(np.int16))
    return Lattice(signed, scale, columns=n), matrix[:, :n]


def grid_coded(g: Generator, m: int, n: int) -> Drawn:
    weight, matrix = on_grid(3, 4, "integer")(g, m, n)
    assert isinstance(weight, Quantized)
    return GridCoded.encode(weight), matrix


def kept_at(share: float) -> Form:
    def sparse(g: Generator, m: int, n: int) -> Drawn:
        mask = torch.rand(m, n, generator=g) < share
        matrix = draw(g, m, n)
        return Sparse.keep(matrix, mask), matrix * mask

    sparse.__name__ = f"sparse_{share}"
    return sparse


def sparse_of_quantized(g: Generator, m: int, n: int) -> Drawn:
    mask = torch.rand(m, n, generator=g) < 0.5
    mask[0, 0] = True
    values, held = on_grid(3, 4, "float")(g, 1, int(mask.sum()))
    return Sparse.keep(mask.float()).with_values(values), torch.zeros(m, n).masked_scatter(mask, held)


def kept_n_of_m(n_kept: int, of: int) -> Form:
    def n_of_m(g: Generator, m: int, n: int) -> Drawn:
        order = torch.rand(m, -(-n // of), of, generator=g).argsort(-1)
        mask = (order < n_kept).flatten(1)[:, :n]
        matrix = draw(g, m, n)
        return NofM.keep(matrix, mask, n=n_kept, m=of), matrix * mask

    n_of_m.__name__ = f"n_of_m_{n_kept}_{of}"
    return n_of_m


def two_of_four_quantized(g: Generator, m: int, n: int) -> Drawn:
    mask = torch.tensor([True, False, False, True]).repeat(m, -(-n // 4))[:, :n]
    shell = NofM.keep(torch.ones(m, n), mask, n=2, m=4)
    values, held = on_grid(4, 2, "integer")(g, *shell.values.shape)
    filled = torch.zeros(m, -(-n // 4), 4)
    filled[..., 0], filled[..., 3] = held[:, 0::2], held[:, 1::2]
    cut = filled.flatten(1)[:, :n]
    if n % 4 in (1, 2, 3):  # the last group reaches past the matrix: its second value is filled in somewhere before
        places = shell.places()[:, -1]
        cut[:, n - n % 4 :] = torch.zeros(m, 4).scatter(1, places, held[:, -2:])[:, : n % 4]
    return shell.with_values(values), cut


def block_sparse(g: Generator, m: int, n: int) -> Drawn:
    r, c = next(d for d in (3, 2, 1) if m % d == 0), next(d for d in (5, 2, 1) if n % d == 0)
    mask, matrix = torch.rand(m // r, n // c, generator=g) < 0.5, draw(g, m, n)
    return BlockSparse.keep(matrix, mask, block=(r, c)), matrix * mask.repeat_interleave(r, 0).repeat_interleave(c, 1)


def block_sparse_large(g: Generator, m: int, n: int) -> Drawn:
    """Large enough to be multiplied alone: the asked shape in blocks of 32."""
    mask, matrix = torch.rand(m, n, generator=g) < 0.4, draw(g, 32 * m, 32 * n)
    matrix = matrix * mask.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return BlockSparse.keep(matrix, mask, block=(32, 32)), matrix


def block_diagonal(g: Generator, m: int, n: int) -> Drawn:
    k = gcd(m, n)
    blocks = draw(g, k, m // k, n // k)
    return BlockDiagonal(blocks), torch.block_diag(*blocks)


def monarch(g: Generator, m: int, n: int) -> Drawn:
    k, into = next(d for d in (3, 2, 1) if n % d == 0), next(d for d in (4, 3, 2, 1) if m % d == 0)
    q, r = 2 * into, 2 * k
    first, second = draw(g, k, q, n // k), draw(g, into, m // into, r)
    matrix = torch.zeros(m, n)
    for place in range(k * q):  # place j*into + l of the middle: from output place % q of block place // q
        j, part = divmod(place, into)
        block, output = divmod(place, q)
        rows = torch.arange(m // into) * into + part
        columns = slice(block * (n // k), (block + 1) * (n // k))
        matrix[rows, columns] += torch.outer(second[part, :, j], first[block, output])
    return Monarch(first, second), matrix


def premerged(g: Generator, m: int, n: int) -> Drawn:
    weight, matrix = low_rank(g, m, n)
    return Premerged(weight, max_rows=2), matrix


def shared_rows(rule: str) -> Form:
    """Rows of a table picked in a loop."""

    def shared(g: Generator, m: int, n: int) -> Drawn:
        step = {"stored": 2, "quotient": 3}.get(rule, 1)
        blocks = -(-m // step)
        table = draw(g, {"stored": 4, "quotient": blocks}.get(rule, 3), n)
        index = whole(g, 2, blocks) if rule == "stored" else None
        place = {
            "stored": lambda i: 0 if index is None else int(index[i // 2]) * 2 + i % 2,
            "quotient": lambda i: i // 3,
            "remainder": lambda i: i % 3,
            "hash": lambda i: int(hash32_plain(np.array([i + 0x9E3779B9], dtype=np.uint64))[0]) % 3,
        }[rule]
        return SharedRows(Dense(table), index, rows=m, rule=rule, step=step), torch.stack(  # type: ignore[arg-type]
            [table[place(i)] for i in range(m)]
        )

    shared.__name__ = f"shared_rows_{rule}"
    return shared


def stacked(g: Generator, m: int, n: int) -> Drawn:
    parts = [low_rank(g, 1, n), dense(g, m - 1, n)] if m > 1 else [dense(g, m, n)]
    return Stacked(*(part[0] for part in parts)), torch.cat([part[1] for part in parts])


def stacked_beside(g: Generator, m: int, n: int) -> Drawn:
    parts = [low_rank(g, m, 1), dense(g, m, n - 1)] if n > 1 else [dense(g, m, n)]
    return Stacked(*(part[0] for part in parts), axis=1), torch.cat([part[1] for part in parts], dim=1)


def tensor_train(g: Generator, m: int, n: int) -> Drawn:
    d = next(k for k in range(min(n, 2), 0, -1) if n % k == 0)
    a, b, c = 2, -(-m // 4), 2
    first, second, third = draw(g, a, d, 2), draw(g, b, 2, n // d, 3), draw(g, c, 3, 1)
    matrix = torch.empty(m, n)
    for row in range(m):
        for column in range(n):
            one, two = first[row // (b * c), column // (n // d)], second[row // c % b, :, column % (n // d)]
            matrix[row, column] = one @ two @ third[row % c, :, 0]
    return TensorTrain(first, second, third, rows=m), matrix


def deep_hash(g: Generator, m: int, n: int) -> Drawn:
    hidden, bias, last, last_bias = draw(g, 4, 3), draw(g, 4), draw(g, n, 4), draw(g, n)
    key = hash32_plain(np.arange(3, dtype=np.uint64) + hash32_plain(np.array([5], dtype=np.uint64))[0])
    rows = []
    for i in range(m):
        code = (hash32_plain(np.uint64(i) ^ key) >> np.uint64(8)).astype(np.float64) / 2**23 - 1
        inner = hidden.double() @ torch.from_numpy(code) + bias.double()
        rows.append(last.double() @ (inner * torch.tanh(torch.log1p(inner.exp()))) + last_bias.double())
    return DeepHash(hidden, bias, last, last_bias, rows=m, seed=5), torch.stack(rows).float()


def kronecker(g: Generator, m: int, n: int) -> Drawn:
    m1, n1 = next(d for d in (3, 2, 1) if m % d == 0), next(d for d in (5, 2, 1) if n % d == 0)
    outer, inner = draw(g, m1, n1), draw(g, m // m1, n // n1)
    return Kronecker(outer, inner), torch.from_numpy(np.kron(outer.numpy(), inner.numpy()))


def diagonal(g: Generator, m: int, n: int) -> Drawn:
    values = draw(g, m)
    return Diagonal(values), torch.from_numpy(np.diag(values.numpy()))


def permutation(g: Generator, m: int, n: int) -> Drawn:
    index = torch.randperm(m, generator=g)
    return Permutation(index), torch.eye(m)[index]


def rotation(g: Generator, m: int, n: int) -> Drawn:
    """The Kronecker product that the transform must be, from its core; the core itself has tests of its own."""
    flipped = whole(g, 2, m)
    core, stages = core_of(m)
    whole_core = core.numpy()
    for _ in range(stages):
        whole_core = np.kron(whole_core, np.array([[1, 1], [1, -1]]) / 2**0.5)
    matrix = whole_core * (1 - 2 * flipped.numpy())
    return Rotation(torch.from_numpy(np.packbits(flipped.numpy(), bitorder="little")), columns=m), torch.from_numpy(
        matrix
    ).float()


def hash32_plain(x: np.ndarray) -> np.ndarray:
    """The hash in the arithmetic it is made for: 32-bit words that wrap around."""
    x = x.astype(np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def hashed(g: Generator, m: int, n: int) -> Drawn:
    """The matrix from what a probe with values 1, 2, 3, ... shows of places and signs."""
    count = max(1, m * n // 3)
    values = draw(g, count)
    shown = Hashed(torch.arange(1.0, count + 1), rows=m, columns=n, seed=7, offset=5).dense().detach()
    return Hashed(values, rows=m, columns=n, seed=7, offset=5, scale=0.5), 0.5 * values[
        shown.abs().long() - 1
    ] * shown.sign()


def random_basis(g: Generator, m: int, n: int) -> Drawn:
    coefficients = draw(g, 4)
    weight = RandomBasis(coefficients, rows=m, columns=n, seed=3)
    return weight, torch.einsum("k,kmn->mn", coefficients, weight.bases())


def transposed(g: Generator, m: int, n: int) -> Drawn:
    weight, matrix = on_grid(4, 3, "float")(g, n, m)
    return Transposed(weight), matrix.T


#: Forms of any shape.
FORMS: list[Form] = [
    dense,
    low_rank,
    low_rank_nothing,
    integers,
    on_grid(1, None, "none"),
    on_grid(2, 4, "integer"),
    on_grid(3, 4, "float"),
    on_grid(4, 3, "integer"),
    on_grid(5, 100, "float", torch.bfloat16),
    on_grid(8, 2, "none", torch.float32),
    quantized_e4m3,
    quantized_twice,
    quantized_per_tensor,
    codebook,
    codebook_of_groups,
    vector_codebook,
    lattice,
    grid_coded,
    entropy_coded,
    dictionary_coded,
    kept_at(0.0),
    kept_at(0.1),
    kept_at(0.6),
    kept_at(1.0),
    sparse_of_quantized,
    kept_n_of_m(1, 1),
    kept_n_of_m(2, 4),
    kept_n_of_m(8, 16),
    two_of_four_quantized,
    block_sparse,
    block_diagonal,
    monarch,
    premerged,
    shared_rows("stored"),
    shared_rows("quotient"),
    shared_rows("remainder"),
    shared_rows("hash"),
    stacked,
    stacked_beside,
    tensor_train,
    deep_hash,
    kronecker,
    hashed,
    random_basis,
    transposed,
]
#: Forms of square matrices alone.
SQUARE: list[Form] = [diagonal, permutation, rotation]


# --- expressions


def nested(g: Generator, m: int, n: int, depth: int) -> Drawn:
    """A random expression over every form, and its matrix."""

    def pick(below: int) -> int:
        return int(whole(g, below, 1))

    if depth == 0:
        found = FORMS + SQUARE if m == n else FORMS
        return found[pick(len(found))](g, m, n)
    kind = pick(4)
    if kind == 0:
        terms = [nested(g, m, n, depth - 1) for _ in range(1 + pick(3))]
        return Sum(*(weight for weight, _ in terms)), torch.stack([matrix for _, matrix in terms]).sum(0)
    if kind == 1:
        terms = [nested(g, m, n, depth - 1) for _ in range(2)]
        return Hadamard(*(weight for weight, _ in terms)), terms[0][1] * terms[1][1]
    if kind == 2:
        weight, matrix = nested(g, n, m, depth - 1)
        return weight.T, matrix.T
    # of equal sides, so that square forms take part
    inner = (m, n, 1 + pick(6))[pick(3)]
    left, right = nested(g, m, inner, depth - 1), nested(g, inner, n, depth - 1)
    return Product(left[0], right[0]), left[1] @ right[1]


# --- laws


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the norm of what is wanted."""
    assert found.shape == wanted.shape
    difference = (found.detach().double() - wanted.detach().double()).norm()
    assert difference <= tolerance * wanted.detach().double().norm() + 1e-7 * max(1, wanted.numel()) ** 0.5, (
        f"off by {float(difference):.3g} of {float(wanted.detach().double().norm()):.3g}"
    )


def inputs(weight: Weight, *leading: int, seed: int = 1) -> Tensor:
    """Random inputs of the width of ``weight``."""
    return draw(torch.Generator().manual_seed(seed), *leading, weight.shape[1])


def matches_dense(weight: Weight, matrix: Tensor) -> None:
    near(weight.dense(), matrix)
    assert weight.error(matrix) <= 1e-5 or not matrix.any()
    for leading in ((4,), (2, 3), (), (0,)):
        x = inputs(weight, *leading)
        near(weight(x), x @ matrix.T)
    half = weight(inputs(weight, 3).bfloat16())
    assert half.dtype == torch.bfloat16  # the dtype of the input, whatever the weight is kept in
    near(half, inputs(weight, 3).bfloat16().float() @ matrix.T, tolerance=0.1)


def multiplies_from_the_left(weight: Weight, matrix: Tensor) -> None:
    x = draw(torch.Generator().manual_seed(2), 2, 3, weight.shape[0])
    near(weight.left(x), x @ matrix)


def gradient_matches_dense(weight: Weight, matrix: Tensor) -> None:
    # in double: gradients of 16-bit scales are summed in 16 bits, each way with roundings of its own
    weight, generator = copy.deepcopy(weight).to(torch.float64), torch.Generator().manual_seed(3)
    pull = draw(generator, 4, weight.shape[0]).double()
    push = draw(generator, 4, weight.shape[1]).double()
    index = whole(generator, weight.shape[0], 4)
    trained = [parameter for parameter in weight.parameters() if parameter.requires_grad]

    def gradients(loss: Tensor, x: Tensor) -> list[Tensor]:
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in [x, *trained]]
        return torch.autograd.grad(loss, [x, *trained], allow_unused=True, materialize_grads=True)  # type: ignore[return-value]

    x, z = inputs(weight, 4).double().requires_grad_(), pull.clone().requires_grad_()
    whole_matrix = weight.dense()
    ways = [
        (gradients((weight(x) * pull).sum(), x), gradients((x @ weight.dense().double().T * pull).sum(), x)),
        (gradients((weight.left(z) * push).sum(), z), gradients((z @ weight.dense().double() * push).sum(), z)),
        (gradients((weight.rows(index) * push).sum(), x), gradients((whole_matrix[index] * push).sum(), x)),
    ]
    for ours, plain in ways:
        for mine, wanted in zip(ours, plain, strict=True):
            near(mine, wanted, tolerance=1e-5)


def transpose_matches(weight: Weight, matrix: Tensor) -> None:
    other = weight.T
    assert other.shape == (weight.shape[1], weight.shape[0])
    near(other.dense(), matrix.T)
    x = inputs(other, 3)
    near(other(x), x @ matrix)
    near(other.T.dense(), matrix)
    last = other.shape[0] - 1
    near(other.rows(torch.tensor([0, last])), matrix.T[[0, last]])


def rows_are_those_of_dense(weight: Weight, matrix: Tensor) -> None:
    last = weight.shape[0] - 1
    for index in (torch.tensor([0, last, 0]), torch.tensor([[last], [0]]), torch.tensor(0), torch.empty(0).long()):
        found = weight.rows(index)
        assert found.dtype == weight.dtype
        near(found, matrix[index])


def cost_is_what_a_file_holds(weight: Weight, matrix: Tensor) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "weight.safetensors"
        save(weight, path)
        content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert weight.cost().bytes == len(content) - 8 - header
    assert weight.cost().bytes == stored_bytes(weight)
    assert all(type(part) is int for part in (weight.cost().params, weight.cost().bytes, weight.cost().flops))


class _Entries(TorchDispatchMode):
    """Counts additions and multiplications of entries."""

    OPS = ("add", "add_", "sub", "mul", "mul_", "div", "sum", "index_add", "index_add_")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.OPS and found.is_floating_point():
            self.total += args[3].numel() if name.startswith("index_add") else found.numel()
        return found


def flops_are_what_a_counter_sees(weight: Weight, matrix: Tensor) -> None:
    def counted(rows: int) -> int:
        x = inputs(weight, rows)
        with torch.no_grad(), FlopCounterMode(display=False) as products, _Entries() as entries:
            weight(x)
        return products.get_total_flops() + entries.total

    counted(1)  # tables that are made once are made now
    # of one more row: what a call does once for all rows cancels
    assert counted(5) - counted(4) == weight.cost().flops


def survives_a_file(weight: Weight, matrix: Tensor) -> None:
    shape = json.loads(json.dumps(structure(weight)))
    with tempfile.TemporaryDirectory() as place:
        save(weight, Path(place) / "weight.safetensors")
        tensors = safetensors.torch.load_file(Path(place) / "weight.safetensors")
    again = rebuild(shape, tensors)
    assert structure(again) == structure(weight)
    assert again.shape == weight.shape
    state, wanted = again.state_dict(), weight.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) and state[key].dtype == wanted[key].dtype for key in wanted)
    x = inputs(weight, 3)
    assert torch.equal(again.dense(), weight.dense())
    near(again(x), weight(x), tolerance=1e-6)  # strides differ, and with them the order of sums


def save(weight: Weight, path: Path) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in weight.state_dict().items()}
    safetensors.torch.save_file(tensors, path)


def moves(weight: Weight, matrix: Tensor) -> None:
    assert weight.dtype == weight.dense().dtype
    far = copy.deepcopy(weight).to("meta")
    assert far.device.type == "meta"
    assert (far.shape, far.cost(), structure(far), far.dtype) == (
        weight.shape,
        weight.cost(),
        structure(weight),
        weight.dtype,
    )
    assert stored_bytes(far) == stored_bytes(weight)
    rebuilt = rebuild(structure(far), far.state_dict())
    assert rebuilt.cost() == weight.cost()
    wide = copy.deepcopy(weight).to(torch.float64)
    assert wide.dtype == wide.dense().dtype
    near(wide.dense(), matrix)
    x = inputs(weight, 2).double()
    assert wide(x).dtype == torch.float64
    near(wide(x), x @ matrix.double().T)


def computing_changes_nothing(weight: Weight, matrix: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    x = inputs(weight, 3)
    kept = x.clone()
    weight(x), weight.dense(), weight.rows(torch.tensor([0])), weight.T, weight.left(inputs(weight.T, 2))
    assert torch.equal(x, kept)
    after = weight.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def refuses_what_is_not_finite(weight: Weight, matrix: Tensor) -> None:
    state = weight.state_dict()
    for name in state:
        if not state[name].is_floating_point() or not state[name].numel():
            continue
        for wrong in (torch.nan, torch.inf):
            spoilt = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
            spoilt[name].view(-1)[-1] = wrong
            place, _, tensor_name = f"layers.3.{name}".rpartition(".")
            with pytest.raises(
                FormError, match=rf"^{place}: .*{tensor_name}: 1 of {state[name].numel()} values are NaN"
            ):
                rebuild(structure(weight), spoilt, "layers.3")


def refuses_a_damaged_file(weight: Weight, matrix: Tensor) -> None:
    state = weight.state_dict()
    for name in state:
        place, _, tensor_name = f"layers.3.{name}".rpartition(".")
        missing = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(FormError, match=rf"^{place}: .*needs a tensor '{tensor_name}' that the file does not hold"):
            rebuild(structure(weight), missing, "layers.3")
        if state[name].ndim:
            with pytest.raises((FormError, ShapeError), match=r"^layers\.3"):
                rebuild(structure(weight), state | {name: state[name][None]}, "layers.3")
    for shape in ({}, {"form": "no such"}, {"form": []}, [], {**structure(weight), "tensors": 3}):
        with pytest.raises(FormError, match=r"^layers\.3"):
            rebuild(shape, state, "layers.3")  # type: ignore[arg-type]
    with pytest.raises(FormError, match=r"^layers\.3"):
        rebuild({**structure(weight), "surplus": 1}, state, "layers.3")


LAWS = [
    matches_dense,
    multiplies_from_the_left,
    gradient_matches_dense,
    transpose_matches,
    rows_are_those_of_dense,
    cost_is_what_a_file_holds,
    flops_are_what_a_counter_sees,
    survives_a_file,
    moves,
    computing_changes_nothing,
    refuses_what_is_not_finite,
    refuses_a_damaged_file,
]
