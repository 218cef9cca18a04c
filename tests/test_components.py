"""Counts of zeros, what stays untouched, errors, and the recommendation against the table by hand."""

import json
from itertools import product

import pytest
import torch
import toys
from torch import nn
from typer.testing import CliRunner

from pennyweight.cli.app import app
from pennyweight.components import ComponentStudy, component_study, prune_components
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.measure.stats import bootstrap
from pennyweight.solvers.scores import wanda
from pennyweight.statistics import Statistics

PARTS = {"text": ["text"], "denoiser": ["denoiser"]}
GRID = (0.0, 0.2, 0.4, 0.6, 0.8)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.text = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6))
        self.denoiser = nn.Sequential(nn.Conv1d(1, 5, 3, padding=1), nn.Flatten(), nn.Linear(30, 7), nn.Linear(7, 9))
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def forward(self, ids):
        return self.denoiser(self.text(self.table(ids))[:, None])


IDS = torch.arange(10).repeat(3)


@pytest.fixture(scope="module")
def pair():
    return Pair().eval()


def judge_of(pair):
    with torch.no_grad():
        wanted = pair(IDS)
    return lambda module: (module(IDS) - wanted).square().mean(1)


@pytest.fixture(scope="module")
def study(pair):
    return component_study(pair, judge_of(pair), PARTS, sparsities=GRID, totals=(0.3, 0.5))


def zeros(module, part):
    layers = (one for one in module.get_submodule(part).modules() if isinstance(one, nn.Linear | nn.Conv1d))
    return sum(int((one.weight == 0).sum()) for one in layers)


SIZES = {"text": 8 * 10 + 10 * 6, "denoiser": 5 * 3 + 30 * 7 + 7 * 9}


@pytest.mark.parametrize(("text", "denoiser"), list(product((0.0, 0.25, 0.5, 1.0), (0.0, 0.33, 0.9))))
def test_each_component_has_exactly_its_zeros(pair, text, denoiser):
    pruned = prune_components(pair, PARTS, {"text": text, "denoiser": denoiser})
    assert zeros(pruned, "text") == round(text * SIZES["text"])
    assert zeros(pruned, "denoiser") == round(denoiser * SIZES["denoiser"])


@pytest.mark.parametrize("name", PARTS)
def test_all_but_the_weights_of_the_component_stay_bit_for_bit(pair, name):
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    after = prune_components(pair, PARTS, {name: 0.5}).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith(name) and key.endswith("weight") for key in changed)
    for key in changed:  # what stays of them, stays as it was
        stays = after[key] != 0
        assert torch.equal(after[key][stays], before[key][stays])


def test_the_smallest_of_the_component_go(pair):
    pruned = prune_components(pair, PARTS, {"text": 0.5})
    pairs = [(pair.text[at].weight, pruned.text[at].weight) for at in (0, 2)]
    gone = torch.cat([old[new == 0].abs() for old, new in pairs])
    kept = torch.cat([old[new != 0].abs() for old, new in pairs])
    assert gone.max() <= kept.min()


def test_responses_count_zeros_and_begin_at_no_harm(study):
    assert [one.component for one in study.responses] == ["text", "denoiser", "all"]
    for one in study.responses[:2]:
        assert one.weights == SIZES[one.component]
        assert one.zeros == tuple(round(share * one.weights) for share in GRID)
    for one in study.responses:
        assert one.harm[0].value == 0
        assert one.harm[-1].value > 0
    assert study.response("all").weights == sum(SIZES.values())


def test_all_splits_of_a_total_have_equally_many_zeros(study):
    for one in study.splits:
        assert sum(one.zeros.values()) == round(one.total * sum(SIZES.values()))
        assert one.shares == {name: one.zeros[name] / SIZES[name] for name in SIZES}
    even = study.split(0.5, "even")
    assert even.zeros == {name: round(0.5 * size) for name, size in SIZES.items()}


def test_the_ranked_split_is_that_of_all_weights_compared_at_once(pair, study):
    count = round(0.3 * sum(SIZES.values()))
    layers = {name: [m for m in pair.get_submodule(name) if hasattr(m, "weight")] for name in PARTS}
    sizes = {name: torch.cat([m.weight.abs().flatten() for m in part]) for name, part in layers.items()}
    limit = torch.cat(list(sizes.values())).kthvalue(count).values
    assert study.split(0.3, "ranked").zeros == {name: int((one <= limit).sum()) for name, one in sizes.items()}


def test_the_recommendation_is_the_least_of_the_table_run_again_by_hand(pair, study):
    judge = judge_of(pair)
    for total in (0.3, 0.5):
        rows = [one for one in study.splits if one.total == total]
        harms = [float(judge(prune_components(pair, PARTS, one.shares)).mean().detach()) for one in rows]
        assert [one.harm.value for one in rows] == pytest.approx(harms, rel=1e-5)
        assert study.split(total) is rows[harms.index(min(harms))]
        assert sum(one.how == "grid" for one in rows) >= 3
        assert len({round(harm, 9) for harm in harms}) > 2


def test_most_is_the_largest_split_within_a_limit(study):
    limit = sorted(one.harm.high for one in study.splits)[3]
    found = study.most(limit)
    held = [one for one in study.splits if one.harm.high <= limit]
    assert found in held
    assert sum(found.zeros.values()) == max(sum(one.zeros.values()) for one in held)
    assert study.most(-1.0) is None


def test_the_page_marks_one_recommendation_a_total(study):
    assert study.table().count("recommended") == 2
    found = json.loads(study.to_json())
    assert found["recommended"]["0.5"]["zeros"] == study.split(0.5).zeros


def test_wanda_ranks_by_weight_times_norm_of_the_input(pair):
    pruned = prune_components(pair, PARTS, {"text": 0.5}, score="wanda", scope="row", calibrate=lambda m: m(IDS))
    x = pair.table(IDS).detach()
    scores = wanda(pair.text[0].weight.detach(), Statistics(count=len(x), second_moment=x.T @ x / len(x)), "test")
    gone = scores.argsort(1)[:, :4].sort(1).values
    assert torch.equal((pruned.text[0].weight == 0).nonzero()[:, 1].view(10, 4), gone)
    assert not pair.text[0]._forward_pre_hooks


def test_patterns_name_layers_and_one_component_is_enough(pair):
    found = component_study(pair, judge_of(pair), {"ends": ["*.2"]}, sparsities=GRID, totals=(0.4,))
    assert found.responses[0].weights == 60 + 210
    assert len(found.responses) == 1
    assert found.split(0.4).zeros == {"ends": 108}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"components": {"text": ["txt"]}}, ModelError, "no layer of text lies in 'txt'; the model has table, text"),
        ({"components": {"text": ["text"], "one": ["text.0"]}}, ModelError, "text.0 is of text and of one"),
        ({"components": {"text": "text"}}, OptionError, "give a list of paths"),
        ({"components": {"text": []}}, OptionError, "text has no paths"),
        ({"components": {"all": ["text"]}}, OptionError, "none 'all'"),
        ({"components": {}}, OptionError, "at least one"),
        ({"components": {"table": ["table"]}}, ModelError, "no layer of table"),
        ({"sparsities": (0.1, 0.2, 0.3, 0.4)}, OptionError, "rise from 0"),
        ({"totals": (0.9,)}, OptionError, "up to 0.8"),
        ({"score": "size"}, OptionError, "score 'size'"),
        ({"scope": "model"}, OptionError, "scope 'model'"),
        ({"score": "wanda"}, DataError, "give calibrate"),
        ({"score": "wanda", "calibrate": lambda m: m.text(m.table(IDS))}, DataError, "nothing through denoiser.0"),
        ({"judge": lambda module: torch.tensor(1.0)}, DataError, "one a sample"),
        ({"judge": lambda module: torch.tensor([1.0, torch.nan])}, DataError, "finite"),
    ],
)
def test_what_cannot_be_studied_is_said_in_a_line(pair, options, error, words):
    given = {"judge": judge_of(pair), "components": PARTS, "sparsities": GRID, "totals": (0.4,), **options}
    with pytest.raises(error, match=words) as caught:
        component_study(pair, given.pop("judge"), given.pop("components"), **given)
    assert "\n" not in str(caught.value)


def test_shares_of_what_is_no_component_are_refused(pair):
    with pytest.raises(OptionError, match=r"unet = 0\.5"):
        prune_components(pair, PARTS, {"unet": 0.5})
    with pytest.raises(OptionError, match=r"text = 1\.5"):
        prune_components(pair, PARTS, {"text": 1.5})


def test_an_unknown_total_or_component_is_refused(study):
    assert isinstance(study, ComponentStudy)
    with pytest.raises(OptionError, match=r"totals are 0\.3, 0\.5"):
        study.split(0.4)
    with pytest.raises(OptionError, match="there are text, denoiser, all"):
        study.response("unet")


def test_intervals_are_those_of_the_paired_losses(pair, study):
    harm = judge_of(pair)(prune_components(pair, PARTS, {"text": 0.4})).detach()
    assert study.response("text").harm[2].high == pytest.approx(bootstrap(harm, seed=0).high, rel=1e-5)


def test_a_text_model_is_studied_from_the_command_line(tmp_path):
    model, text, page = toys.llama(tmp_path / "model"), toys.text_file(tmp_path), tmp_path / "c.json"
    words = ["components", str(model), "--data", str(text), "--windows", "4", "--length", "48", "--json", str(page)]
    grid = ["--sparsities", "0,0.3,0.6,0.9", "--totals", "0.5", "--score", "wanda", "--scope", "row"]
    done = CliRunner().invoke(app, [*words, *grid, "--part", "attention=*.self_attn", "--part", "mlp=*.mlp"])
    assert done.exit_code == 0, done.output
    found = json.loads(page.read_text())
    assert [one["component"] for one in found["responses"]] == ["attention", "mlp", "all"]
    assert found["loss"] == 0
    harms = [one["harm"]["value"] for one in found["splits"]]
    assert found["recommended"]["0.5"]["harm"]["value"] == min(harms)
    # to the rounding of rows
    whole = sum(one["weights"] for one in found["responses"][:2])
    assert all(abs(sum(one["zeros"].values()) / whole - 0.5) < 0.03 for one in found["splits"])


@pytest.mark.parametrize("parts", [["mlp"], ["a=*.mlp", "a=*.self_attn"]])
def test_parts_without_paths_or_named_twice_are_refused(parts):
    done = CliRunner().invoke(app, ["components", "none", *(word for one in parts for word in ("--part", one))])
    assert isinstance(done.exception, OptionError)
    assert "each name once" in str(done.exception)
