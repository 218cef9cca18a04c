"""Laws on the larger published tables: read where they lie, for they are not ours to carry."""

import os
from pathlib import Path

import numpy as np
import pytest

from pennyweight.laws import hparams, vocab
from pennyweight.laws.table import read_csv

_ROOT = Path(__file__).resolve().parents[1]


def table(name):
    folders = [Path(os.environ["PENNYWEIGHT_LAW_TABLES"])] if "PENNYWEIGHT_LAW_TABLES" in os.environ else []
    for folder in [*folders, _ROOT.parent / "shared" / "data" / "laws"]:
        if (folder / name).is_file():
            return {column: np.array(values, float) for column, values in read_csv(folder / name).items()}
    pytest.skip(f"{name} not found: set PENNYWEIGHT_LAW_TABLES to the folder that holds it")


def excess_of_the_nearest_cell(grid, rule):
    """For each (N, D): relative loss above the best cell, of the cell nearest in log distance to what ``rule`` says."""
    found = []
    for n, d in np.unique(np.stack([grid["N"], grid["D"]]), axis=1).T:
        here = (grid["N"] == n) & (grid["D"] == d)
        lr, seqs = rule(n, d)
        distance = np.log(grid["lr"][here] / lr) ** 2 + np.log(grid["batch_seqs"][here] / seqs) ** 2
        loss = grid["smooth_loss"][here]
        found.append(loss[distance.argmin()] / loss.min() - 1)
    return np.array(found)


def step(n, d):
    found = hparams.step(n, d, 2048)
    return found.lr, found.batch_seqs


def test_step_law_lands_near_the_best_cell_of_every_grid():
    grid = table("steplaw_dense.csv")
    excess = excess_of_the_nearest_cell(grid, step)
    assert excess.mean() < 0.0015
    assert excess.max() < 0.004
    rivals = {
        "compute only": lambda n, d: (0.3188 * (6 * n * d) ** -0.125, 0.2920 * (6 * n * d) ** 0.3271 / 2048),
        "one rate": lambda n, d: (3e-4, step(n, d)[1]),
        "one setting": lambda n, d: (3e-4, 512),
    }
    for rule in rivals.values():
        assert excess_of_the_nearest_cell(grid, rule).mean() > 4 * excess.mean()


def test_step_law_refitted_on_the_grid_predicts_a_group_it_has_not_seen():
    grid = table("steplaw_dense.csv")
    excess = []
    for n, d in np.unique(np.stack([grid["N"], grid["D"]]), axis=1).T:
        here = (grid["N"] == n) & (grid["D"] == d)
        law = hparams.fit({name: values[~here] for name, values in grid.items()}, bootstrap=0)
        one = {name: values[here] for name, values in grid.items()}
        excess += excess_of_the_nearest_cell(
            one, lambda n, d, law=law: (law.step(n, d).lr, law.step(n, d).batch_seqs)
        ).tolist()
    assert np.mean(excess) < 0.002


def test_step_law_plateau_holds_the_near_best_cells():
    grid = table("steplaw_dense.csv")
    inside = []
    for n, d in np.unique(np.stack([grid["N"], grid["D"]]), axis=1).T:
        here = (grid["N"] == n) & (grid["D"] == d)
        plateau = hparams.step(n, d, 2048).plateau
        loss = grid["smooth_loss"][here]
        best = loss <= loss.min() * 1.0005
        lr, batch = grid["lr"][here][best], grid["batch_seqs"][here][best] * 2048
        inside += ((plateau.lr.low <= lr) & (lr <= plateau.lr.high)).tolist()
        inside += ((plateau.batch_tokens.low <= batch) & (batch <= plateau.batch_tokens.high)).tolist()
    assert np.mean(inside) > 0.9


def test_vocabulary_table_and_its_published_fit():
    data = table("vocab_isoflops.csv")
    size, v, h, d = (data[k] for k in ("nonvocab_params", "vocab_size", "num_characters", "embed_dim"))
    np.testing.assert_allclose(vocab.flops(size, v, h, embed_dim=d), data["flops"], rtol=1e-9)
    kept = data["flops"] >= 2.18e17
    assert kept.sum() == 1054
    loss = data["loss_unigram_normalised"][kept]
    gap = vocab.published_loss(size, v, h, embed_dim=d)[kept] - loss
    assert 1 - (gap**2).sum() / ((loss - loss.mean()) ** 2).sum() == pytest.approx(0.9716, abs=5e-5)
    assert np.abs(gap).mean() == pytest.approx(0.0596, abs=5e-5)


def test_vocabulary_law_refitted():
    data = table("vocab_isoflops.csv")
    kept = {name: values[data["flops"] >= 2.18e17] for name, values in data.items()}
    law = vocab.fit_loss(kept, per_character=vocab.published_tokens_per_character, holdout=False)
    assert law.report.r_squared > 0.97
    found = vocab.optimal_under(law, 7e9, vocab.optimal_flops(7e9), embed_dim=4096)
    assert found == pytest.approx(vocab.optimal(7e9, method="parametric"), rel=0.02)
    true_units = vocab.fit_loss(kept, holdout=False)
    assert true_units.alpha2 < 0
    assert any("a larger vocabulary only hurts" in note for note in true_units.report.notes)
