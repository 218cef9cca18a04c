"""Row 154, COD: on cloze items of real text hardly a cluster rises smoothly; the mean's one curve predicts as well.

Shape letters: I items, O options of one, T bytes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight import laws
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.errors import DataError
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.train.schedules import cosine

_WIDTHS, _LARGEST, _STEPS, _BATCH = (4, 8, 12, 20, 32, 48), 80, 600, 16
_ITEMS, _OPTIONS, _ASKED = 500, 4, 6  # the last six bytes of a window, and those of three others


@lru_cache(maxsize=1)
def _items() -> Tensor:  # (I, O, T), the right option first
    held = tiny.text()[1][:_ITEMS]
    g = torch.Generator().manual_seed(0)
    options = [held]
    for _ in range(_OPTIONS - 1):
        other = torch.randint(1, len(held), (1,), generator=g)
        options.append(torch.cat([held[:, :-_ASKED], held.roll(int(other), 0)[:, -_ASKED:]], 1))
    return torch.stack(options, 1)


def _trained(width: int) -> tuple[nn.Module, float]:
    """The model, and its training compute."""
    module = tiny.gpt(width=width)
    tiny.trainer(module, cosine(_STEPS, 30, peak=5e-3), batch=_BATCH).run(_STEPS)
    size = sum(p.numel() for name, p in module.named_parameters() if not name.startswith(("embed", "lm_head")))
    return module, 6.0 * size * _STEPS * _BATCH * (tiny.LENGTH - 1)


def _rates(module: nn.Module) -> tuple[np.ndarray, float]:
    """How often each item is solved when an option is drawn by its probability, (I,); nats of the right option."""
    items = _items()
    losses = token_losses(module, items.flatten(0, 1), batch=256).view(*items.shape[:2], -1)[..., -_ASKED:].sum(-1)
    chance = (-losses.double()).softmax(1)[:, 0]
    return chance.numpy(), float(-chance.log().mean())


@claim(row=154, pace="slow", headline="1.36 % mean deviation on 8 benchmarks for a 70B model (abstract)")
@tiny.one_thread()
def clusters_of_cloze_items_predict_the_next_size(assets: Assets) -> Outcome:
    """Four options an item, exact pass rates; rivals: one curve of the mean, and the way through the loss."""
    made = [_trained(width) for width in _WIDTHS]
    found = [_rates(module) for module, _ in made]
    rates, compute = np.stack([rate for rate, _ in found], 1), np.array([cost for _, cost in made])
    last, cost = _trained(_LARGEST)
    truth, _ = _rates(last)
    scaled = compute / compute[0]
    single = laws.fit({"C": scaled, "accuracy": rates.mean(0)}, "acc_exp", holdout=False)
    answer = laws.fit((scaled, [loss for _, loss in found]), "power_const", holdout=False)
    score = laws.fit({"L": [loss for _, loss in found], "score": rates.mean(0)}, "sigmoid_of_loss", target="score",
                     holdout=False)  # fmt: skip
    goal = float(truth.mean())
    alone = abs(float(single(C=cost / compute[0])) - goal)
    through = abs(float(score(L=float(answer(cost / compute[0])))) - goal)
    try:
        fitted = laws.cod.fit(rates, compute)
        predicted, kept = fitted.predict(cost), len(fitted.predictable_items) / len(rates)
        said = f"{len(fitted.clusters)} clusters, {kept:.0%} of the items extrapolated"
    except DataError as error:  # nothing to extrapolate: the largest model's accuracy is all there is
        predicted, said = float(rates[:, -1].mean()), str(error)
    return Outcome(
        method=abs(predicted - goal),
        baseline=alone,
        unit="absolute error of the predicted accuracy of a model of 2.8 times the size",
        holds=abs(predicted - goal) < min(alone, through),
        control=("through the loss of the right option", through),
        notes=(
            f"accuracies {', '.join(f'{rate:.3f}' for rate in rates.mean(0))}, then {goal:.3f}; {said}; no change at "
            f"all would miss by {abs(float(rates[:, -1].mean()) - goal):.3f}; {_ITEMS} items, one seed"
        ),
    )
