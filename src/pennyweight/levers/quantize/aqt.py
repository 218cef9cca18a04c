"""Quantization-aware tuning that needs no tuning of its own (AQT).

Row 124. Source: A. Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", arXiv:2105.03536; the method
is in `pennyweight.train.aqt`. Differs from the source: a given model is tuned, not trained from nothing, and without
labels: language models on the next token of the calibration text, others on the answers of the original.

Shape letters: B windows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.lever import Check, at_least, between, lever, one_of, option
from pennyweight.model.model import Model
from pennyweight.train.aqt import AQT
from pennyweight.train.loop import Trainer, next_token_loss
from pennyweight.train.samples import Batch, Samples
from pennyweight.train.schedules import cosine
from pennyweight.work import Work

_BITS = Check("2 to 8, or 16 to leave values as they are", lambda value: 2 <= value <= 8 or value == 16)


@lever(
    "quantize.aqt", reach="model", row=124, paper="Pareto-Optimal Quantized ResNet Is Mostly 4-bit, arXiv:2105.03536"
)
@dataclass(frozen=True, kw_only=True)
class TuneQuantized:
    """Tune a model through rounded weights and inputs, with bounds that are found and then fixed."""

    bits: int = option(4, _BITS, "bits of weights, a scale for each output")
    activation_bits: int = option(4, _BITS, "bits of what layers read")
    edge_bits: int | None = option(8, between(2, 16), "at least so many for the first and the last selected layer")
    granularity: Literal["channel", "tensor"] = option(
        "channel", one_of("channel", "tensor"), "of the bounds of inputs"
    )
    steps: int = option(200, at_least(2), "of training")
    start: float = option(0.1, between(0.001, 1), "share of the steps before inputs are rounded")
    batch: int = option(16, at_least(1), "windows a step")
    learning_rate: float = option(1e-4, between(1e-8, 1), "peak of AdamW, a cosine down to nothing")

    def change(self, model: Model, work: Work) -> None:
        """Leave quantized weights with fixed activations in the selected layers.

        Raises:
            OptionError: a selection that is not plain linear layers and convolutions.
            DataError: no windows, or windows by name.
        """
        given = work.inputs("quantize.aqt")
        if not isinstance(given, Tensor):
            raise DataError(
                "quantize.aqt: trains on one tensor of windows; give token ids or pixels, not inputs by name"
            )
        causal = model.kind == "causal-lm"
        samples = self._text(work) if causal else self._answers(model, given)
        maps = [one for one in work.maps if one.kind != "embedding"]
        if not maps:
            raise OptionError("quantize.aqt: the selection holds no linear map or convolution; widen it")
        aqt = AQT(
            model.module, maps, bits=self.bits, activation_bits=self.activation_bits, edge_bits=self.edge_bits,
            start=max(1, round(self.start * self.steps)), granularity=self.granularity,
        )  # fmt: skip
        trainer = Trainer(
            model.module,
            torch.optim.AdamW([w for w in model.module.parameters() if w.requires_grad], weight_decay=0.0),
            samples,
            batch=self.batch,
            loss=next_token_loss if causal else _match,
            schedule=cosine(self.steps, max(1, self.steps // 10), peak=self.learning_rate, floor=0.0),
            clip=1.0,
            callbacks=[aqt],
        )
        trainer.run(self.steps, report=lambda done, _: work.report("tuning", done, self.steps))
        aqt.finish()
        model.module.eval()

    def _text(self, work: Work) -> Samples:
        return Samples(work.text(self.steps * self.batch), seed=work.seed)

    @staticmethod
    def _answers(model: Model, windows: Tensor) -> Samples:
        """The windows with what the original makes of them."""
        with looking(model.module):
            answers = torch.cat([first_tensor(model.module(part)) for part in torch.split(windows, 64)])
        return Samples(windows, answers)


def _match(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats to the original's distribution over classes; half the squared error of other outputs."""
    found, wanted = first_tensor(module(batch[0])), batch[1]
    if found.ndim == 2:
        return functional.cross_entropy(found, wanted.softmax(-1))
    return functional.mse_loss(found, wanted) / 2
