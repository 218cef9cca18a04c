"""Dynamic sparse training: the budget at every step, which weights die and grow, and what is fixed when none does."""

import math

import pytest
import torch
from torch import nn

from pennyweight.data.interactions import Interactions, of_texts
from pennyweight.errors import DataError, OptionError, ShapeError
from pennyweight.train import Samples, Trainer
from pennyweight.train.dynamic import DynamicSparsity
from pennyweight.zoo.recommender import LightGCN, ranking_loss, recall


class Small(nn.Module):
    """Words to scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.wide, self.head = nn.Embedding(12, 8), nn.Linear(8, 20), nn.Linear(20, 12)

    def forward(self, ids):
        return self.head(torch.tanh(self.wide(self.table(ids))))


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def samples():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(12, (64,), generator=g)
    return Samples(ids, (ids * 5 + 3) % 12, seed=0)


def started(**options):
    module = Small()
    adam = torch.optim.AdamW(module.parameters(), lr=0.02)
    settings = {"density": 0.3, "total": 60, "every": 10} | options
    sparse = DynamicSparsity([module.table, module.wide, module.head], adam, **settings)
    return module, sparse, Trainer(module, adam, samples(), batch=16, loss=loss, callbacks=[sparse])


def effective(module):
    return [layer.weight.detach().clone() for layer in (module.table, module.wide, module.head)]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("grow", ["gradient", "random", "unfired"])
def test_no_step_exceeds_the_budget(grow, scope):
    module, sparse, trainer = started(grow=grow, scope=scope, spread="erk")
    first = [int(mask.sum()) for mask in sparse.masks.kept()]
    assert sparse.budget == pytest.approx(0.3 * (96 + 160 + 240), abs=2)
    masks = [mask.clone() for mask in sparse.masks.kept()]
    for step in range(1, 61):
        trainer.run(step)
        now = [int(mask.sum()) for mask in sparse.masks.kept()]
        assert sum(now) == sparse.budget
        assert sum(int(weight.count_nonzero()) for weight in effective(module)) <= sparse.budget
        assert sparse.nonzero() <= sparse.budget
        if scope == "tensor":
            assert now == first
        moved = any(not torch.equal(a, b) for a, b in zip(masks, sparse.masks.kept(), strict=True))
        assert moved == (step % 10 == 0 and step < 60)
        masks = [mask.clone() for mask in sparse.masks.kept()]
    assert scope == "tensor" or now != first
    assert sparse.explored > 0.35
    before = effective(module)
    sparse.finish()
    assert all(torch.equal(a, b) for a, b in zip(before, effective(module), strict=True))
    assert isinstance(module.table.weight, nn.Parameter)


def test_the_smallest_die_and_the_steepest_grow():
    module, sparse, trainer = started(rate=0.4, final_rate=0.1)
    trainer.run(9)
    kept = [mask.clone() for mask in sparse.masks.kept()]
    # the whole gradient of the tenth batch, by a copy without masks
    plain = Small()
    plain.load_state_dict(
        {
            name.replace("parametrizations.weight.original", "weight"): value
            for name, value in module.state_dict().items()
            if ".0." not in name
        }
    )
    loss(plain, trainer.stream.take(9 * 16, 16)).backward()
    trainer.run(10)
    rho = 0.1 + 0.3 * (1 + math.cos(math.pi * 10 / 60)) / 2
    assert sparse.rho(10) == pytest.approx(rho)
    for layer, before, now, weight in zip(
        (plain.table, plain.wide, plain.head), kept, sparse.masks.kept(), effective(module), strict=True
    ):
        gone = math.ceil(rho * int(before.sum()))
        # what was kept and lives on: all but the `gone` smallest after the tenth step, unless it grew back
        grown = now & ~before
        assert int((before & ~now).sum()) == int(grown.sum()) > 0
        assert bool((weight[grown] == 0).all())
        slope = layer.weight.grad.abs()
        candidates = slope[~before]
        back = gone - int(grown.sum())
        assert float(slope[grown].min()) >= float(candidates.topk(int(grown.sum()) + back).values[-1]) * (1 - 1e-5)
        assert bool((slope[before & ~now] <= slope[grown].min() * (1 + 1e-5)).all())


def test_without_deaths_it_is_training_with_a_fixed_mask():
    module, sparse, trainer = started(rate=0.0, final_rate=0.0)
    twin = Small()
    layers = (twin.table, twin.wide, twin.head)
    masks = [mask.clone() for mask in sparse.masks.kept()]
    with torch.no_grad():
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.mul_(mask)
    adam = torch.optim.AdamW(twin.parameters(), lr=0.02)
    for layer, mask in zip(layers, masks, strict=True):
        layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    Trainer(twin, adam, samples(), batch=16, loss=loss).run(40)
    trainer.run(40)
    assert all(torch.equal(a, b) for a, b in zip(effective(module), effective(twin), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks, sparse.masks.kept(), strict=True))


def test_moving_places_learn_more_than_fixed_ones():
    losses = []
    for rate in (0.5, 0.0):
        module, _, trainer = started(rate=rate, final_rate=0.0, density=0.15, total=200)
        trainer.run(200)
        losses.append(float(loss(module, samples().take(0, 64)).detach()))
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("grow", ["gradient", "unfired"])
def test_a_stopped_run_goes_on_bit_for_bit(grow, tmp_path):
    whole, sparse, trainer = started(grow=grow)
    trainer.run(45)
    _, _, first = started(grow=grow)
    first.run(25)
    first.save(tmp_path / "at25")
    module, again, second = started(grow=grow)
    second.resume(tmp_path / "at25")
    second.run(45)
    assert all(torch.equal(a, b) for a, b in zip(effective(whole), effective(module), strict=True))
    assert again.explored == sparse.explored


def test_gradients_of_parts_of_a_batch_add_up():
    masks = []
    for micro in (None, 4):
        module = Small()
        sgd = torch.optim.SGD(module.parameters(), lr=0.02)
        sparse = DynamicSparsity([module.table, module.wide], sgd, density=0.3, total=60, every=5)
        Trainer(module, sgd, samples(), batch=16, micro_batch=micro, loss=loss, callbacks=[sparse]).run(5)
        masks.append([mask.clone() for mask in sparse.masks.kept()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "0 < density"),
        ({"rate": 1.5}, "rate 1.5"),
        ({"every": 0}, "every 0"),
        ({"grow": "luck"}, "grow 'luck'"),
        ({"scope": "row"}, "scope 'row'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        started(**options)
    module = Small()
    with pytest.raises(ShapeError, match="dynamic sparsity: two of the layers share"):
        DynamicSparsity([module.wide, module.wide], torch.optim.SGD(module.parameters()), total=9)


def test_passages_and_words_become_pairs():
    texts = [
        "the cat sat on the mat with the dog and the bird " * 3,
        "the fox ran past the dog and the bird and cat " * 3,
    ]
    found = of_texts(texts, items=4, skip=2, words=10, least=3)
    assert found.items == 4
    assert found.users == len(set(found.seen[:, 0].tolist()))
    both = torch.cat([found.seen, found.held])
    assert len({tuple(pair) for pair in both.tolist()}) == len(both)
    with pytest.raises(DataError, match="words for 400 items"):
        of_texts(texts, items=400)
    with pytest.raises(DataError, match="no passage of 10 words holds 9"):
        of_texts(texts, items=4, skip=2, words=10, least=9)


def test_smoothing_is_that_of_the_normalized_graph():
    g = torch.Generator().manual_seed(0)
    table = torch.rand(7, 5, generator=g) < 0.5
    data = Interactions(table.nonzero(), torch.tensor([[0, 0]]), 7, 5)
    module = LightGCN(data, width=3, rounds=2, generator=g)
    whole = torch.zeros(12, 12, dtype=torch.float64)
    whole[:7, 7:] = table.double()
    whole[7:, :7] = table.double().T
    degree = whole.sum(1).clamp(min=1)
    step = whole / (degree[:, None] * degree).sqrt()
    start = torch.cat([module.users.weight, module.items.weight]).double()
    wanted = (start + step @ start + step @ step @ start) / 3
    assert torch.allclose(torch.cat(module()).double(), wanted, atol=1e-6)


def test_recall_counts_what_was_held_back():
    data = Interactions(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [0, 3], [1, 2]]), 2, 4)
    module = LightGCN(data, width=2, rounds=0)
    with torch.no_grad():
        module.users.weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
        module.items.weight.copy_(torch.tensor([[9.0, 0], [3, 9], [2, 1], [1, 2]]))
    assert recall(module, data, count=1).tolist() == [0.5, 0.0]
    assert recall(module, data, count=2).tolist() == [0.5, 1.0]
    loss_of = ranking_loss(data, torch.Generator().manual_seed(0), decay=0.0)
    other = int(torch.randint(4, (1,), generator=torch.Generator().manual_seed(0)))
    table = module.items.weight.detach()
    margin = float(table[0, 0] - table[other, 0])
    found = float(loss_of(module, (torch.tensor([0]), torch.tensor([0]))).detach())
    assert found == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
