"""What the claims that fit laws to runs made here compute around those runs, on rows whose law is known."""

import numpy as np
import pytest

from pennyweight import laws
from pennyweight.claims.laws import r063_here, r074_tokenizers, r085_domains
from pennyweight.laws import bench


def test_best_vocabulary_is_the_bottom_of_a_known_parabola():
    """In log V, the better of two widths at each V; a curve that only falls ends at the largest V."""
    rows = [
        {"vocab_size": v, "loss_unigram_normalised": -2 + 0.3 * np.log(v / 200) ** 2 + width, "plain": -np.log(v)}
        for v in r074_tokenizers._VOCABULARIES
        for width in (0.0, 0.7)
    ]
    assert r074_tokenizers._best(rows) == pytest.approx(200, rel=1e-9)
    assert r074_tokenizers._best(rows, "plain") == pytest.approx(r074_tokenizers._VOCABULARIES[-1])


def test_tokenizers_count_what_they_read():
    text = "for one in range(10):\n    print(one, one, one)\n" * 40
    small, large = map(r074_tokenizers._reader(text, text), (24, 40))
    for tokens, size in ((small, 24), (large, 40)):
        assert int(tokens.train.max()) < size
        assert tokens.counts.shape == (size,)
        assert tokens.counts.sum() == tokens.train.numel() + size / 2
        assert tokens.train.numel() <= tokens.per_character * len(text) < tokens.train.numel() + 33
        assert tokens.train.equal(tokens.held)
    assert large.per_character < small.per_character < 1


def test_a_new_domain_of_a_known_law_is_predicted_from_its_k():
    law = laws.law(
        "dcpt_cross", E=0.8, A=0.6, alpha=0.4, B=0.2, beta=0.3, eta=1.5, C=0.2, gamma=0.5, epsilon=0.1, F=0.5, mu=0.8
    )
    measured = {}
    for index, k1 in enumerate((2.0, 2.6, 3.3, 4.1, 5.2, 2.3, 4.6)):
        k2 = (0.9, 0.3, 1.6, 0.7, 2.1, 1.9, 0.2)[index]
        measured[str(index)] = [
            {"N": n, "D": d, "r": r, "k1": k1, "k2": k2, "loss": float(law(N=n, D=d, r=r, K=1 / k1 + 0.4 * k2))}
            for n in (14.0, 39.0)
            for r in (0.0, 0.1, 0.33, 1.0)
            for d in (25.6, 51.2, 102.4, 204.8)
        ]
    across, alone, moved = r085_domains._errors("6", measured)
    assert across < 2e-3
    assert alone < 0.02  # a known law of the domain alone, from its short runs
    assert moved > 5 * across


def test_settings_of_a_known_step_law_come_back():
    """A row a setting, the mean of its two seeds; the law of the best of every group sets the rate of a larger size."""
    groups = {}
    for width, tokens in r063_here._FITTED:
        n = bench.Run(width=width, depth=1).params
        groups[width, tokens] = [
            bench.Record(run, ((1, 2 + 0.1 * np.log(run.lr / best) ** 2 + 0.1 * np.log(run.batch / 2) ** 2 + noise),))
            for batch in (1, 2, 4)
            for best in (3 * n**-0.5 * tokens**-0.2,)
            for lr in (best / 2, best, best * 2)
            for seed, noise in ((0, 0.5), (1, -0.5))
            for run in r063_here._runs(width, tokens, batch, lr=(lr,), seed=(seed,))
        ]
    columns = r063_here._columns(groups)
    assert len(columns["loss"]) == 9 * len(groups)
    assert min(columns["loss"]) == pytest.approx(2)
    rate, batch = r063_here._set(r063_here.hparams.fit(columns, seq_len=16, bootstrap=0), 48, 2**18)
    assert rate == pytest.approx(3 * bench.Run(width=48, depth=1).params ** -0.5 * (2**18) ** -0.2)
    assert batch == 2
