"""Row 85, D-CPT across domains: what two early measurements of a new domain tell of its losses, beside rivals."""

from __future__ import annotations

import codecs
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.claims.laws.r085_mixture import continued, pretrained, windows
from pennyweight.data import documents
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.measure import stats

_WIDTHS, _RATIOS, _STOPS = (24, 40), (0.1, 0.33, 1.0), (50, 100, 200, 400)
_SHORT = _STOPS[1]  # up to here a domain's own law may look; all are judged beyond
Row = dict[str, float]


def _domains() -> dict[str, str | Sequence[str]]:
    library, headers = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent / "include" / "c10"
    tables = [path.read_text("utf-8") for path in sorted((library / "encodings").glob("cp*.py"))]
    return {
        "news": "news",
        "tweets": "tweets",
        "Python code": [text for text in documents("stdlib-code") if "codecs.charmap" not in text],
        "tables of characters": tables,
        "Python's reference": [(library / "pydoc_data" / "topics.py").read_text("utf-8")],
        "C++ headers": [path.read_text("utf-8") for path in sorted(headers.rglob("*.h"))],
        "Wikipedia in ROT13": [codecs.encode(text, "rot13") for text in documents("wiki")],
    }


def _measured() -> dict[str, list[Row]]:
    """Rows of every domain: N, D, r, loss, and its k1 and k2, from the first steps of one run of the smaller size."""
    wiki, _ = windows("wiki")
    texts = {name: windows(source) for name, source in _domains().items()}
    judges = {name: held for name, (_, held) in texts.items()}
    found: dict[str, list[Row]] = {name: [] for name in texts}
    seen: dict[str, Row] = {}
    for width in _WIDTHS:
        base = pretrained(width, wiki)
        for row in continued(base, 0.0, wiki, wiki, judges, _STOPS):  # no domain data: one run serves all
            for name in texts:
                found[name].append({"N": row["N"], "D": row["D"], "r": 0.0, "loss": row[name]})
        for name, (train, held) in texts.items():
            for ratio in _RATIOS:
                rows = continued(base, ratio, wiki, train, {"loss": held}, _STOPS)
                found[name] += rows
            if width == _WIDTHS[0]:  # `rows` are those of the domain alone
                first = float(token_losses(base, held, batch=150).mean())
                seen[name] = {"k1": first, "k2": first - rows[0]["loss"]}
    return {name: [{**row, **seen[name]} for row in rows] for name, rows in found.items()}


def _errors(name: str, measured: dict[str, list[Row]]) -> tuple[float, float, float]:
    """Mean relative errors on the domain's later rows: across domains, of its own short runs, of the others' law."""
    here, late = measured[name], _STOPS[1] / _STOPS[-1] * max(row["D"] for row in measured[name])
    others = [row for domain, rows in measured.items() if domain != name for row in rows]
    judged = [row for row in here if row["D"] > late]
    plain = ("N", "D", "r", "loss")
    cross = laws.dcpt.fit(others, holdout=False).cross_domain(here[0]["k1"], here[0]["k2"])
    own = laws.dcpt.fit([{key: row[key] for key in plain} for row in here if row["D"] <= late], holdout=False)
    pooled = laws.dcpt.fit([{key: row[key] for key in plain} for row in others], holdout=False)
    # what is known of the domain moves it: the loss after the first steps on it alone
    first = next(row for row in here if row["r"] == 1.0)
    moved = first["loss"] / float(pooled.loss(first["N"], first["D"], 1.0))
    n, d, r, truth = (np.array([row[key] for row in judged]) for key in plain)
    guesses = (cross(N=n, D=d, r=r), own.loss(n, d, r), moved * pooled.loss(n, d, r))
    across, alone, shifted = (float(np.abs(np.asarray(guess) / truth - 1).mean()) for guess in guesses)
    return across, alone, shifted


@claim(row=85, pace="slow", headline="a new domain's law at about 1 % of the cost of its own runs (section 4)")
@tiny.one_thread()
def early_measurements_predict_a_new_domain(assets: Assets) -> Outcome:
    """Seven domains, each in turn predicted by the law of the other six from its k1 and k2; longer runs decide."""
    measured = _measured()
    errors = {name: _errors(name, measured) for name in measured}
    across, alone, moved = ([one[at] for one in errors.values()] for at in range(3))
    gap = stats.paired_difference(alone, across)
    method, baseline, control = (float(np.mean(found)) for found in (across, alone, moved))
    share = _STOPS[0] / (len(_WIDTHS) * len(_RATIOS) * _SHORT)
    return Outcome(
        method=method,
        baseline=baseline,
        unit="relative error of the losses of a new domain's longer runs, mean of seven domains; the baseline is the "
        "domain's own law from runs a quarter as long",
        holds=gap.high < 0 and method < control,
        control=("the other domains' law, moved through the same early loss", control),
        interval=(baseline + gap.low, baseline + gap.high),
        notes=(
            f"k1 and k2 cost {share:.0%} of the steps of the domain's own runs; by domain (k1, k2), across / own / "
            "moved: " + "; ".join(
                f"{name} ({measured[name][0]['k1']:.2f}, {measured[name][0]['k2']:.2f}) "
                + " / ".join(f"{one:.1%}" for one in found)
                for name, found in errors.items()
            ) + "; the interval is of the difference to the baseline"
        ),
    )  # fmt: skip
