"""Images and their metrics, a model that draws them, two groups with a metric each, and the first token kept."""

import math

import families
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from pennyweight.errors import DataError, ModelError, OptionError, ShapeError
from pennyweight.evaluate.images import frechet_distance, sqnr, ssim
from pennyweight.levers.quantize.first_token import FirstToken, KeepFirstToken
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model.loading import of_module, restore
from pennyweight.model.saving import save
from pennyweight.plan.widths import Widths
from pennyweight.statistics import NO_STATISTICS
from pennyweight.train import Samples, Trainer
from pennyweight.weights.layers import CompactLinear
from pennyweight.work import Work
from pennyweight.zoo.dit import DiT, DiTConfig, draw, flow_loss


def images(count: int = 3, side: int = 16, seed: int = 0, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_similarity_is_the_formula_with_scipys_gaussian():
    one, other = images(2, 19), images(2, 19, seed=1)
    found = ssim(one, other)
    for index in range(2):
        x, y = one[index, 0].numpy(), other[index, 0].numpy()

        def mean(t: np.ndarray) -> np.ndarray:  # truncated at 5 pixels; the border it fills in is cut off
            return scipy.ndimage.gaussian_filter(t, 1.5, truncate=3.5)[5:-5, 5:-5]

        mx, my = mean(x), mean(y)
        vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        oracle = ((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        assert float(found[index]) == pytest.approx(oracle, rel=1e-9)


@given(a=floats(0.01, 1), b=floats(0.01, 1), seed=integers(0, 100))
def test_similarity_in_closed_form(a, b, seed):
    flat = torch.ones(1, 1, 12, 12, dtype=torch.float64)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)  # no variance: the luminance term alone
    assert float(ssim(a * flat, b * flat)) == pytest.approx(expected, rel=1e-9)
    one, other = images(1, 12, seed, channels=2), images(1, 12, seed + 1, channels=2)
    assert float(ssim(one, one)) == pytest.approx(1, abs=1e-12)
    assert float(ssim(one, other)) == pytest.approx(float(ssim(other, one)), rel=1e-12)
    assert float(ssim(one, other)) == pytest.approx(float(ssim(a * one, a * other, data_range=a)), rel=1e-6)


def test_signal_over_noise_counts_decibels():
    one = images()
    assert sqnr(one, 0.9 * one) == pytest.approx(20)
    assert sqnr(one, one) == math.inf


def test_the_distance_of_gaussians_is_scipys():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 4, generator=g).double(), 2 * torch.randn(50, 4, generator=g).double() + 1
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    oracle = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        first + second - 2 * scipy.linalg.sqrtm(first @ second).real
    )
    assert frechet_distance(a, b) == pytest.approx(float(oracle), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(36)
    few = torch.randn(3, 8, generator=g)  # singular covariances
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_metrics_say_what_they_want():
    with pytest.raises(ShapeError, match="at least the window's 11"):
        ssim(images(side=8), images(side=8))
    with pytest.raises(ShapeError, match="give equal"):
        ssim(images(2), images(3))
    with pytest.raises(OptionError, match="window = 4"):
        ssim(images(), images(), window=4)
    with pytest.raises(ShapeError, match="give equal shapes"):
        sqnr(images(2), images(3))
    with pytest.raises(DataError, match="at least two rows"):
        frechet_distance(torch.ones(1, 2), torch.ones(3, 2))
    with pytest.raises(ShapeError, match="rows, features"):
        frechet_distance(torch.ones(4, 2), torch.ones(4, 3))


# -- the model -------------------------------------------------------------------------------------------------------


def dit(seed: int = 0, **options: int) -> DiT:
    """A small one, every parameter moved off its initial value (gates are 0 there)."""
    g = torch.Generator().manual_seed(seed)
    made = DiT(DiTConfig(**{"width": 16, "depth": 2, "num_heads": 2, **options}), generator=g)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return made.eval()


def given_to(count: int = 3, channels: int = 1, length: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    texts = torch.randint(1, 11, (count, length), generator=g)
    texts[:, 0] = 0
    return torch.randn(count, channels, 8, 8, generator=g), torch.rand(count, generator=g), texts


def test_it_begins_by_drawing_nothing_and_each_block_as_the_identity():
    fresh = DiT(DiTConfig(), generator=torch.Generator().manual_seed(0))
    x, times, texts = given_to()
    assert not fresh(x, times, texts).any()
    assert all(not block.offset.any() for block in fresh.blocks)


def test_images_keep_their_places_and_everything_given_matters():
    model = dit(channels=2)
    x, times, texts = given_to(channels=2)
    with torch.no_grad():
        out = model(x, times, texts)
        assert out.shape == x.shape
        # one sample is nothing to another
        torch.testing.assert_close(model(x[1:2], times[1:2], texts[1:2]), out[1:2])
        for changed in ((x + 0.1, times, texts), (x, times + 0.1, texts), (x, times, texts.clamp_max(3))):
            assert (model(*changed) - out).abs().max() > 1e-3
        model.final.weight.zero_()
        model.final.bias.copy_(torch.arange(8.0))  # a patch of 2 channels of 2 x 2, the same everywhere
        tile = model(x, times, texts)[0]
        assert torch.equal(tile[:, :2, :2].flatten(), torch.arange(8.0))
        assert torch.equal(tile[:, 4:6, 2:4], tile[:, :2, :2])


def test_steps_follow_the_velocity_from_noise_to_image():
    class Straight(torch.nn.Module):
        """The true velocity of a straight path to ``target``: (x - target) / time."""

        def forward(self, x: torch.Tensor, times: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
            return (x - target) / times[:, None, None, None]

    noise, _, texts = given_to()
    target = images(3, 8).float()
    for steps in (1, 4):
        torch.testing.assert_close(draw(Straight(), texts, noise, steps=steps), target, atol=1e-5, rtol=1e-5)
    assert float(flow_loss(lambda x, t, _: (x - target) / t[:, None, None, None], target, texts)) < 1e-8
    with pytest.raises(OptionError, match="at least 1"):
        draw(Straight(), texts, noise, steps=0)


def test_it_learns_which_word_means_which_image():
    model = DiT(DiTConfig(width=16, depth=1, num_heads=2, vocabulary=3), generator=torch.Generator().manual_seed(0))
    texts = torch.tensor([[0, 1], [0, 2]]).repeat(32, 1)
    pictures = torch.where(texts[:, 1] == 1, 0.8, -0.8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    noise = torch.Generator().manual_seed(1)
    Trainer(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), Samples(pictures, texts, seed=0), batch=32,
        loss=lambda module, batch: flow_loss(module, *batch, noise),
    ).run(60)  # fmt: skip
    drawn = draw(model.eval(), texts[:6], torch.randn(6, 1, 8, 8, generator=noise))
    assert ((drawn.mean((1, 2, 3)) > 0) == (texts[:6, 1] == 1)).all()


def test_sizes_and_inputs_that_do_not_fit_are_said():
    for options in ({"width": 15}, {"num_heads": 3}, {"patch_size": 3}, {"vocabulary": 1}):
        with pytest.raises(OptionError, match=r"give sizes|do not tile"):
            DiTConfig(**options)
    x, times, texts = given_to()
    for bad in ((x[:, :, :4], times, texts), (x, times[:1], texts), (x, times, texts[:, 0])):
        with pytest.raises(DataError, match="DiT: images"):
            dit()(*bad)


# -- the first token -------------------------------------------------------------------------------------------------


def test_stored_keys_and_values_of_the_first_token_change_nothing():
    model, given = dit(), given_to()
    with torch.no_grad():
        before = model(*given)
        KeepFirstToken().change(of_module(model), Work(model=of_module(model), windows=None, maps=()))
        after = model(*given)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    # what is stored is what is used: other weights leave the first token alone
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.cross_attn.k_proj, block.cross_attn.v_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        assert (model(*given) - before).abs().max() > 1e-3
        alone = model(given[0], given[1], given[2][:, :1])
        torch.testing.assert_close(alone, dit()(given[0], given[1], given[2][:, :1]), rtol=0, atol=1e-6)


def test_it_is_saved_with_quantized_layers_and_loaded_again(tmp_path):
    model, given = dit(), given_to()
    model.keep_first_token()
    held = of_module(model)
    maps = [one for one in held.anatomy.layers() if one.kind != "embedding"]
    assert {one.role for one in maps} >= {"attention.query", "cross_attention.key", "ffn.up", "ffn.down"}
    widths = Widths.solve(
        held, maps, [RTN(bits=4, group_size=None)], dict.fromkeys([m.name for m in maps], NO_STATISTICS)
    )
    widths.put(dict.fromkeys(widths.weights, 0))
    with torch.no_grad():
        before = model(*given)
    assert isinstance(model.blocks[0].cross_attn.k_proj, CompactLinear)
    save(held, tmp_path / "out")
    again = restore(DiT(model.config), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.module(*given), before)
    assert torch.equal(again.module.blocks[1].cross_attn.first, model.blocks[1].cross_attn.first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_decoder_goes_on_from_its_stored_first_token(family):
    module = families.build(family)
    ids = families.inputs(family)["input_ids"]
    ids[:, 0] = 5
    first = FirstToken.of(module, 5)
    with torch.no_grad():
        whole = module(input_ids=ids).logits
    torch.testing.assert_close(first.scores(module, ids), whole, rtol=1e-4, atol=1e-4)
    # after its weights change, the first position still is the original's
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
        changed = module(input_ids=ids).logits
    kept = first.scores(module, ids)
    torch.testing.assert_close(kept[:, 0], whole[:, 0], rtol=1e-4, atol=1e-4)
    assert (kept[:, 1:] - changed[:, 1:]).abs().max() > 1e-3
    with pytest.raises(DataError, match="begin with 5"):
        first.scores(module, ids[:, 1:])


def test_models_without_a_first_token_are_told_so():
    bert = families.build("bert")
    with pytest.raises(ModelError, match="is for decoders"):
        FirstToken.of(bert, 3)
    model = of_module(bert)
    with pytest.raises(OptionError, match="FirstToken"):
        KeepFirstToken().change(model, Work(model=model, windows=None, maps=()))


# -- scores of any metric --------------------------------------------------------------------------------------------


def test_a_metric_is_taken_with_one_layer_changed_at_a_time():
    model = of_module(dit())
    maps = [one for one in model.anatomy.layers() if "ffn" in one.name]
    levers = [None, RTN(bits=2, group_size=None)]
    widths = Widths.solve(model, maps, levers, dict.fromkeys([m.name for m in maps], NO_STATISTICS))
    given = given_to()
    with torch.no_grad():
        clean = model.module(*given)
        found = widths.alone(lambda: float((model.module(*given) - clean).square().sum())).reshape(len(maps), 2)
        assert not found[:, 0].any()
        assert (found[:, 1] > 0).all()
        with widths.standing({maps[1].name: 1}):
            assert found[1, 1] == float((model.module(*given) - clean).square().sum())
