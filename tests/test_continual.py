"""Steps against clips (row 239): torch's own convolutions, pooling and encoders over whole windows are the oracle."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.errors import ModelError, OptionError, ShapeError
from pennyweight.stream import (
    Encoder,
    Mean,
    Parallel,
    RecyclingPositions,
    Residual,
    Retroactive,
    Sequential,
    Shift,
    SingleOutput,
    continual,
)
from pennyweight.weights import CompactConv1d, Quantized
from pennyweight.zoo import retroactive

SMALL = 1e-6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def norms(module):
    """Batch norms that do something."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return module


def off(found, wanted):
    assert found.shape == wanted.shape
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


LAYERS = {
    "plain": (lambda: nn.Conv1d(3, 5, 4), (3,)),
    "dilated": (lambda: nn.Conv1d(3, 5, 3, dilation=4), (3,)),
    "padded": (lambda: nn.Conv1d(3, 5, 5, padding=2), (3,)),
    "same": (lambda: nn.Conv1d(3, 5, 3, dilation=2, padding="same"), (3,)),
    "strided": (lambda: nn.Conv1d(3, 5, 5, stride=3, padding=1, bias=False), (3,)),
    "grouped": (lambda: nn.Conv1d(4, 8, 3, groups=2), (4,)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, dilation=2), (4,)),
    "one tap": (lambda: nn.Conv1d(3, 5, 1), (3,)),
    "rows": (lambda: nn.Conv2d(2, 4, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)), (2, 9)),
    "video": (lambda: nn.Conv3d(2, 4, (3, 3, 2), stride=(2, 2, 1), padding=(1, 1, 0), groups=2), (2, 6, 5)),
    "average": (lambda: nn.AvgPool1d(4, stride=2, padding=1), (3,)),
    "average of positions": (lambda: nn.AvgPool3d((2, 2, 2), stride=(1, 2, 2)), (3, 4, 6)),
    "maximum": (lambda: nn.MaxPool1d(3, stride=1, padding=1), (3,)),
    "maximum of positions": (lambda: nn.MaxPool2d((3, 2), stride=2, padding=(1, 0)), (3, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("steps", [9, 40])
def test_a_layer_gives_what_torch_gives_on_the_whole_clip(layer, steps):
    make, (channels, *positions) = LAYERS[layer]
    module = make().eval()
    x = torch.randn(2, channels, steps, *positions)
    stepwise = continual(module)
    assert off(stepwise.forward_steps(x, end=True), module(x)) < SMALL
    # and again: the end of a stream leaves nothing behind
    assert off(stepwise.forward_steps(x, end=True), module(x)) < SMALL


def network():
    inner = nn.Sequential(nn.Conv1d(8, 8, 5, padding=2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 8, 3, padding=1))
    body = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())
    tail = nn.Sequential(nn.MaxPool1d(2, stride=1), nn.Conv1d(8, 6, 3, dilation=3), nn.AvgPool1d(2))
    return (norms(part.eval()) for part in (body, inner, tail))


@pytest.mark.parametrize("end", [True, False])
def test_a_stack_with_a_residual_gives_what_its_parts_give(end):
    body, inner, tail = network()
    x = torch.randn(2, 3, 500)
    y = body(x)
    wanted = tail(y + inner(y))
    stepwise = continual(nn.Sequential(body, Residual(continual(inner)), tail))
    assert off(stepwise(x), wanted) < SMALL
    found = stepwise.forward_steps(x, end=end)
    if not end:  # two outputs of the residual are still to come, which the pooling halves
        assert stepwise.padding == 3
        assert 0 < wanted.shape[2] - found.shape[2] <= 2
    assert off(found, wanted[:, :, : found.shape[2]]) < SMALL


def test_a_stream_may_come_in_pieces_and_the_first_output_comes_after_the_delay():
    body, inner, tail = network()
    stepwise = continual(nn.Sequential(body, Residual(continual(inner)), tail))
    x = torch.randn(1, 3, 60)
    whole = stepwise.forward_steps(x)
    stepwise.clear()
    pieces = [stepwise.forward_steps(x[:, :, start : start + 7]) for start in range(0, 60, 7)]
    assert torch.equal(torch.cat([piece for piece in pieces if piece is not None], 2), whole)
    stepwise.clear()
    first = next(index for index in range(60) if stepwise.forward_step(x[:, :, index]) is not None)
    assert first == stepwise.delay


@pytest.mark.parametrize("shrink", ["centered", "lagging"])
def test_a_residual_around_a_shorter_clip_takes_its_middle_or_its_end(shrink):
    conv = nn.Conv1d(4, 4, 3, dilation=2)
    x = torch.randn(1, 4, 30)
    kept = {"centered": x[:, :, 2:-2], "lagging": x[:, :, 4:]}[shrink]
    stepwise = Residual(continual(conv), shrink=shrink)
    assert off(stepwise.forward_steps(x, end=True), kept + conv(x)) < SMALL


def test_branches_wait_for_each_other():
    slow, quick = nn.Conv1d(3, 2, 7), nn.Conv1d(3, 4, 3)
    stepwise = Parallel(continual(slow), Sequential(continual(quick), Shift(1, 3)), how="concatenate")
    x = torch.randn(2, 3, 40)
    wanted = torch.cat([slow(x), quick(x)[:, :, 1:-3]], 1)
    assert off(stepwise.forward_steps(x, end=True), wanted) < SMALL
    with pytest.raises(OptionError, match=r"shorten clips by \(steps, stride\) \[\(2, 1\), \(6, 1\)\]"):
        Parallel(continual(slow), continual(quick))


def test_a_layer_may_stand_in_two_places_and_a_stream_in_one():
    conv = nn.Conv1d(3, 3, 3, padding=1)
    stepwise = continual(nn.Sequential(conv, nn.ReLU(), conv))
    x = torch.randn(2, 3, 12)
    wanted = conv(conv(x).relu())
    stepwise.forward_steps(x[:, :, :5])
    stepwise.clear()
    assert off(stepwise.forward_steps(x, end=True), wanted) < SMALL
    for batch in (1, 4):  # another number of streams after the end of the last
        more = torch.randn(batch, 3, 9)
        assert off(stepwise.forward_steps(more, end=True), stepwise(more)) < SMALL
    once = Residual(continual(conv))
    with pytest.raises(ModelError, match="one and the same part stands in two places"):
        continual(nn.Sequential(once, once))
    with pytest.raises(ModelError, match="one and the same part stands in two places"):
        Parallel(once, once)


def test_a_head_gives_at_every_step_what_the_network_gives_on_the_clip_that_ends_there():
    module = nn.Sequential(
        nn.Conv3d(1, 4, (3, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip
    norms(module.eval())
    x = torch.randn(2, 1, 30, 5, 5)
    found = continual(module, window=12).forward_steps(x)
    clips = torch.stack([module(x[:, :, start : start + 12]) for start in range(19)], 2)
    assert off(found, clips) < SMALL
    assert off(continual(module, window=12)(x), clips) < SMALL


def test_compact_layers_stream_as_they_are():
    layer = nn.Conv1d(4, 6, 5)
    compact = CompactConv1d.of(layer, Quantized.nearest(layer.weight.detach().flatten(1), bits=4, group_size=4))
    x = torch.randn(1, 4, 30)
    stepwise = continual(nn.Sequential(compact, nn.ReLU()))
    assert off(stepwise.forward_steps(x), compact(x).relu()) < SMALL
    stepwise.clear()
    assert off(stepwise.forward_steps(x), layer(x).relu()) > 0.01


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("window", [1, 9])
@pytest.mark.parametrize("kind", [SingleOutput, Retroactive])
def test_attention_gives_what_torch_gives_on_every_window(kind, window, batch_first):
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(2, 12, 520)
    attention = kind(layer, window)
    with torch.no_grad():
        found = attention.forward_steps(x)
        assert off(found, attention(x)) < SMALL
        last = x[:, :, -window:].mT if batch_first else x[:, :, -window:].permute(2, 0, 1)
        own = layer(last, last, last)[0]
        own = own.mT if batch_first else own.permute(1, 2, 0)
        assert off(found[:, :, -1], own if kind is Retroactive else own[:, :, -1]) < SMALL


def test_scores_that_no_exponential_holds_are_no_trouble():
    layer = nn.MultiheadAttention(12, 3).eval().double()
    x = 60 * torch.randn(2, 12, 200, dtype=torch.float64)
    with torch.no_grad():
        query, key, _ = Retroactive(layer, 2)._heads(x.movedim(2, 0).flatten(0, 1))
        assert float((query @ key.mT).max()) > 1000  # float64 ends at e^709
        for kind in (SingleOutput, Retroactive):
            attention = kind(layer, 9)
            assert off(attention.forward_steps(x), attention(x)) < 1e-9


def test_sums_are_taken_anew_where_the_step_that_leaves_was_nearly_all_of_them(monkeypatch):
    layer = nn.MultiheadAttention(4, 1, bias=False, batch_first=True).eval()
    taken, plain = [], retroactive._sums
    monkeypatch.setattr(retroactive, "_sums", lambda q, k, v: taken.append(q.shape[2]) or plain(q, k, v))
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
        x = torch.rand(1, 4, 60)
        x[:, :, 20] = 20.0  # scores of 20 and more beside those of about 1
        attention = Retroactive(layer, 8)
        assert off(attention.forward_steps(x)[:, :, 21:], attention(x)[:, :, 21:]) < SMALL
        assert taken.count(8) == 2  # at the start, and when step 20 leaves
        monkeypatch.setattr(retroactive, "_LOST", 0.0)
        attention.clear()
        assert off(attention.forward_steps(x)[:, :, 21:], attention(x)[:, :, 21:]) > SMALL


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_encoder_gives_the_newest_output_of_torchs_on_every_window(depth, norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", norm_first=norm_first, batch_first=True)
    encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for one in encoder.parameters():
        nn.init.normal_(one, std=0.3)
    x = torch.randn(2, 16, 60)
    stepwise = Encoder(encoder, 10)
    with torch.no_grad():
        found = stepwise.forward_steps(x)
        wanted = torch.stack([encoder(x[:, :, start : start + 10].mT)[:, -1] for start in range(51)], 2)
    assert off(found, wanted) < 2 * SMALL


def test_positions_recycle():
    positions = torch.randn(3, 5)
    x = torch.zeros(1, 3, 12)
    stepwise = RecyclingPositions(positions)
    assert torch.equal(stepwise.forward_steps(x)[0], positions[:, torch.arange(12) % 5])
    stepwise.clear()
    assert torch.equal(stepwise.forward_steps(x), stepwise(x))


def test_a_step_costs_the_share_of_a_clip_that_is_new():
    module = nn.Sequential(nn.Conv1d(8, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5))
    stepwise, x = continual(module), torch.randn(1, 8, 64)
    stepwise.forward_steps(x)
    with FlopCounterMode(display=False) as step:
        stepwise.forward_step(x[:, :, 0])
    with FlopCounterMode(display=False) as clip:
        module(x)
    assert step.get_total_flops() == 2 * (8 * 16 * 5 + 16 * 16 * 5)
    assert clip.get_total_flops() == 2 * (60 * 8 * 16 * 5 + 56 * 16 * 16 * 5)


def test_what_was_seen_is_not_saved_and_gradients_pass_through_steps():
    module = nn.Sequential(nn.Conv1d(2, 3, 3))
    stepwise = continual(module)
    twin = copy.deepcopy(stepwise)
    before = {name: value.clone() for name, value in stepwise.state_dict().items()}
    x = torch.randn(1, 2, 8)
    stepwise.forward_steps(x).square().sum().backward()
    stepped = module[0].weight.grad.clone()
    module[0].weight.grad = None
    module(x).square().sum().backward()
    assert torch.allclose(stepped, module[0].weight.grad, rtol=1e-4, atol=1e-5)
    assert before.keys() == stepwise.state_dict().keys()
    assert stepwise.parts[0].layer is module[0]
    assert torch.equal(twin(x), stepwise(x))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.LSTM(3, 3)), r"LSTM\(3, 3\) may mix steps"),
        (nn.Sequential(nn.Conv1d(3, 3, 3), nn.Linear(3, 3)), "may mix steps"),
        (nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), "pads by circular; only zeros"),
        (nn.Conv1d(3, 3, 4, padding="same"), "pads one side more than the other; give odd kernels"),
        (nn.AvgPool1d(3, padding=1, count_include_pad=False), "leaves its padding out"),
        (nn.MaxPool1d(3, dilation=2), "rounds up, dilates"),
        (nn.Conv1d(3, 3, 3, padding=4), "4 steps of padding around 3 that an output reads"),
        (nn.AdaptiveAvgPool1d(1), "averages over a whole clip; give window"),
        (nn.AdaptiveAvgPool1d(3), "keeps several positions; give output size 1"),
    ],
)
def test_what_cannot_be_stepped_is_refused(module, words):
    with pytest.raises(ModelError, match=words):
        continual(module)


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="window = 3, but one output reads 5 steps"):
        continual(nn.Sequential(nn.Conv1d(1, 1, 5), nn.AdaptiveAvgPool1d(1)), window=3)
    with pytest.raises(OptionError, match="a window of 0 steps"):
        SingleOutput(nn.MultiheadAttention(4, 1), 0)
    with pytest.raises(OptionError, match="a mean over 0 steps"):
        Mean(0)
    with pytest.raises(OptionError, match="stride 1 and an even number"):
        Residual(continual(nn.Conv1d(2, 2, 2)))
    with pytest.raises(ModelError, match="an encoder of 3 layers; give one or two"):
        Encoder(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1), 3, enable_nested_tensor=False), 5)
    stepwise = continual(nn.Conv1d(2, 2, 2))
    stepwise.forward_step(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"a step of shape \(3, 2\) after steps of \(1, 2\); call clear\(\)"):
        stepwise.forward_step(torch.zeros(3, 2))
