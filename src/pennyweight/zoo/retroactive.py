"""Continual attention: what a window of steps attends to, brought up to date as each new step comes.

Row 239. Source: L. Hedegaard, A. Bakhtiarnia and A. Iosifidis, "Continual Transformers: Redundancy-Free Attention for
Online Inference", arXiv:2201.06268: the newest query alone (single output), or all outputs of the window, from running
sums of exponentials and of values weighted by them (retroactive); encoders of one or two blocks; positions that
recycle. Differs from the source: sums are relative to the largest score a row has met, so that no exponential
overflows, are kept in float64, and are taken anew where what leaves the window made up nearly all of them.

A row of sums lives as long as its query is in the window: rounding cannot pile up over more than N steps.

Shape letters: B streams, E features, T steps, N steps of the window, H heads, D features of a head.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import ModelError, OptionError
from pennyweight.zoo.continual import Stepwise

#: A row whose sum fell below this share of what it once was has lost as many digits.
_LOST = 1e-5


class _Attention(Stepwise):
    """What both kinds share: the weights of an ``nn.MultiheadAttention``, and the window."""

    def __init__(self, layer: nn.MultiheadAttention, window: int) -> None:
        if window < 1:
            raise OptionError(f"continual attention: a window of {window} steps; give at least 1")
        if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
            raise ModelError("continual attention: give nn.MultiheadAttention with kdim = vdim = embed_dim, no bias_kv")
        super().__init__(receptive_field=window)
        self.layer = layer.eval()

    def _windows(self, x: Tensor) -> Tensor:
        """Every window of (B, E, T) by itself: (B * T', N, E)."""
        return x.unfold(2, self.receptive_field, 1).movedim(2, 1).flatten(0, 1).mT

    def _attended(self, x: Tensor) -> Tensor:
        """Every token of (B, T, E) to every other."""
        x = x if self.layer.batch_first else x.transpose(0, 1)
        found: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return found if self.layer.batch_first else found.transpose(0, 1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (scaled), key and value (B, H, D) of one step (B, E)."""
        mixed = functional.linear(x, self.layer.in_proj_weight, self.layer.in_proj_bias)
        query, key, value = (t.view(len(x), self.layer.num_heads, -1) for t in mixed.chunk(3, -1))
        return query / sqrt(query.shape[-1]), key, value

    def _joined(self, heads: Tensor) -> Tensor:
        """(B, H, ..., D) -> (B, ..., E), by the output projection."""
        found: Tensor = self.layer.out_proj(heads.movedim(1, -2).flatten(-2))
        return found

    def _forget(self) -> None:
        self._held: tuple[Tensor, ...] = ()

    def _remember(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The last N of each kind (B, H, <=N, D), these included."""
        new = tuple(one.unsqueeze(2) for one in new)
        old = self._held or tuple(one[:, :, :0] for one in new)
        self._held = tuple(
            torch.cat([kept, one], 2)[:, :, -self.receptive_field :] for kept, one in zip(old, new, strict=True)
        )
        return self._held


class SingleOutput(_Attention):
    """Each step attends to the N latest, itself included: (B, E, T) -> (B, E, T - N + 1).

    Args:
        layer: whose weights are used.
        window: N.

    A step costs N*E multiply-adds twice beside the projections; a window all at once N times as many.
    """

    def forward(self, x: Tensor) -> Tensor:
        last = self._attended(self._windows(x))[:, -1]
        return last.view(len(x), -1, last.shape[-1]).mT

    def _step(self, x: Tensor) -> Tensor | None:
        query, key, value = self._heads(x)
        keys, values = self._remember(key, value)
        if not self._due():
            return None
        share = (keys @ query[..., None]).softmax(2)  # (B, H, N, 1)
        return self._joined((share * values).sum(2))


class Retroactive(_Attention):
    """All outputs of the window, each step: (B, E, T) -> (B, E, T - N + 1, N), the newest last.

    Args:
        layer: whose weights are used.
        window: N.

    A step costs about 4*N*E multiply-adds beside the projections, where attending anew costs 2*N*N*E.
    """

    def forward(self, x: Tensor) -> Tensor:
        every = self._attended(self._windows(x))  # (B * T', N, E)
        return every.view(len(x), -1, *every.shape[1:]).permute(0, 3, 1, 2)

    def _forget(self) -> None:
        super()._forget()
        self._sums: tuple[Tensor, ...] | None = None

    def _step(self, x: Tensor) -> Tensor | None:
        new = self._heads(x)
        leaving = self._held
        queries, keys, values = (t.double() for t in self._remember(*new))
        if not self._due():
            return None
        if self._sums is None:
            self._sums = _sums(queries, keys, values)
        else:
            self._sums = self._moved(queries, keys, values, *(t[:, :, :1].double() for t in leaving[1:]))
        total, mixed, _, most = self._sums
        if bool((total < _LOST * most).any()):  # what left was nearly all there was: too few digits are left
            self._sums = _sums(queries, keys, values)
            total, mixed, _, _ = self._sums
        return self._joined((mixed / total[..., None]).to(x.dtype)).mT

    def _moved(self, queries: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The sums one step later: ``key`` and ``value`` (B, H, 1, D) left, the last of ``keys`` came."""
        assert self._sums is not None
        total, mixed, largest, most = (t[:, :, 1:] for t in self._sums)
        stay = queries[:, :, :-1]
        came, left = (stay @ one.mT for one in (keys[:, :, -1:], key))  # (B, H, N - 1, 1)
        level = torch.maximum(largest, came[..., 0])
        fade = (largest - level).exp()
        came, left = (came[..., 0] - level).exp(), (left[..., 0] - level).exp()
        total = total * fade - left + came
        mixed = mixed * fade[..., None] - left[..., None] * value + came[..., None] * values[:, :, -1:]
        moved = (total, mixed, level, torch.maximum(most * fade, total))
        newest = _sums(queries[:, :, -1:], keys, values)
        return tuple(torch.cat(pair, 2) for pair in zip(moved, newest, strict=True))


def _sums(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of exponentials and of values times them, the largest score, and the largest sum so far, for each query."""
    scores = queries @ keys.mT
    largest = scores.amax(-1)
    share = (scores - largest[..., None]).exp()
    total = share.sum(-1)
    return total, share @ values, largest, total


class Encoder(Stepwise):
    """A transformer encoder over a sliding window, its newest output: (B, E, T) -> (B, E, T - N + 1).

    One block attends from the newest step alone. Of two blocks the first updates all outputs of the window, the second
    attends to them from the newest: in a third one all of the second's would change anew.

    Args:
        encoder: one or two layers, with a final norm or not; its mask is none, each window attends to itself.
        window: N.

    Raises:
        ModelError: more than two layers.
    """

    def __init__(self, encoder: nn.TransformerEncoder, window: int) -> None:
        if not 1 <= len(encoder.layers) <= 2:
            raise ModelError(f"continual: an encoder of {len(encoder.layers)} layers; give one or two")
        super().__init__(receptive_field=window)
        self.encoder = encoder.eval()
        blocks = [_block(layer) for layer in encoder.layers]
        kind = SingleOutput if len(blocks) == 1 else Retroactive
        self.first = kind(blocks[0].self_attn, window)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, self.receptive_field, 1).movedim(2, 1).flatten(0, 1).mT
        is_batch_first = _block(self.encoder.layers[0]).self_attn.batch_first
        found = self.encoder(windows) if is_batch_first else self.encoder(windows.transpose(0, 1)).transpose(0, 1)
        last: Tensor = found[:, -1]
        return last.view(len(x), -1, found.shape[-1]).mT

    def _forget(self) -> None:
        self._steps: list[Tensor] = []

    def _step(self, x: Tensor) -> Tensor | None:
        layers = [_block(layer) for layer in self.encoder.layers]
        self._steps = [*self._steps, x][-self.receptive_field :]
        mixed = self.first.forward_step(layers[0].norm1(x) if layers[0].norm_first else x)
        if mixed is None:
            return None
        if len(layers) == 1:
            found = _rest(layers[0], x, mixed)
        else:
            every = _rest(layers[0], torch.stack(self._steps, 1), mixed.mT)  # (B, N, E)
            seen = layers[1].norm1(every) if layers[1].norm_first else every
            found = _rest(layers[1], every[:, -1], _newest(layers[1].self_attn, seen))
        return found if self.encoder.norm is None else self.encoder.norm(found)


def _block(layer: nn.Module) -> nn.TransformerEncoderLayer:
    assert isinstance(layer, nn.TransformerEncoderLayer)
    return layer


def _rest(layer: nn.TransformerEncoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """A block from what it attended to onwards: (..., E)."""

    def forward(seen: Tensor) -> Tensor:
        found: Tensor = layer.linear2(layer.activation(layer.linear1(seen)))
        return found

    x = x + attended
    if layer.norm_first:
        return x + forward(layer.norm2(x))
    x = layer.norm1(x)
    found: Tensor = layer.norm2(x + forward(x))
    return found


def _newest(attention: nn.MultiheadAttention, seen: Tensor) -> Tensor:
    """What the last step of (B, N, E) attends to: (B, E)."""
    last, every = (
        (seen[:, -1:], seen) if attention.batch_first else (seen[:, -1:].transpose(0, 1), seen.transpose(0, 1))
    )
    found: Tensor = attention(last, every, every, need_weights=False)[0]
    return found[:, 0] if attention.batch_first else found[0]


class RecyclingPositions(Stepwise):
    """Adds a position to every step, the same again after as many as there are: (B, E, T) -> (B, E, T).

    Args:
        positions: (E, P); at least 2*N - 1 of them keep every two steps of a window apart in all windows.
    """

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions if isinstance(positions, nn.Parameter) else nn.Parameter(positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions[:, torch.arange(x.shape[2], device=x.device) % self.positions.shape[1]]

    def _step(self, x: Tensor) -> Tensor | None:
        return x + self.positions[:, self.seen % self.positions.shape[1]]
