"""Linformer layers and the choice of a route, against exact attention and a counter of multiplications."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.errors import DataError, OptionError
from pennyweight.levers.factorize import auto, routes
from pennyweight.levers.factorize.auto import Auto
from pennyweight.levers.factorize.routes import choose, crossing, flops
from pennyweight.model.loading import of_module, restore
from pennyweight.model.saving import save
from pennyweight.work import Work
from pennyweight.zoo.linformer import Attention, EncoderLayer


def made(**options):
    return Attention(16, 4, generator=torch.Generator().manual_seed(0), **options)


def test_as_many_mixtures_as_tokens_are_attention_itself():
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    plain, mixed = made(), made(length=9, keys=9)
    mixed.load_state_dict({k: v for k, v in plain.state_dict().items() if "_mix" not in k}, strict=False)
    with torch.no_grad():
        mixed.key_mix.copy_(torch.eye(9))
        mixed.value_mix.copy_(torch.eye(9))
    torch.testing.assert_close(mixed(x), plain(x), rtol=1e-5, atol=1e-6)


def test_mixtures_are_of_the_paper():
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
    layer = made(length=10, keys=3)
    query, key, value = (p(x)[0].view(7, 4, 4).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    short = layer.key_mix[:, :7] @ key, layer.value_mix[:, :7] @ value  # each head by the same pair
    weights = (query @ short[0].mT / 2).softmax(-1)
    wanted = layer.o_proj((weights @ short[1]).transpose(0, 1).reshape(1, 7, 16))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert layer.key_mix.grad[:, :7].abs().min() > 0
    assert not layer.key_mix.grad[:, 7:].any()


def test_counts_are_those_of_a_counter():
    x = torch.randn(1, 64, 32)
    wanted = flops(64, width=32, keys=8)
    for way, options in (("dense", {}), ("linformer", {"length": 64, "keys": 8})):
        layer = EncoderLayer(32, 4, **options)
        # fused attention on processors is not counted
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == wanted[way]
    at = crossing(width=32, keys=8)
    below, above = (flops(int(at) + step, width=32, keys=8) for step in (-1, 1))
    assert below["low_rank"] < below["linformer"]
    assert above["low_rank"] > above["linformer"]


@pytest.mark.parametrize("width", [384, 768])
def test_encoders_of_512_positions_are_too_short_for_mixtures(width):
    # what the docstring of the lever says of encoders of BERT's kind: one mixture alone is not few enough
    assert crossing(width=width, keys=1) >= 1154
    found = flops(512, width=width, keys=1)
    assert found["low_rank"] < found["linformer"]


def test_the_fastest_way_is_chosen_by_the_clock(monkeypatch):
    monkeypatch.setattr(routes.latency, "in_turns", lambda calls, **options: [[call() is None for call in calls]])
    found = choose(12, width=16, num_heads=4, keys=4)
    assert set(found.milliseconds) == {"dense", "low_rank", "linformer"}
    said = [[0.003, 0.002, 0.004], [0.003, 0.002, 0.9]]
    monkeypatch.setattr(routes.latency, "in_turns", lambda calls, **options: said)
    found = choose(12, width=16, num_heads=4, keys=4)
    assert found.best == "low_rank"
    assert found.milliseconds["dense"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("times", "mixed"), [((3.0, 2.0, 1.0), True), ((3.0, 1.0, 2.0), False), ((1.0, 2.0, 3.0), False)]
)
def test_one_call_takes_mixtures_where_the_clock_says_so_and_they_survive_a_file(tmp_path, monkeypatch, times, mixed):
    def stack():
        g = torch.Generator().manual_seed(0)
        return nn.Sequential(*(EncoderLayer(16, 4, generator=g) for _ in range(2)))

    monkeypatch.setattr(auto.latency, "in_turns", lambda calls, **options: [times] * 3 if [c() for c in calls] else [])
    monkeypatch.setattr(auto, "time_ratio", lambda *given: 0.5)
    model = of_module(stack(), name="stack")
    before = stack()[0].attention
    Auto(rank=0.5, keys=4, tokens=12, dtype="float32").change(
        model, Work(model=model, windows=None, maps=model.anatomy.maps())
    )
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    layer = model.module[0].attention
    assert len(layer.key_mix) == (4 if mixed else 0)
    assert isinstance(layer.q_proj, nn.Linear) == mixed  # else it became factors
    assert not isinstance(model.module[0].up_proj, nn.Linear)
    if mixed:
        torch.testing.assert_close(layer.key_mix, torch.kron(torch.eye(4), torch.full((1, 3), 1 / 3)))
        means = before.k_proj(x).view(2, 4, 3, 16).mean(2)
        torch.testing.assert_close(layer.key_mix @ layer.k_proj(x), means)
    save(model, tmp_path / "out")
    again = restore(stack(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.module(x), model.module(x))
    if mixed:
        with pytest.raises(OptionError, match="4 mixtures of 3 tokens"):
            Auto(keys=4, tokens=3).change(
                of_module(stack()), Work(model=model, windows=None, maps=model.anatomy.maps())
            )


def test_bad_sizes_are_refused_with_the_remedy():
    plain = of_module(nn.Sequential(nn.Linear(8, 8)), name="plain")
    with pytest.raises(OptionError, match="keys = 4, and no attention here looks at mixtures; leave keys out"):
        Auto(keys=4).change(plain, Work(model=plain, windows=None, maps=plain.anatomy.maps()))
    with pytest.raises(OptionError, match="give a width that heads divide, and both or neither"):
        Attention(16, 3)
    with pytest.raises(OptionError, match="20 keys for a length of 10; give 1 to 10"):
        made(length=10, keys=20)
    with pytest.raises(DataError, match="a sequence of 11 tokens; this layer's are 10"):
        made(length=10, keys=2)(torch.zeros(1, 11, 16))
    with pytest.raises(OptionError, match="a length of 0"):
        choose(0, width=16, num_heads=4)
