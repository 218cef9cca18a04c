"""How much a changed model departs from what it was, window by window, as a function that can be differentiated.

Causal language models: the loss on the next tokens, above the original's. Encoders: one minus the cosine to the
original's embedding. Classifiers and masked language models: the Kullback-Leibler divergence from the original's
distribution, in nats. Anything else: squared distance of the outputs over their squared length. Zero for the original,
and, but for language models, least there: the gradient vanishes and the Hessian is positive semidefinite.

Shape letters: B windows, T tokens, V scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.calibrate.walk import Windows, inputs_of
from pennyweight.evaluate.embedding import pool
from pennyweight.evaluate.forward import accepts, first_tensor, looking
from pennyweight.model.model import Model

#: Kinds that score classes.
SCORED = ("classifier", "image-classifier", "masked-lm")


class Harm:
    """The harm of each window, from the model as it is when called; the original is what it was when this was made.

    Args:
        model: its module is run, and may be changed in between.
        windows: as for `pennyweight.calibrate.collect`.
        batch: windows run together.
    """

    def __init__(self, model: Model, windows: Windows, *, batch: int = 8) -> None:
        self.model, self.batch = model, batch
        found = inputs_of(model, windows)
        self.inputs: Any = dict(found) if isinstance(found, Mapping) else found
        tensors = list(found.values()) if isinstance(found, Mapping) else list(found)
        self.count = len(tensors[0])
        with looking(model.module):
            self.before = [outputs(model, self.inputs, part) for part in self.parts()]

    def parts(self) -> list[slice]:
        """The batches, as slices of the windows."""
        return [slice(start, min(start + self.batch, self.count)) for start in range(0, self.count, self.batch)]

    def __call__(self, number: int) -> Tensor:
        """(batch,) harm of each window of batch ``number``, differentiable where gradients are on."""
        after, before = outputs(self.model, self.inputs, self.parts()[number]), self.before[number]
        kind = self.model.kind
        if kind == "causal-lm":
            return after - before
        if kind == "encoder":
            return 1 - (after * before).sum(-1)
        if kind in SCORED:
            p = before.log_softmax(-1)
            divergence = (p.exp() * (p - after.log_softmax(-1))).sum(-1)
            return divergence.flatten(1).mean(1) if divergence.ndim > 1 else divergence
        apart = (after - before).square().flatten(1).sum(1)
        return apart / before.square().flatten(1).sum(1).clamp_min(torch.finfo(before.dtype).tiny)

    @torch.no_grad()
    def samples(self) -> Tensor:
        """(B,) harm of every window of the model as it is now."""
        with looking(self.model.module):
            return torch.cat([self(number) for number in range(len(self.before))])


def outputs(model: Model, inputs: Any, part: slice) -> Tensor:
    """What harm compares, of the windows ``part`` of ``inputs`` (from `inputs_of`); differentiable.

    Causal language models: (B,) the mean loss of each window. Encoders: (B, D) embeddings of length one. Anything else:
    what the model returns.
    """
    module = model.module
    if isinstance(inputs, Mapping):
        options = {name: tensor[part] for name, tensor in inputs.items()}
        if accepts(module, "use_cache"):
            options["use_cache"] = False
        out = module(**options)
    else:
        options = {}
        out = module(*(tensor[part] for tensor in inputs))
    if model.kind == "causal-lm":
        ids = options["input_ids"] if options else inputs[0][part]
        logits = first_tensor(out)
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1).mean(1)  # fmt: skip
    if model.kind == "encoder":
        states = first_tensor(out, "last_hidden_state")
        mask = options.get("attention_mask")
        return pool(states, torch.ones(states.shape[:2], device=states.device) if mask is None else mask)
    return first_tensor(out)
