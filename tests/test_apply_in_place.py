"""Recipes with steps that change whole models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toys

from pennyweight import lever as registry
from pennyweight.apply import apply
from pennyweight.compare import compare
from pennyweight.errors import OptionError
from pennyweight.lever import at_least, lever, option
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.recipe import Recipe
from pennyweight.weights import Dense
from pennyweight.weights.layers import CompactLinear
from pennyweight.work import ModelLever, Work


@pytest.fixture
def scaling() -> Iterator[type]:
    """A lever that multiplies the norms before what it selects, and divides the selected maps to match."""
    seen: list[Work] = []

    @lever("toy.scaling", reach="model")
    @dataclass(frozen=True, kw_only=True)
    class Scaling:
        """Fold a factor out of maps and into the norms before them."""

        factor: float = option(2.0, at_least(0), "what norms are multiplied by")

        def change(self, model: Model, work: Work) -> None:
            if self.factor == 0:
                raise OptionError("toy.scaling: factor = 0 cannot be undone; give more")
            seen.append(work)
            with torch.no_grad():
                for block in model.module.model.layers:
                    block.input_layernorm.weight.mul_(self.factor)
            for found in work.maps:
                matrix = anatomy.matrix(model.module, found) / self.factor
                anatomy.replace(model.module, found.path, Dense(matrix))

    Scaling.seen = seen
    yield Scaling
    del registry._REGISTRY["toy.scaling"]


RECIPE = """
pennyweight: 1
steps:
- toy.scaling: {factor: 4.0}
  where: ["*.q_proj", "*.k_proj", "*.v_proj"]
- quantize.gptq: {bits: 8, group_size: 32}
  where: "*.{q,k}_proj"
"""


def test_steps_see_what_was_left_to_them_and_all_of_it_is_written(
    scaling: type, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert isinstance(scaling(), ModelLever)
    source, text = toys.llama(tmp_path / "llama"), toys.text_file(tmp_path)
    before = load(source)
    found = apply(source, Recipe.parse(RECIPE), data=text, out=tmp_path / "out", settings=toys.QUICK)
    block = found.model.module.model.layers[0]
    assert torch.equal(block.input_layernorm.weight, 4 * before.module.model.layers[0].input_layernorm.weight)
    assert isinstance(block.self_attn.v_proj, CompactLinear)
    assert type(block.self_attn.v_proj.weight) is Dense
    q = before.module.model.layers[0].self_attn.q_proj.weight
    assert (4 * block.self_attn.q_proj.weight.dense() - q).abs().max() < 0.02 * q.abs().max()
    ratio = found.receipt.figures[0].ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(1, abs=0.02)  # the fold undoes itself; four times or a quarter would not
    assert ratio.value != 1.0
    (work,) = scaling.seen
    assert {one.name.rpartition(".")[2] for one in work.maps} == {"q_proj", "k_proj", "v_proj"}
    assert len(work.text(10_000)) > toys.QUICK.statistics
    assert load(source).fingerprint == before.fingerprint


def test_a_module_handed_in_is_changed_only_at_the_end(scaling: type, tmp_path: Path) -> None:
    source, text = load(toys.llama(tmp_path / "llama")), toys.text_file(tmp_path)
    mark = source.fingerprint
    bad = Recipe.parse(RECIPE.replace("4.0", "0"))
    with pytest.raises(OptionError, match=r"recipe step 1, toy.scaling: toy.scaling: factor = 0 cannot be undone"):
        apply(source, bad, data=text, out=tmp_path / "out", settings=toys.QUICK)
    assert source.fingerprint == mark
    table = compare(source, [Recipe.parse(RECIPE)], data=text, settings=toys.QUICK)
    assert source.fingerprint == mark
    assert table.rows[0].effect == pytest.approx(1, abs=0.02)
