"""Tokens a second of a causal language model: prefill of a prompt, and greedy decoding with its own cache.

Shape letters: T tokens of a prompt, G tokens generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import accepts, device_of, first_tensor, looking
from pennyweight.measure.latency import Clock, Comparison, check_rounds, comparison, order, quiet, rate, settle, timing
from pennyweight.measure.stats import Array, Interval
from pennyweight.model.kv_cache import kept_setting, kv_cache


@dataclass(frozen=True)
class Run:
    """One greedy generation.

    Attributes:
        ids: (G,) the tokens generated.
        prefill: seconds until the first of them.
        decode: seconds for each one after it.
    """

    ids: Tensor
    prefill: float
    decode: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second.

    Attributes:
        prefill: tokens of the prompt read a second.
        decode: tokens written a second after the first.
        threads: that torch computed with.
    """

    prefill: Interval
    decode: Interval
    threads: int


def greedy(
    module: nn.Module,
    prompt: Tensor,
    *,
    tokens: int = 32,
    dtype: torch.dtype | None = None,
    clock: Clock = perf_counter,
) -> Run:
    """Generate the likeliest token ``tokens`` times, whatever it is: no token ends the text early.

    Args:
        module: a causal language model that keeps a cache as those of ``transformers`` do.
        prompt: (T,) token ids.
        tokens: G, at least 2.
        dtype: of matrix products, as in `looking`.
        clock: in seconds.

    Raises:
        ModelError: the model keeps no cache.
    """
    if tokens < 2 or prompt.ndim != 1 or not len(prompt):
        raise OptionError(f"decoding: {tokens} tokens after a prompt {tuple(prompt.shape)}; give at least 2 after (T,)")
    if not accepts(module, "past_key_values"):
        raise ModelError(f"{type(module).__name__} takes no past_key_values: it has no cache to decode with")
    ids = prompt.to(device_of(module))[None]
    mask = ids.new_ones(1, len(prompt) + tokens)
    written: list[Tensor] = []
    with looking(module, dtype):
        settle()
        start = clock()
        cache = _empty_cache(module) if kept_setting(module) is None else kv_cache(module)
        output = _step(module, ids, mask[:, : len(prompt)], cache)
        for _ in range(tokens):
            written.append(first_tensor(output)[:, -1:].argmax(-1))
            if len(written) == 1:
                settle()
                read = clock()
            if len(written) < tokens:
                seen = len(prompt) + len(written)
                output = _step(module, written[-1], mask[:, :seen], output.past_key_values)
        settle()
        end = clock()
    return Run(torch.cat(written, 1)[0].cpu(), read - start, (end - read) / (tokens - 1))


def _empty_cache(module: nn.Module) -> Any:
    """As ``generate`` hands it in."""
    return DynamicCache(config=module.config) if isinstance(module, PreTrainedModel) else None


def _step(module: nn.Module, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    options = {"attention_mask": mask, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    output = module(ids, **{name: value for name, value in options.items() if accepts(module, name)})
    if getattr(output, "past_key_values", None) is None:
        raise ModelError(f"{type(module).__name__} hands no cache back: it cannot decode token by token")
    return output


def speed(
    module: nn.Module,
    prompt: Tensor,
    *,
    tokens: int = 32,
    repeats: int = 5,
    warmup: int = 1,
    dtype: torch.dtype | None = None,
    clock: Clock = perf_counter,
) -> Speed:
    """Tokens a second of `greedy`; arguments as there and in `latency.time`."""
    runs = np.array(list(_rounds([module], prompt, tokens, repeats, warmup, dtype, clock)))[:, 0]
    prefill, decode = timing(runs[:, 0]), timing(runs[:, 1])
    return Speed(rate(prefill.seconds, len(prompt)), rate(decode.seconds, 1), prefill.threads)


def compare(
    a: nn.Module,
    b: nn.Module,
    prompt: Tensor,
    *,
    tokens: int = 32,
    repeats: int = 5,
    warmup: int = 1,
    dtype: torch.dtype | None = None,
    clock: Clock = perf_counter,
) -> tuple[Comparison, Comparison]:
    """The seconds of prefill, and those of one decoded token, of two models in turns; arguments as in `speed`."""
    runs = np.array(list(_rounds([a, b], prompt, tokens, repeats, warmup, dtype, clock)))
    return comparison(runs[:, :, 0]), comparison(runs[:, :, 1])


def _rounds(
    modules: Sequence[nn.Module],
    prompt: Tensor,
    tokens: int,
    repeats: int,
    warmup: int,
    dtype: torch.dtype | None,
    clock: Clock,
) -> Iterator[Array]:
    """(models, 2) seconds of prefill and of a decoded token, round by round."""
    check_rounds(repeats, warmup)
    for _ in range(warmup):
        for module in modules:
            greedy(module, prompt, tokens=tokens, dtype=dtype)
    with quiet():
        for turn in range(repeats):
            seconds = np.zeros((len(modules), 2))
            for index in order(len(modules), turn):
                run = greedy(modules[index], prompt, tokens=tokens, dtype=dtype, clock=clock)
                seconds[index] = run.prefill, run.decode
            yield seconds
