"""Products of one row by the C routine, against the plain way."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight import native
from pennyweight.measure import kernels
from pennyweight.weights import Quantized, one_row
from pennyweight.weights.entropy import EntropyCoded

pytestmark = pytest.mark.skipif(native.library("matvec") is None, reason="no C compiler")


def entropy(m: int, n: int, *, far: bool = False) -> EntropyCoded:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-60, 60, (m, n), generator=g)
    if far:
        codes[m // 2, n - 1], codes[m - 1, 0] = 900, -4000
    rows, columns = (torch.randint(100, 150, (size,), generator=g, dtype=torch.uint8) for size in (m, n))
    return EntropyCoded.encode(codes, rows, columns, step=0.01)


def plain(weight: torch.nn.Module, x: Tensor) -> Tensor:
    return (x.double() @ weight.dense().double().T).to(x.dtype)


CASES = [
    entropy(33, 40), entropy(128, 600, far=True),
    *(Quantized.nearest(torch.randn(70, 256, generator=torch.Generator().manual_seed(bits)), bits=bits, group_size=64)
      for bits in range(1, 9)),
    *(Quantized.nearest(torch.randn(37, 96), bits=bits, group_size=size, zero_kind=kind, symmetric=kind == "none")
      for bits, size, kind in (
          (4, 32, "float"), (4, 48, "none"), (3, 20, "integer"), (2, None, "float"), (4, 7, "integer"))),
]  # fmt: skip


@pytest.mark.parametrize("weight", CASES, ids=lambda w: f"{type(w).__name__}-{getattr(w, 'bits', '')}-{w.shape}")
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_to_the_plain_product(weight: torch.nn.Module, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(1))
    called = []
    routine = one_row.multiply
    monkeypatch.setattr(one_row, "multiply", lambda *given: called.append(1) or routine(*given))
    with torch.no_grad():
        found = weight(x)
    assert called
    wanted = plain(weight, x)
    assert (found - wanted).abs().max() < 2e-6 * (x.abs() @ weight.dense().abs().T).max()
    with torch.no_grad():
        half = weight(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 0.02 * wanted.abs().max() + 0.02


def test_gradients_and_many_rows_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_row, "multiply", lambda *_: pytest.fail("not here"))
    weight = Quantized.nearest(torch.randn(16, 64), bits=4, group_size=32)
    x = torch.randn(1, 64, requires_grad=True)
    weight(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        weight(torch.randn(one_row.limit("4 bits", torch.float32) + 1, 64))


def test_rows_follow_what_was_measured_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path))
    assert one_row.limit("4 bits", torch.bfloat16) == one_row.ROWS[torch.bfloat16]
    monkeypatch.setattr(kernels, "_SHAPE", (32, 64))
    monkeypatch.setattr(kernels, "_COPIES", 1)
    monkeypatch.setattr(kernels, "KINDS", {kind: kernels.KINDS[kind] for kind in ("bytes", "4 bits")})
    measured = kernels.rows()
    assert set(measured) == {f"{kind} {form}" for kind in ("bytes", "4 bits") for form in ("float32", "bfloat16")}
    one_row.keep_limits({"4 bits float32": 2, "bytes bfloat16": 0})
    assert one_row.limit("4 bits", torch.float32) == 2
    assert one_row.limit("bytes", torch.bfloat16) == 0
    with one_row.limited("bytes", 9):
        assert one_row.limit("bytes", torch.bfloat16) == 9
    weight = Quantized.nearest(torch.randn(16, 64), bits=4, group_size=32)
    seen = []
    multiply = one_row.multiply
    monkeypatch.setattr(one_row, "multiply", lambda *given: seen.append(1) or multiply(*given))
    with torch.no_grad():
        for count in (1, 2, 3):
            weight(torch.randn(count, 64))
    assert len(seen) == 2
    one_row.limits_place().write_text("{}")  # another version's, or damaged
    one_row.keep_limits({})
    assert one_row.limit("4 bits", torch.float32) == one_row.ROWS[torch.float32]


def test_what_was_prepared_follows_its_weight() -> None:
    weight = Quantized.nearest(torch.randn(16, 64), bits=4, group_size=32, scale_dtype=torch.float32)
    x = torch.randn(1, 64)
    with torch.no_grad():
        first = weight(x)
        weight.scale.matrix.mul_(2)
        assert torch.allclose(weight(x), plain(weight, x), atol=1e-5)
        assert not torch.allclose(first, weight(x))
        for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
            weight.packed.zero_()
            assert torch.allclose(other(x), plain(other, x), atol=1e-5)
