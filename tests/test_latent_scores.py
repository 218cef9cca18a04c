"""Scores of operators by the latents they move: closed forms, operators that do nothing, and the lever on them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.lever import make
from pennyweight.levers.prune.latent import Operator, alter, euler, latent_scores, least, moved, operators
from pennyweight.model import anatomy
from pennyweight.model.loading import of_module, restore
from pennyweight.model.model import parameters
from pennyweight.model.saving import save
from pennyweight.weights import LowRank
from pennyweight.work import Work
from pennyweight.zoo.dit import DiT, DiTConfig, draw

_DEPTH = 3


def dit(seed: int = 0) -> DiT:
    """One whose gates and outputs are not zero, as they would be before training."""
    generator = torch.Generator().manual_seed(seed)
    module = DiT(DiTConfig(width=16, depth=_DEPTH, num_heads=2), generator=generator).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("bias", "offset")) or name.startswith(("final", "time_out")):
                weight.normal_(0, 0.2, generator=generator)
    return module


def windows(count: int = 12, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(count, 1, 8, 8, generator=generator),
        "times": torch.rand(count, generator=generator),
        "texts": torch.randint(0, 11, (count, 2), generator=generator),
    }


def sampler(count: int = 12):
    return euler(windows(count), state="images", time="times", steps=2)


def test_the_score_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(50, 3, 4, generator=generator, dtype=torch.float64)
    assert moved(one, one) == 0
    assert moved(one, one + 2) == pytest.approx(2 * 12**0.5)  # no spread moves
    center = one.mean(0)
    spread = (one - center).pow(2).sum(0).div(49).sqrt()
    assert moved(one, center + 3 * (one - center)) == pytest.approx(2 * float(spread.pow(2).sum().sqrt()))  # no mean
    assert moved(one, one[torch.randperm(50, generator=generator)]) == pytest.approx(0, abs=1e-12)  # a distribution
    for bad in (one[:1], one[:, :2]):
        with pytest.raises(DataError, match=r"latents \(50, 3, 4\) and .*; give at least two each, of equal shapes"):
            moved(one, bad)


def test_the_sampler_is_the_models_own():
    module, given = dit(), windows()
    noise = torch.randn(given["images"].shape, generator=torch.Generator().manual_seed(5))
    found = euler(given, state="images", time="times", steps=3, seed=5)(module)
    torch.testing.assert_close(found, draw(module, given["texts"], noise, steps=3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["part", "block", "linear"])
def test_operators_are_found_once_each(kind):
    module = dit()
    found = operators(module, kind)
    assert len(found) == {"part": 3, "block": 1, "linear": 10}[kind] * _DEPTH
    paths = [one.path for operator in found for one in operator.maps]
    assert sorted(paths) == sorted(one.path for one in anatomy.of(module).layers() if one.block is not None)
    assert sum(one.parameters() for one in found) == _DEPTH * 16 * 256
    assert len({one.name for one in found}) == len(found)


def test_an_operator_that_does_nothing_scores_exactly_zero_and_others_do_not():
    module = dit()
    with torch.no_grad():
        for layer in (module.blocks[0].cross_attn.o_proj, module.blocks[2].ffn.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    still = {"blocks.0 cross_attention", "blocks.2 ffn"}
    scores = latent_scores(module, operators(module), sampler())
    assert {name for name, score in scores.items() if score == 0} == still
    assert min(score for name, score in scores.items() if name not in still) > 1e-3
    with torch.no_grad():  # a whole block
        for layer in (module.blocks[1].attn.o_proj, module.blocks[1].cross_attn.o_proj, module.blocks[1].ffn.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    blocks = latent_scores(module, operators(module, "block"), sampler())
    assert blocks["blocks.1"] == 0 < min(blocks["blocks.0"], blocks["blocks.2"])


def test_a_score_is_the_move_when_the_branch_is_left_out_by_hand():
    module = dit()
    scores = latent_scores(module, operators(module), sampler())
    without = copy.deepcopy(module)
    without.blocks[1].attn.forward = lambda x, other: torch.zeros_like(x)
    assert scores["blocks.1 attention"] == pytest.approx(moved(sampler()(module), sampler()(without)), rel=1e-5)


def test_scores_and_choices_know_no_order_and_leave_the_model():
    module, before = dit(), copy.deepcopy(dit().state_dict())
    found = operators(module)
    scores, backwards = (latent_scores(module, among, sampler()) for among in (found, found[::-1]))
    assert scores == backwards
    budget = 0.4 * sum(one.parameters() for one in found)
    picked = least(found, scores, budget)
    assert {one.name for one in picked} == {one.name for one in least(found[::-1], scores, budget)}
    assert sum(one.parameters() for one in picked) <= budget
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_fits_no_more_is_passed_over():
    among = operators(dit())
    scores = {one.name: float(place) for place, one in enumerate(among)}
    attention = 4 * 16 * 16
    names = [one.name for one in least(among, scores, 3.5 * attention)]
    assert names == ["blocks.0 attention", "blocks.0 cross_attention", "blocks.1 attention"]  # no feed-forward fits


def test_less_rank_moves_more_and_all_of_it_nothing():
    module, found = dit(), operators(dit())[:1]
    scores = [latent_scores(module, found, sampler(), kept=kept)[found[0].name] for kept in (1.0, 0.5, 0.1)]
    assert scores[0] < 1e-4 < scores[1] < scores[2]
    assert found[0].parameters(0.25) == 4 * (16 * 16 - 4 * 32)


def changed(module: nn.Module, **options) -> None:
    model = of_module(module)
    work = Work(model=model, windows=windows(), maps=model.anatomy.layers())
    make("prune.latent", {"samples": 12, "draws": 2, "steps": 3, **options}).change(model, work)


@pytest.mark.parametrize("options", [{}, {"operators": "linear"}, {"kept": 0.25}])
def test_pruned_saved_and_loaded_it_is_the_same(options, tmp_path):
    module = dit()
    changed(module, share=0.3, **options)
    held = [layer for layer in module.modules() if isinstance(layer, LowRank)]
    kept = sum(layer.cost().params for layer in held)
    gone = sum(layer.shape[0] * layer.shape[1] for layer in held) - kept
    assert 0.15 * _DEPTH * 16 * 256 < gone <= 0.3 * _DEPTH * 16 * 256
    assert (kept == 0) == ("kept" not in options)
    if "kept" not in options:  # training has not brought anything back
        assert all(
            not layer.bias.any() for layer in module.modules() if isinstance(getattr(layer, "weight", 0), LowRank)
        )
    wanted = sampler()(module)
    save(of_module(module), tmp_path / "out")
    again = restore(DiT(module.config), tmp_path / "out")
    assert torch.equal(sampler()(again.module), wanted)


def test_blocks_go_for_real_and_the_least_of_them():
    module, whole = dit(), parameters(dit())
    found = operators(module, "block")
    scores = latent_scores(module, found, sampler())
    least_block = min(scores, key=scores.__getitem__)
    wanted = copy.deepcopy(module)
    wanted.blocks = nn.ModuleList(block for at, block in enumerate(wanted.blocks) if f"blocks.{at}" != least_block)
    block = parameters(module.blocks[0])
    changed(module, operators="block", share=0.34, steps=0)
    assert parameters(module) == whole - block
    assert torch.equal(sampler()(module), sampler()(wanted))


def test_training_on_brings_it_back_towards_the_original():
    given, errors = windows(), {}
    original = dit()
    for steps in (0, 40):
        module = dit()
        changed(module, share=0.3, steps=steps)
        with torch.no_grad():
            errors[steps] = float((module(**given) - original(**given)).square().mean())
    assert errors[40] < 0.5 * errors[0]


def test_what_is_asked_in_vain_is_said():
    with pytest.raises(OptionError, match=r"prune.latent: operators = 'head' is out of range; give one of part"):
        make("prune.latent", {"operators": "head"})
    with pytest.raises(OptionError, match=r"prune.latent: samples = 1 is out of range; give at least 2"):
        make("prune.latent", {"samples": 1})
    with pytest.raises(OptionError, match=r"share = 0.01, kept = 0.0: no part takes between 1 and 123 parameters"):
        changed(dit(), share=0.01)
    with pytest.raises(OptionError, match=r"share = 0.9, kept = 1: no part takes .* raise share or lower kept"):
        changed(dit(), share=0.9, kept=1)
    with pytest.raises(DataError, match=r"inputs images, times, texts; give them by name, with 'latents' \(drawn\)"):
        changed(dit(), state="latents")
    with pytest.raises(OptionError, match=r"operators: kind = 'head'; give part, block or linear"):
        operators(dit(), "head")
    with pytest.raises(OptionError, match=r"operators: Linear has no part in any block"):
        operators(nn.Linear(2, 2))
    model = of_module(dit())
    work = Work(model=model, windows=windows()["images"], maps=model.anatomy.layers())
    with pytest.raises(DataError, match=r"prune.latent: inputs one tensor; give them by name"):
        make("prune.latent").change(model, work)
    with pytest.raises(DataError, match=r"two draws from one model differ; draw from the same seeds"):
        latent_scores(dit(), operators(dit()), lambda module: torch.randn(3, 2))


def test_removed_maps_store_zeros_for_biases_and_cheaper_ones_keep_theirs():
    for kept in (0.0, 0.5):
        module, before = dit(), dit().blocks[0].attn.v_proj.bias
        one = operators(module)[0]
        assert isinstance(one, Operator)
        alter(module, one, kept)
        layer = module.blocks[0].attn.v_proj
        assert layer.weight.cost().params == (8 * 32 if kept else 0)
        assert torch.equal(layer.bias, before if kept else torch.zeros(16))
        assert layer.bias.requires_grad == bool(kept)


def without_biases(module: DiT) -> DiT:
    for layer in module.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.bias = None
    return module


@pytest.mark.parametrize("kept", [0.0, 0.25])
def test_maps_without_biases_go_and_come_back_from_a_file(kept, tmp_path):
    module = without_biases(dit())
    changed(module, share=0.3, kept=kept)
    gone = [layer for layer in module.modules() if isinstance(getattr(layer, "weight", 0), LowRank)]
    assert gone
    assert all(layer.bias is None for layer in gone)
    save(of_module(module), tmp_path / "out")
    again = restore(without_biases(DiT(module.config)), tmp_path / "out")
    assert torch.equal(sampler()(again.module), sampler()(module))
    with pytest.raises(ModelError, match=r"tensors of the module are missing, the first is blocks\.0\..*bias"):
        restore(DiT(module.config), tmp_path / "out")  # biases of chance are not taken for those that are not there
