"""Recipes on checkpoints that are read block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from transformers import MixtralConfig, MixtralForCausalLM

from pennyweight.cli import main
from pennyweight.errors import DataError, RecipeError
from pennyweight.larger import apply_streaming
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import load
from pennyweight.model.saving import saved_bytes
from pennyweight.recipe import Recipe
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense
from pennyweight.weights.dictionary import DictionaryCoded
from pennyweight.weights.layers import CompactLinear

MIXED = """
pennyweight: 1
steps:
- quantize.rtn: {bits: 4, group_size: 32}
  where: role:ffn.*
- quantize.gptq: {bits: 3, group_size: 32}
  where: "*.q_proj"
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


def test_a_recipe_runs_block_by_block(checkpoint: Path, tmp_path: Path) -> None:
    text = toys.text_file(tmp_path)
    saved = apply_streaming(
        checkpoint, Recipe.parse(MIXED), data=text, out=tmp_path / "out", settings=toys.QUICK
    )  # fmt: skip
    found, before = load(tmp_path / "out"), load(checkpoint)
    block, old = found.module.model.layers[1], before.module.model.layers[1]
    assert torch.equal(
        block.mlp.up_proj.weight.dense(),
        RTN(bits=4, group_size=32).solve(Dense(old.mlp.up_proj.weight.detach()), NO_STATISTICS).dense(),
    )
    assert block.self_attn.q_proj.weight.bits == 3
    assert not isinstance(block.self_attn.k_proj, CompactLinear)
    assert torch.equal(block.self_attn.k_proj.weight, old.self_attn.k_proj.weight)
    assert found.tokenizer is not None
    assert saved.bytes == saved_bytes(tmp_path / "out") < 0.6 * saved_bytes(checkpoint)
    assert Recipe.read(tmp_path / "out" / "recipe.yaml") == Recipe.parse(MIXED)


def test_experts_become_ternary_one_block_at_a_time(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "whole")
    toys.tokenizer().save_pretrained(tmp_path / "whole")
    recipe = Recipe.parse("pennyweight: 1\nsteps:\n- quantize.qmoe: {}\n  where: role:moe.experts*\n")
    apply_streaming(
        tmp_path / "whole", recipe, data=toys.text_file(tmp_path), out=tmp_path / "out", settings=toys.QUICK
    )  # fmt: skip
    found, before = load(tmp_path / "out").module, load(tmp_path / "whole").module
    coded = [part for part in found.modules() if isinstance(part, DictionaryCoded)]
    assert len(coded) == 2 * 4 * 3  # blocks, experts, and gate, up and down of each
    for each in coded:
        assert all(len(row.unique()) <= 3 for row in each.dense())
    first = before.model.layers[0].mlp.experts.gate_up_proj[0, :48]
    same = [each for each in coded if each.shape == (48, 32) and each.error(first) < 0.8]
    assert len(same) == 1  # its own expert's, and nobody else's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- quantize.rtn: {bits: 4}\n  where: no.such", r"step 1, quantize.rtn: where \['no.such'\] selects no map"),
        ("- quantize.awq: {bits: 4}", "changes the whole model"),
        ("- quantize.entropy: {bits: 3.0}", "needs gradients"),
    ],
)
def test_what_cannot_be_streamed_is_refused_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        apply_streaming(
            checkpoint, Recipe.parse(f"pennyweight: 1\nsteps:\n{text}\n"), data=toys.text_file(tmp_path),
            out=tmp_path / "out", settings=toys.QUICK,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_the_remedy_is_said(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="needs a tokenizer"):
        apply_streaming(bare, Recipe.parse(MIXED), out=tmp_path / "out", settings=toys.QUICK)


def test_the_command_line_streams(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pennyweight: 1\nsteps:\n- quantize.rtn: {bits: 4, group_size: 32}\n")
    code = main(["apply", str(checkpoint), str(recipe), "--out", str(tmp_path / "out"), "--stream"])
    assert code in (0, None)
    assert "bytes in" in capsys.readouterr().out
    assert isinstance(load(tmp_path / "out").module.model.layers[0].mlp.up_proj, CompactLinear)
