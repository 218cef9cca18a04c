"""prune.filters and beta-rank against plain loops, invariances, and the masked network."""

from dataclasses import replace

import pytest
import torch
from reference.beta_rank import as_published, described
from torch import nn

from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.levers.prune.filters import Filters, filter_scores
from pennyweight.model.model import Model
from pennyweight.solvers.filters import beta_rank, l1
from pennyweight.surgery import trace
from pennyweight.work import Work
from pennyweight.zoo.resnet import ResNet, ResNetConfig


def conv(stride=1, padding=1, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 6, 3, stride=stride, padding=padding, **options)
    inputs = torch.randn(5, 3, 8, 8) * torch.rand(5, 3, 8, 8)
    return layer, inputs, layer(inputs).detach()


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_beta_rank_is_that_of_plain_loops(stride, padding):
    layer, inputs, outputs = conv(stride, padding)
    expected = described(inputs.numpy(), outputs.numpy(), layer.weight.detach().numpy(), stride, padding)
    torch.testing.assert_close(
        beta_rank(layer, inputs, outputs), torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6
    )


def test_the_published_indexing_gives_other_ranks():
    layer, inputs, outputs = conv(padding=0)
    inputs[:, 0] *= 20  # a loud channel: cut along channels, most patches miss it
    outputs = layer(inputs).detach()
    arrays = inputs.numpy(), outputs.numpy(), layer.weight.detach().numpy()
    assert abs(as_published(*arrays) - described(*arrays, 1)).max() > 0.01


def test_groups_read_their_own_channels():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2)
    inputs = torch.randn(4, 4, 6, 6) * torch.tensor([1.0, 1.0, 9.0, 9.0]).view(1, 4, 1, 1)
    found = beta_rank(layer, inputs, layer(inputs))
    halves = []
    for group in range(2):
        part = nn.Conv2d(2, 3, 3)
        part.weight.data, part.bias.data = (
            layer.weight[3 * group : 3 * group + 3],
            layer.bias[3 * group : 3 * group + 3],
        )
        own = inputs[:, 2 * group : 2 * group + 2]
        spread = torch.nn.functional.unfold(own, 3).double().std((0, 1), correction=0)
        ratio = part(own).flatten(2).double().std(0, correction=0) / spread
        halves.append(l1(part) * ratio.sum(1).float())
    raw = torch.cat(halves)
    torch.testing.assert_close(found, (raw - raw.min()) / (raw.max() - raw.min()))


def test_loudness_cancels_and_a_constant_filter_is_last():
    layer, inputs, _ = conv(bias=False)
    quiet = beta_rank(layer, inputs, layer(inputs))
    torch.testing.assert_close(beta_rank(layer, 7 * inputs, layer(7 * inputs)), quiet)
    outputs = layer(inputs).detach()
    outputs[:, 2] = 3.0
    found = beta_rank(layer, inputs, outputs)
    assert int(found.argmin()) == 2
    assert float(found.min()) == 0


def test_what_never_varies_counts_nothing():
    layer, inputs, outputs = conv()
    assert torch.equal(beta_rank(layer, torch.ones_like(inputs), layer(torch.ones_like(inputs))), torch.zeros(6))
    with pytest.raises(ShapeError, match="two or more"):
        beta_rank(layer, inputs[:1], outputs[:1])
    with pytest.raises(ShapeError, match="pads by other things"):
        beta_rank(nn.Conv2d(3, 6, 3, padding="same"), inputs, outputs)


# ---- the lever


def network():
    torch.manual_seed(0)
    module = ResNet(ResNetConfig(width=8), generator=torch.Generator().manual_seed(0)).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Model(module, None, "resnet", "module")
    return model, Work(model=model, windows=images, maps=model.anatomy.layers())


@pytest.mark.parametrize("score", ["beta_rank", "l1"])
def test_the_least_filters_go_and_the_rest_computes_as_before(score):
    model, work = network()
    graph = trace(model.module, (work.windows,))
    scores = filter_scores(model.module, graph, (work.windows,), score, {one.path for one in work.maps})
    assert [found.numel() for found in scores.values()] == [8, 16, 32], "the inner channels of three blocks"
    expected, _ = network()
    with torch.no_grad():
        for index, found in enumerate(scores.values()):
            gone = found.argsort(stable=True)[: len(found) // 4]
            expected.module.blocks[index].second.weight[:, gone] = 0  # nobody reads them
        wanted = expected.module(work.windows)
    Filters(sparsity=0.25, score=score).change(model, work)
    assert [block.first.out_channels for block in model.module.blocks] == [6, 12, 24]
    torch.testing.assert_close(model.module(work.windows), wanted, rtol=1e-4, atol=1e-5)


def test_shares_round_down_and_some_stay():
    model, work = network()
    Filters(sparsity=0.3).change(model, work)
    assert [block.first.out_channels for block in model.module.blocks] == [6, 12, 23]
    model, work = network()
    Filters(sparsity=1.0, fewest=3).change(model, work)
    assert [block.first.out_channels for block in model.module.blocks] == [3, 3, 3]
    model, work = network()
    before = model.module(work.windows)
    Filters(sparsity=0.0).change(model, work)
    assert torch.equal(model.module(work.windows), before)


def test_only_what_is_selected_shrinks():
    model, work = network()
    chosen = tuple(one for one in work.maps if one.path == "blocks.1.first")
    Filters(sparsity=0.5).change(model, replace(work, maps=chosen))
    assert [block.first.out_channels for block in model.module.blocks] == [8, 8, 32]


def test_what_it_cannot_prune_is_named():
    model, work = network()
    stem = tuple(one for one in work.maps if one.path == "stem")
    with pytest.raises(OptionError, match="no convolution that the step selects"):
        Filters().change(model, replace(work, maps=stem))
    with pytest.raises(DataError, match="give some"):
        Filters().change(model, replace(work, windows=None))
    with pytest.raises(OptionError, match="beta_rank, l1"):
        make("prune.filters", {"score": "beta"})
