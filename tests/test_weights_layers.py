"""Compact layers compute what the framework's layers compute, and stay tied where those are."""

import copy

import pytest
import torch
from torch import nn

from pennyweight.errors import OptionError, ShapeError
from pennyweight.weights import (
    BlockDiagonal,
    CompactConv1d,
    CompactConv2d,
    CompactEmbedding,
    CompactLinear,
    Dense,
    LowRank,
    Product,
    Quantized,
    Sum,
    stored_bytes,
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


#: A kernel as a matrix (m, n), in the forms that convolve in ways of their own, and one that does not.
FORMS = [
    Dense,
    lambda w: LowRank.nearest(w, min(w.shape)),
    lambda w: Product(Dense(torch.eye(len(w)) * 2), LowRank.nearest(w / 2, min(w.shape))),
    lambda w: Sum(Quantized.nearest(w, bits=3), Dense(w - Quantized.nearest(w, bits=3).dense())),
]


# --- linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", FORMS)
def test_linear(make, bias):
    plain = filled(nn.Linear(5, 4, bias=bias))
    compact = CompactLinear(make(plain.weight.detach()), plain.bias)
    x = normal(1, 2, 3, 5)
    torch.testing.assert_close(compact(x), plain(x))
    assert (compact.in_features, compact.out_features) == (5, 4)
    assert compact.bias is plain.bias
    half = compact(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_linear_refuses_in_words():
    with pytest.raises(ShapeError, match=r"bias \(3,\) for a weight \(2, 4\); give \(2,\)"):
        CompactLinear(Dense(torch.ones(2, 4)), torch.ones(3))
    with pytest.raises(ShapeError, match=r"input \(7, 3\) for a weight \(2, 4\)"):
        CompactLinear(Dense(torch.ones(2, 4)))(torch.ones(7, 3))


# --- convolutions


SETTINGS_2D = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (3, 2), "padding": (1, 1), "padding_mode": "circular"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 1, "padding": 1, "padding_mode": "replicate", "groups": 2},
    {"kernel_size": 16, "stride": 16, "bias": False},
]


@pytest.mark.parametrize("settings", SETTINGS_2D, ids=str)
@pytest.mark.parametrize("make", FORMS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution_of_images(make, settings):
    plain = filled(nn.Conv2d(4, 6, **settings))
    compact = CompactConv2d.of(plain, make(plain.weight.detach().flatten(1)))
    x = normal(1, 2, 4, 16, 17).requires_grad_()
    found, wanted = compact(x), plain(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(wanted.sum(), x)[0], rtol=1e-4, atol=1e-4
    )
    assert (compact.in_channels, compact.out_channels) == (4, 6)


SETTINGS_1D = [
    {"kernel_size": 3},
    {"kernel_size": 5, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "groups": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
]


@pytest.mark.parametrize("settings", SETTINGS_1D, ids=str)
@pytest.mark.parametrize("make", FORMS)
def test_convolution_of_sequences(make, settings):
    plain = filled(nn.Conv1d(4, 6, **settings))
    compact = CompactConv1d.of(plain, make(plain.weight.detach().flatten(1)))
    x = normal(1, 2, 4, 20)
    torch.testing.assert_close(compact(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_low_rank_kernel_does_not_make_the_whole_one(monkeypatch):
    weight = LowRank(normal(0, 64, 2), normal(1, 2, 4 * 9))
    wanted = nn.functional.conv2d(normal(2, 1, 4, 8, 8), weight.dense().view(64, 4, 3, 3))
    monkeypatch.setattr(LowRank, "dense", None)
    found = CompactConv2d(weight, kernel_size=3)(normal(2, 1, 4, 8, 8))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_convolutions_refuse_in_words():
    with pytest.raises(ShapeError, match=r"a weight \(6, 35\) is not \(out, in / groups \* 9\)"):
        CompactConv2d(Dense(torch.ones(6, 35)), kernel_size=3)
    with pytest.raises(ShapeError, match=r"a weight \(6, 18\) for a layer whose matrix is \(6, 36\)"):
        CompactConv2d.of(nn.Conv2d(4, 6, 3), Dense(torch.ones(6, 18)))
    with pytest.raises(ShapeError, match="has not 1 entries"):
        CompactConv1d(Dense(torch.ones(6, 18)), kernel_size=(3, 3))


# --- embeddings


def test_embedding_rows_factor_and_padding():
    plain = filled(nn.Embedding(7, 4, padding_idx=2))
    compact = CompactEmbedding(Dense(plain.weight.detach().clone()), padding_idx=2, factor=3.0)
    index = torch.tensor([[0, 2], [6, 0]])
    torch.testing.assert_close(compact(index), 3 * plain(index))
    (found,) = torch.autograd.grad(compact(index).sum(), compact.weight.parameters())
    assert found[:, 0].tolist() == [6, 0, 0, 0, 0, 0, 3]  # the padding gets no gradient
    assert (compact.num_embeddings, compact.embedding_dim) == (7, 4)
    assert CompactEmbedding(compact.weight, padding_idx=-1).padding_idx == 6
    with pytest.raises(OptionError, match="padding_idx 7 is not one of 7 rows"):
        CompactEmbedding(compact.weight, padding_idx=7)


def test_embedding_speaks_the_dtype_of_its_model():
    compact = CompactEmbedding(Quantized.nearest(normal(0, 9, 8), bits=4), factor=3.3, dtype=torch.bfloat16)
    assert list(compact.state_dict()) == list(Quantized.nearest(normal(0, 9, 8), bits=4).state_dict(prefix="weight."))
    found = compact(torch.arange(9))
    assert found.dtype == torch.bfloat16
    rounded = compact.weight.dense().bfloat16()
    assert torch.equal(found, rounded * torch.tensor(3.3, dtype=torch.bfloat16))
    assert not torch.equal(found, rounded * 3.3)  # the factor is rounded as well, as models round it
    assert copy.deepcopy(compact).float()(torch.tensor([3])).dtype == torch.float32
    assert CompactEmbedding(Dense(normal(0, 2, 2).half()))(torch.tensor(0)).dtype == torch.float16


@pytest.mark.parametrize(
    "make",
    [
        Dense,
        lambda w: Quantized.nearest(w, bits=4, group_size=4),
        lambda w: LowRank.nearest(w, 3),
        lambda w: Product(LowRank.nearest(w, 3), BlockDiagonal(torch.eye(4).expand(2, 4, 4))),
    ],
)
def test_a_tied_head_is_stored_once_and_trains_what_it_shares(make):
    weight = make(normal(0, 9, 8))
    model = nn.ModuleDict({"embedding": CompactEmbedding(weight), "head": CompactLinear(weight)})
    assert model["head"].weight is model["embedding"].weight
    assert stored_bytes(model) == weight.cost().bytes
    assert len(list(model.parameters())) == len(list(weight.parameters()))
    again = copy.deepcopy(model)
    assert again["head"].weight is again["embedding"].weight
    hidden = model["embedding"](torch.tensor([1, 2]))
    torch.testing.assert_close(model["head"](hidden), weight.dense()[[1, 2]] @ weight.dense().T)
    model["head"](hidden).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in weight.parameters())
