"""Next-token logits, a few positions at a time.

A vocabulary of 49,152 makes 100 MB of float32 logits out of one window of 512 tokens, many times what the rest of the
model needs. So the model runs once with its head reduced to one position, and the head then runs over the states that
reached it in chunks. What some models do to their logits behind the head (a soft cap, a scale) is not lost: chunks go
through the model's own forward, on one token, with the head's input exchanged, unless a trial shows that nothing
happens there.

Shape letters: B windows of a batch, T tokens, D width of the head's input, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.forward import device_of, first_tensor, run
from pennyweight.model import anatomy

_NUMBERS = 2**24  # logits in one chunk: 67 MB. Smaller chunks waste time unpacking a compact head again and again


class Logits:
    """The next-token logits of a causal language model over the positions of windows that have a next token.

    Call it inside `looking`; logits are float32 whatever the products run in.

    Args:
        module: returns logits (B, T, V), or an output that holds them, from token ids (B, T).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        found = anatomy.of(module)
        self.embedding = found.embedding
        self._head: nn.Module | None = module.get_submodule(found.head.path) if found.head else None
        self._vocabulary = 0
        self._bare = False  # whether nothing happens behind the head

    def __call__(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits (C, V) of positions 0..T-2 of each window of ``ids`` (B, T), in order."""
        ids = ids.to(device_of(self.module))
        states = self._states(ids)
        if states is None:
            logits = self._whole(ids)
            for index in self._chunks(ids, logits.shape[-1]):
                yield logits.flatten(0, 1)[index].float()
            return
        if not self._vocabulary:
            self._try(states)
        for index in self._chunks(ids, self._vocabulary):
            chunk = states.flatten(0, 1)[index]
            yield self._direct(chunk) if self._bare else self._replayed(chunk)

    def _chunks(self, ids: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
        """The positions, counted over all of ``ids``, in the fewest equal chunks of at most `_NUMBERS` logits."""
        positions = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
        return torch.tensor_split(positions, -(-len(positions) // max(1, _NUMBERS // vocabulary)))

    def _states(self, ids: Tensor) -> Tensor | None:
        """What reaches the head (B, T, D); None where no head takes one state a token."""
        return None if self._head is None else states_before(self.module, self._head, ids)

    def _whole(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        logits = first_tensor(run(self.module, ids))
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"{type(self.module).__name__} returns {tuple(logits.shape)} for token ids {tuple(ids.shape)}; "
                "a causal language model returns logits (windows, tokens, vocabulary)"
            )
        return logits

    def _try(self, states: Tensor) -> None:
        """Find the vocabulary, and whether anything happens behind the head, on states that no cap leaves alone."""
        probe = torch.randn(4, states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states) * 10
        through = self._replayed(probe)
        self._vocabulary = through.shape[-1]
        self._bare = torch.equal(through, self._direct(probe))

    def _direct(self, states: Tensor) -> Tensor:
        assert self._head is not None
        logits: Tensor = self._head(states[None])[0]
        return logits.float()

    def _replayed(self, states: Tensor) -> Tensor:
        assert self._head is not None

        def exchange(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (states[None], *inputs[1:])

        with self._head.register_forward_pre_hook(exchange):
            output = run(self.module, torch.zeros(1, 1, dtype=torch.long, device=states.device))
        return first_tensor(output)[0].float()


def states_before(module: nn.Module, head: nn.Module, ids: Tensor) -> Tensor | None:
    """What reaches ``head`` of ``module`` on ids (B, T): (B, T, D), with its gradients where the caller wants them.

    The head itself runs on one position only. None where it does not take one state a token.
    """
    seen: list[Tensor] = []

    def shorten(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][..., :1, :], *inputs[1:])

    with head.register_forward_pre_hook(shorten):
        run(module, ids)
    # several where a packed cache makes the model read in chunks
    states = torch.cat(seen, dim=-2) if seen else None
    return states if states is not None and states.shape[:-1] == ids.shape else None


def check_windows(windows: Tensor, logits: Logits) -> None:
    """Raise a DataError unless ``windows`` are token ids (W, T) that the model knows, T at least 2."""
    if windows.ndim != 2 or windows.is_floating_point() or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise DataError(
            f"windows: {windows.dtype} of shape {tuple(windows.shape)}; give token ids (windows, tokens) with at least "
            "one window of 2 tokens"
        )
    known = logits.embedding.shape[0] if logits.embedding else None
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (known is not None and high >= known):
        raise DataError(
            f"windows: token ids {low} to {high}, but the model knows 0 to {known - 1 if known else '...'}; "
            "use the tokenizer of this model"
        )
