"""Class-dependent compression: its loss against loops and finite differences, masks, counts, and floors."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.lever import make
from pennyweight.levers.prune.class_dependent import LogOdds
from pennyweight.model.loading import of_module
from pennyweight.train import Samples, Trainer
from pennyweight.train.class_dependent import ClassLoss, auc, class_dependent, ranking_penalty
from pennyweight.work import Work


def data(count=160, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    return x, (x[:, 0] + 0.5 * x[:, 1] * x[:, 2] + 0.3 * torch.randn(count, generator=g) > 1.0).long()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


QUICK = {"rounds": 3, "steps": 40, "rewind": 5, "batch": 16, "rate": 0.05, "clip": None}


def test_the_penalty_is_that_of_loops_and_has_its_gradient():
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(9, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 1])
    values = scores.tolist()
    hardest = max(v for v, label in zip(values, labels.tolist(), strict=True) if not label)
    expected = sum(min(0.0, v - hardest) ** 2 for v, label in zip(values, labels.tolist(), strict=True) if label) / 5
    found = ranking_penalty(scores, labels)
    assert found.item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda s: ranking_penalty(s, labels), scores)
    found.backward()
    assert float(scores.grad.abs().sum()) > 0
    for alike in (torch.ones(9), torch.zeros(9)):
        assert ranking_penalty(scores, alike).item() == 0


def test_the_loss_weighs_the_class_and_combines_both_ways():
    x, y = data()
    module = net()
    logits = module(x).flatten()
    plain = functional.binary_cross_entropy_with_logits(logits, y.float())
    assert torch.equal(ClassLoss()(module, (x, y)), plain)
    each = functional.binary_cross_entropy_with_logits(logits, y.float(), reduction="none")
    weighed = (each * torch.where(y > 0, 3.0, 1.0)).mean()
    torch.testing.assert_close(ClassLoss(importance=3)(module, (x, y)), weighed)
    penalty = ranking_penalty(logits, y)
    torch.testing.assert_close(ClassLoss(ranking=2)(module, (x, y)), plain + 2 * penalty)
    torch.testing.assert_close(ClassLoss(ranking=2, combined="product")(module, (x, y)), plain * (1 + 2 * penalty))


def test_rounds_halve_what_is_left_and_survivors_start_from_the_early_weights():
    train = data()
    tickets = class_dependent(net(), train, data(seed=1), **QUICK)
    for number, ticket in enumerate(tickets):
        for layer, total in ((ticket.module[0], 96), (ticket.module[2], 16)):
            left = total
            for _ in range(number):
                left -= int(0.5 * left)
            assert int((layer.weight != 0).sum()) == left
    masks = [ticket.module[0].weight != 0 for ticket in tickets]
    assert all(bool((early | ~late).all()) for early, late in pairwise(masks))
    assert tickets[0].sparsity == 0
    assert tickets[-1].sparsity == pytest.approx(1 - (12 + 2) / 112)


def test_the_first_ticket_is_plain_training():
    x, y = data()
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, 0.9)
    trainer = Trainer(module, optimizer, Samples(x, y, seed=0), batch=16, loss=ClassLoss())
    trainer.run(5)
    # the optimizer starts anew at the step that is gone back to, in every round alike
    again = Trainer(
        module, torch.optim.SGD(module.parameters(), 0.05, 0.9), Samples(x, y, seed=0), batch=16, loss=ClassLoss()
    )
    again.steps, again.samples = 5, 80
    again.run(40)
    found = class_dependent(net(), (x, y), data(seed=1), **QUICK | {"rounds": 0})[0].module
    assert torch.equal(found[0].weight, module[0].weight)


def test_the_least_increase_goes_first():
    train = data()
    by_increase, by_magnitude = (
        class_dependent(net(), train, data(seed=1), criterion=criterion, **QUICK | {"rounds": 1})
        for criterion in ("increase", "magnitude")
    )
    whole, early = by_increase[0].module[0].weight, net()
    # no step before the one that is gone back to: the early weights are the first ones
    at_first = class_dependent(net(), train, data(seed=1), **QUICK | {"rounds": 1, "rewind": 0})
    grown = at_first[0].module[0].weight.abs() - early[0].weight.abs()
    for found, scores in ((by_magnitude, whole.abs()), (at_first, grown)):
        pruned = (found[1].module[0].weight == 0).flatten()
        assert set(pruned.nonzero()[:, 0].tolist()) == set(scores.flatten().argsort()[:48].tolist())
    assert not torch.equal(by_increase[1].module[0].weight == 0, by_magnitude[1].module[0].weight == 0)


def test_floors_hold_by_an_exact_test():
    x, y = data(seed=1)
    tickets = class_dependent(net(), data(), (x, y), loss=ClassLoss(importance=5), floors={1: 0.5}, **QUICK)
    for ticket in tickets:
        count = int((y > 0).sum())
        right = round(ticket.recall[1] * count)
        # at the lower limit so many or more right ones are just 5 % likely
        assert binom.sf(right - 1, count, ticket.lower[1]) == pytest.approx(0.05, rel=1e-6)
        assert ticket.held == (ticket.lower[1] >= 0.5)
    assert any(ticket.held for ticket in tickets)


def test_auc_counts_pairs():
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(0, 5, (40,), generator=g).float(), torch.randint(0, 2, (40,), generator=g)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels > 0].tolist() for b in scores[labels == 0].tolist()]
    assert auc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_round": 1.0}, "per_round 1.0"),
        ({"rewind": 40}, "rewind 40 of 40"),
        ({"criterion": "least"}, "increase or magnitude"),
        ({"floors": {2: 0.9}}, "a floor on class 2"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        class_dependent(net(), data(), data(seed=1), **QUICK | options)
    with pytest.raises(OptionError, match="importance above 0"):
        ClassLoss(importance=0)
    with pytest.raises(DataError, match="one class"):
        class_dependent(net(), data(), (torch.zeros(3, 6), torch.zeros(3)), **QUICK)


class TwoLogits(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


SHORT = {"rounds": 2, "steps": 40, "rewind": 5, "batch": 16, "rate": 0.05}


def changed(options, labels=None):
    x, y = data(400)
    model = of_module(TwoLogits())
    windows = {"x": x, "labels": y if labels is None else labels}
    work = Work(model=model, windows=windows, maps=model.anatomy.layers())
    make("prune.class_dependent", {**SHORT, **options}).change(model, work)
    return model, x, y


def test_the_lever_leaves_sparse_layers_that_give_what_the_ticket_gave():
    model, x, y = changed({})
    layers = [model.module.first.weight, model.module.last.weight]
    assert [int((one.dense() == 0).sum()) for one in layers] == [72, 24]  # 3/4 of 96 and of 32, in two rounds
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    held, seen = order[:120], order[120:]
    wrapped = LogOdds(TwoLogits())
    tickets = class_dependent(
        wrapped, (x[seen], y[seen]), (x[held], y[held]), loss=ClassLoss(importance=4, ranking=0.5),
        **{name: value for name, value in SHORT.items()},
    )  # fmt: skip
    with torch.no_grad():
        z = model.module(x)
        torch.testing.assert_close(z[:, 1] - z[:, 0], tickets[-1].module(x), rtol=1e-5, atol=1e-5)


def test_the_lever_keeps_the_sparsest_that_shows_its_floor_or_says_why_none_does():
    model, _, _ = changed({"floor": 0.3, "rounds": 1})
    assert int((model.module.first.weight.dense() == 0).sum()) == 48
    with pytest.raises(OptionError, match=r"no round is shown to recall 100.0% of the class; the best shows"):
        changed({"floor": 1.0})
    with pytest.raises(DataError, match=r"labels of shape \(400,\); give \(samples,\) of 0 and 1"):
        changed({}, labels=torch.arange(400))
    with pytest.raises(DataError, match="inputs x, labels; give one input and 'classes', by name"):
        changed({"labels": "classes"})
    with pytest.raises(ShapeError, match=r"outputs \(4, 3\); give a classifier of two classes"):
        LogOdds(nn.Linear(6, 3))(torch.ones(4, 6))
