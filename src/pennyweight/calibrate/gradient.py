"""What the loss says of the outputs of linear maps: the mean squared gradient of every output, by one backward.

This is the diagonal of the output factor of K-FAC (J. Martens and R. Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", arXiv:1503.05671). Differs from the source: only the diagonal is kept; by
default labels are the true next tokens (the empirical Fisher), since a text model is calibrated on text of its use.

The loss of a batch is the sum of all token losses, so that the gradient of an output holds what it does to every later
token. The backward starts from ``softmax(logits) - label``, written by hand: it takes no more memory than the logits.

Shape letters: M out features, N in features, V scores, R rows, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.calibrate.moments import Lookups, Moments, masked, rows_in, rows_out
from pennyweight.calibrate.passage import attention_mask
from pennyweight.calibrate.shadow import Shadow
from pennyweight.errors import DataError
from pennyweight.model import sites
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Kind
from pennyweight.statistics import Statistics
from pennyweight.weights.layers import CompactEmbedding

Inputs = Mapping[str, Tensor] | tuple[Tensor, ...]
Labels = Literal["true", "sampled"]

_TOKENS = 512  # a backward: activations of a 135M model take about 1 MB a token
_IMAGE = 64  # tokens that an image counts as
_ROWS = 256  # rows of scores held in float32 at a time


class _Squares:
    """The running mean of squared gradients by one map's outputs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum, self.count = torch.zeros(width, device=device), 0

    def add(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        for chunk in torch.split(rows, 4096):
            self.sum += chunk.float().square().sum(0)

    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)


class Backward:
    """Runs a filled shadow forward and backward, and gathers gradients by the outputs of its maps.

    Args:
        shadow: of the whole model, filled.
        layers: maps, one a layer.
        head: the layer that gives scores over a vocabulary; its factor is found exactly, as the mean of p (1 - p).
        kind: what the model does: the labels of causal language models are the next tokens.
        labels: "true", or "sampled" from the model's own scores (the Fisher matrix itself).
        loss: from what the model returns and its inputs, the summed loss to differentiate instead.
        seed: of the samples.
    """

    def __init__(
        self,
        shadow: Shadow,
        layers: Sequence[Map],
        *,
        head: Map | None,
        kind: Kind,
        labels: Labels = "true",
        loss: Callable[[Any, Inputs], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.shadow, self.layers, self.head = shadow, layers, head
        self.kind, self.labels, self.loss = kind, labels, loss
        self.squares: dict[str, _Squares] = {}
        self.tables: dict[str, Moments] = {}
        self.lookups: dict[str, Lookups] = {}
        self.mask: Tensor | None = None
        self.of_head: Tensor | None = None
        device = next(shadow.module.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.p_of_head = torch.zeros(0)
        self.rows_of_head = 0

    def run(self, inputs: Inputs) -> dict[str, Statistics]:
        """Statistics by map name: ``gradient`` of every layer reached, ``second_moment`` of tables (see `collect`)."""
        hooks = [self._hook(found) for found in self.layers if found.kind != "embedding"]
        by_path = {found.path: found for found in self.layers}
        for path, layer in self.shadow.module.named_modules():
            if isinstance(layer, (nn.Embedding, CompactEmbedding)):
                hooks.append(self._hook_table(layer, by_path.get(path)))
        tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
        each = max(1, _TOKENS // (_IMAGE if tensors[0].is_floating_point() else tensors[0][0].numel()))
        try:
            for start in range(0, len(tensors[0]), each):
                part = tuple(tensor[start : start + each] for tensor in tensors)
                self._batch(dict(zip(inputs, part, strict=True)) if isinstance(inputs, Mapping) else part)
        finally:
            for hook in hooks:
                hook.remove()
        found = {name: Statistics(squares.count, gradient=squares.mean()) for name, squares in self.squares.items()}
        for name, moments in self.tables.items():
            lookups = self.lookups[name].statistics(name)
            found[name] = Statistics(moments.count, moments.second_moment(), gradient=lookups.gradient)
        if self.head is not None and self.rows_of_head:
            found[self.head.name] = Statistics(self.rows_of_head, gradient=self.p_of_head / self.rows_of_head)
        for name, statistics in found.items():
            for tensor in (statistics.gradient, statistics.second_moment):
                if tensor is not None and not torch.isfinite(tensor.sum()):
                    raise DataError(
                        f"{name}: gradients on the calibration data are NaN or infinite; the model overflows"
                    )
        return found

    def _hook(self, found: Map) -> Any:
        def linear(layer: nn.Module, args: Any, out: Tensor) -> None:
            if self.head is not None and found.name == self.head.name:
                self.of_head = out
            if out.requires_grad:
                out.register_hook(lambda g: self._add(found, g, self.mask))  # type: ignore[no-untyped-call]

        return self.shadow.module.get_submodule(found.path).register_forward_hook(linear)

    def _hook_table(self, table: nn.Embedding | CompactEmbedding, found: Map | None) -> Any:
        factor = table.factor if isinstance(table, CompactEmbedding) else sites.embedding_factor(table)

        def start(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.detach().requires_grad_()  # the graph begins here
            if found is not None:
                lookups = self.lookups.setdefault(found.name, Lookups(found.shape[0], out.device))
                for index in rows_in(found, layer, args[0], self.mask):
                    lookups.add(index)
                weigh = lambda g: self._add_table(found, g * (factor or 1.0), self.mask)  # noqa: E731
                out.register_hook(weigh)  # type: ignore[no-untyped-call]
            return out

        return table.register_forward_hook(start)

    def _add(self, found: Map, gradient: Tensor, mask: Tensor | None) -> None:
        if self.head is not None and found.name == self.head.name and self.rows_of_head:
            return  # known exactly
        squares = self.squares.setdefault(found.name, _Squares(found.shape[0], gradient.device))
        squares.add(rows_out(found, gradient, mask))

    def _add_table(self, found: Map, gradient: Tensor, mask: Tensor | None) -> None:
        moments = self.tables.setdefault(found.name, Moments(found.shape[1], {"second_moment"}, gradient.device))
        moments.add(masked(gradient, mask).reshape(-1, found.shape[1]))

    @torch.enable_grad()
    def _batch(self, inputs: Inputs) -> None:
        self.mask, self.of_head = attention_mask(inputs), None
        given = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
        for tensor in given.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()
        out = self.shadow.module(**inputs) if isinstance(inputs, Mapping) else self.shadow.module(*inputs)
        if self.loss is not None:
            torch.autograd.backward(self.loss(out, inputs))
            return
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if logits is not None and self.kind != "module":
            torch.autograd.backward(logits, self._at_scores(logits, inputs))
        else:
            result = out if isinstance(out, Tensor) else out[0]
            signs = torch.randint(0, 2, result.shape, generator=self.generator, device=result.device)
            torch.autograd.backward(result, self._counted((2 * signs - 1).to(result.dtype)))
        self.of_head = None

    def _counted(self, gradient: Tensor) -> Tensor:
        """``gradient`` without the tokens that do not count."""
        if self.mask is None or gradient.shape[:2] != self.mask.shape:
            return gradient
        return gradient * self.mask.view(*self.mask.shape, *(1,) * (gradient.ndim - 2))

    @torch.no_grad()
    def _at_scores(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """The gradient of the summed cross-entropy by the scores (..., V)."""
        width = logits.shape[-1]
        scores, gradient = logits.reshape(-1, width), torch.zeros_like(logits)
        into, targets = gradient.view(-1, width), self._targets(logits, inputs)
        counts = self._counted(torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)).flatten()
        exact = self._is_exact(logits)
        if exact and not len(self.p_of_head):
            self.p_of_head = torch.zeros(width, device=logits.device)
        for start in range(0, len(scores), _ROWS):
            rows = slice(start, start + _ROWS)
            p = scores[rows].float().softmax(-1)
            kept = counts[rows] if targets is None else counts[rows] & (targets[rows] >= 0)
            if exact:
                self.p_of_head += (p - p.square())[counts[rows]].sum(0)
                self.rows_of_head += int(counts[rows].sum())
            label = torch.multinomial(p, 1, generator=self.generator)[:, 0] if targets is None else targets[rows]
            p.scatter_add_(1, label.clamp_min(0)[:, None], torch.full_like(p[:, :1], -1.0))
            into[rows] = p * kept[:, None]
        return gradient

    def _is_exact(self, logits: Tensor) -> bool:
        """Whether the head's outputs are the scores themselves, not capped or scaled on the way."""
        made = self.of_head
        return made is not None and made.shape == logits.shape and made.data_ptr() == logits.data_ptr()

    def _targets(self, logits: Tensor, inputs: Inputs) -> Tensor | None:
        """The next token of every token, flat, -1 where there is none; None where labels are to be sampled."""
        if self.labels == "sampled" or self.kind != "causal-lm":
            return None
        assert isinstance(inputs, Mapping)
        ids = inputs["input_ids"]
        if logits.shape[:2] != ids.shape:
            raise DataError(f"gradient: scores {tuple(logits.shape)} do not stand beside tokens {tuple(ids.shape)}")
        last = torch.full_like(ids[:, :1], -1)
        following = torch.cat([ids[:, 1:], last], 1)
        if self.mask is not None:  # a padded token is nobody's label
            following = following.masked_fill(~torch.cat([self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])], 1), -1)
        return following.flatten()
