"""Zeros in plans: beside bits and rank, priced by the bytes they store and by the time they take on this machine."""

from pathlib import Path

import pytest
import torch
import toys

from pennyweight.calibrate import collect
from pennyweight.fit import fit
from pennyweight.lever import find
from pennyweight.levers.prune.sparsegpt import SparseGPT
from pennyweight.model import load
from pennyweight.model.model import Model
from pennyweight.plan import probes
from pennyweight.plan.offers import predict, settings_for
from pennyweight.plan.slots import Slot, matrix_of, slots_of
from pennyweight.weights import Dense

LEVERS = ["quantize.entropy", "prune.sparsegpt", "factorize.svd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def slots(model: Path) -> tuple[Model, tuple[Slot, ...]]:
    loaded = load(model)
    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    return loaded, slots_of(loaded.anatomy, collect(loaded, ids, needs={"second_moment", "gradient"}))


def test_one_plan_holds_bits_and_zeros_where_parameters_and_bytes_are_budgeted(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = toys.text_file(tmp_path_factory.mktemp("text"))
    found = fit(
        model, data=text, budgets=["params=75%", "bytes=45%"], levers=LEVERS, settings=toys.QUICK,
        out=tmp_path_factory.mktemp("out") / "out",
    )  # fmt: skip
    assert {"quantize.entropy", "prune.sparsegpt"} <= {step.name for step in found.recipe.steps}
    spent = {line.resource: (line.spent, line.allowed) for line in found.receipt.budgets}
    assert spent.keys() == {"params", "bytes"}
    assert all(used <= allowed for used, allowed in spent.values())


def test_sparse_offers_cost_what_they_store_and_save_no_products(slots: tuple[Model, tuple[Slot, ...]]) -> None:
    loaded, all_slots = slots
    slot = next(one for one in all_slots if one.map.role == "ffn.up")
    weight = Dense(matrix_of(loaded.module, slot))
    offers = predict(settings_for([find("prune.sparsegpt")], slot.map.shape), weight, slot.statistics)
    assert len(offers) >= 5
    for offer in offers:
        assert offer.cost.bytes == offer.lever.solve(weight, slot.statistics).cost().bytes
        assert offer.cost.flops == weight.cost().flops  # dense kernels multiply zeros, too


def test_the_time_of_zeros_is_measured_not_inferred(slots: tuple[Model, tuple[Slot, ...]]) -> None:
    loaded, all_slots = slots
    slot = next(one for one in all_slots if one.map.role == "ffn.up")
    ids = torch.zeros(1, 8, dtype=torch.long)
    half, whole = (probes.try_out(loaded, slot, lever, ids) for lever in (SparseGPT(pattern="2:4"), None))
    assert half.nanoseconds > whole.nanoseconds  # here 2:4 is unpacked first: no time is promised for zeros
    assert half.cost({"latency"}) == {"latency": half.nanoseconds}
