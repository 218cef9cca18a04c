"""Endless streams of samples, each a pure function of its place: where training stands in its data is one number.

Shape letters: C samples (windows), T tokens of a window, B samples taken.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pennyweight.data.text import split
from pennyweight.data.windowing import Part
from pennyweight.errors import DataError, OptionError

Batch = tuple[Tensor, ...]


class Stream(Protocol):
    """What a `Trainer` reads: samples ``start`` to ``start + count`` of an endless stream, the same at every call."""

    def take(self, start: int, count: int) -> Batch:
        """Tensors with ``count`` rows each."""
        ...


class Samples:
    """Rows of tensors in a random order, a new one each epoch.

    Args:
        tensors: (C, ...) each: windows of token ids, or images and their labels.
        seed: of the orders, 0 or more; None for the order they stand in.

    Raises:
        DataError: no rows, or not the same number everywhere.
        OptionError: a seed below 0.
    """

    def __init__(self, *tensors: Tensor, seed: int | None = 0) -> None:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not tensors or not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
            raise DataError(f"samples of shapes {shapes}; give one tensor or more, all with the same number of rows")
        if seed is not None and seed < 0:
            raise OptionError(f"samples: seed {seed}; give a number of 0 or more")
        self.tensors, self.seed = tensors, seed
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, start: int, count: int) -> Batch:
        """Samples ``start`` to ``start + count``; those of epoch ``e`` are e*C to (e+1)*C."""
        first, last = start // len(self), (start + count - 1) // len(self)
        order = torch.cat([self._order(epoch) for epoch in range(first, last + 1)])
        at = order[start - first * len(self) :][:count]
        return tuple(tensor[at] for tensor in self.tensors)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            # those before the last one are of no more use
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            if self.seed is None:
                order = torch.arange(len(self))
            else:
                # torch's CPU generator reads 32 bits of its seed, so both numbers are mixed into those
                mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
                order = torch.randperm(len(self), generator=torch.Generator().manual_seed(mixed))
            self._orders[epoch] = order
        return self._orders[epoch]


class TwoStage:
    """The stream of `two_stage`."""

    def __init__(self, stable_data: Stream, decay_data: Stream, *, switch: int, share: float) -> None:
        if not 0 < share <= 1 or switch < 0:
            raise OptionError(f"two_stage: switch {switch}, share {share}; give a switch >= 0 and 0 < share <= 1")
        self.stable_data, self.decay_data, self.switch, self.share = stable_data, decay_data, switch, share

    def take(self, start: int, count: int) -> Batch:
        """Samples ``start`` to ``start + count``; neither stream skips or repeats one."""
        # how many of the first n samples are of the decay data: a pure function of n, so any stretch knows its own
        first = torch.arange(start, start + count + 1, dtype=torch.float64)
        mixed = (first.sub(self.switch).clamp(min=0) * self.share).floor().long()
        late = mixed.diff() > 0
        begun, taken = int(mixed[0]), int(late.sum())
        parts = []
        if taken:
            parts.append((late, self.decay_data.take(begun, taken)))
        if count > taken:
            parts.append((~late, self.stable_data.take(start - begun, count - taken)))
        found = []
        for tensors in zip(*(batch for _, batch in parts), strict=True):
            whole = tensors[0].new_empty(count, *tensors[0].shape[1:])
            for (place, _), tensor in zip(parts, tensors, strict=True):
                whole[place] = tensor
            found.append(whole)
        return tuple(found)


def two_stage(stable_data: Stream, decay_data: Stream, *, switch: int | None = None, share: float = 0.5) -> TwoStage:
    """Plain data while the rate is stable, better data mixed in while it decays.

    Row 146. Source: S. Hu et al., MiniCPM, arXiv:2404.06395, section 5: knowledge and instruction data enter with the
    decay, where the model settles on what it sees. Differs from the source: the mixture is dealt out evenly, not drawn,
    so that every stretch of the stream holds its share.

    Args:
        stable_data: samples before ``switch``, and what is left of the mixture after it.
        decay_data: samples mixed in from there on.
        switch: the sample at which the decay starts: its step times the batch; None for where ``stable_data``, of a
            known length, have all been seen once.
        share: of ``decay_data`` in the mixture.

    Raises:
        OptionError: a share outside 0 to 1, a switch before the start, or none for an endless stream.
    """
    if switch is None:
        if not isinstance(stable_data, Sized):
            raise OptionError("two_stage: the stable data have no length; give switch=, where the decay starts")
        switch = len(stable_data)
    return TwoStage(stable_data, decay_data, switch=switch, share=share)


def byte_windows(
    source: str | Path | Sequence[str], *, part: Part, length: int = 256, count: int | None = None, seed: int = 0
) -> Tensor:
    """Windows (C, T) of the bytes of one part of a text, int64, without overlap: a byte model needs no tokenizer.

    Args:
        source: see `pennyweight.data.documents`.
        part: "calibration" to train on, "heldout" to judge by.
        length: T.
        count: C, drawn by ``seed``; None for all, in the order of the text.
        seed: of the draw.

    Raises:
        DataError: too little text.
    """
    if length < 2 or (count is not None and count < 1):
        raise DataError(f"{count} windows of {length} bytes; give at least 1 of at least 2")
    found = split(source)
    texts = found.heldout if part == "heldout" else found.calibration
    raw = torch.frombuffer(bytearray("\n\n".join(texts).encode("utf-8")), dtype=torch.uint8)
    whole = len(raw) // length
    wanted = max(1, whole) if count is None else count
    if whole < wanted:
        shown = source if isinstance(source, (str, Path)) else "the given text"
        raise DataError(
            f"{shown}: its {part} part has {len(raw)} bytes, enough for {whole} windows of {length}, and {wanted} were "
            "asked for; give more text, fewer or shorter windows"
        )
    windows = raw[: whole * length].view(whole, length)
    if count is not None:
        windows = windows[torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]]
    return windows.long()
