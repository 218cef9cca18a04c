"""A cache of keys and values that holds packed codes, for any model that decodes with the caches of ``transformers``.

Row 122. Sources: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative
AI", arXiv:2410.18441 (staircase quantization), on the layout of Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit
Quantization for KV Cache", arXiv:2402.02750. Keys share a scale by channel over a group of tokens, values by token; the
newest tokens stay as they are (KIVI). Tokens take fewer bits the older they get (the staircase). Differs from the
sources: values are packed with the keys of their group, where KIVI packs each as it leaves the window; ends of a range
are rounded outward, so that no value is clipped; a token that steps down may also have its codes cut short (``nested``)
instead of being quantized again from what rounding left of it.

What the cache holds depends on how many tokens it has seen, not on how they came: reading a text in chunks of
``group_size`` tokens gives what reading it token by token gives, up to rounding in the products. The tokens of one call
see each other as they are, so that a prompt is read exactly and packed afterwards, as KIVI does.

The setting is kept in the model's generation configuration and so saved and loaded with it; plain ``transformers``
carries it along and decodes with a cache of full precision.

Shape letters: B sequences, H key/value heads, T tokens, D numbers of a key or value, G tokens of a group, N groups
held, R rows and C columns of what is packed, S columns that share a scale, W bytes of a packed row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from pennyweight.errors import FormError, ModelError, OptionError
from pennyweight.model.model import Model
from pennyweight.weights.packing import pack, packed_width, unpack

#: The attribute of the generation configuration that holds the setting.
KEY = "pennyweight_kv_cache"
_HEAD = 4  # bytes of a group's scale and zero, float16 each


@dataclass(frozen=True, kw_only=True)
class KVSetting:
    """How keys and values are kept.

    Attributes:
        bits: of a code of the oldest tokens, 2 to 8; 16 packs nothing.
        group_size: G; tokens that are packed together and share a key's scales.
        residual: the newest tokens, kept as they are: this many, and up to G - 1 more.
        ladder: (tokens, bits) steps for the tokens next in age, newest first; all older ones take ``bits``.
        value_group: numbers of a value that share a scale; None for all of a head.
        nested: whether codes are cut short when a token steps down; else it is quantized again.
    """

    bits: int = 4
    group_size: int = 32
    residual: int = 128
    ladder: tuple[tuple[int, int], ...] = ()
    value_group: int | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        if not (self.bits == 16 or 2 <= self.bits <= 8) or self.group_size < 1:
            raise OptionError(
                f"kv_cache: bits = {self.bits}, group_size = {self.group_size}; give 2 to 8 bits, or 16 to pack "
                "nothing, and groups of at least 1 token"
            )
        if self.value_group is not None and self.value_group < 1:
            raise OptionError(f"kv_cache: value_group = {self.value_group}; give at least 1, or none for a whole head")
        if self.residual < 0 or self.residual % self.group_size:
            raise OptionError(
                f"kv_cache: residual = {self.residual} for groups of {self.group_size}; give a multiple of "
                f"{self.group_size}, or 0"
            )
        widths = [bits for _, bits in self.ladder] + [self.bits]
        if any(tokens < 1 or tokens % self.group_size for tokens, _ in self.ladder):
            raise OptionError(
                f"kv_cache: ladder {list(self.ladder)}; every step takes a multiple of group_size {self.group_size}"
            )
        if any(low >= high for high, low in pairwise(widths)) or (self.ladder and widths[0] > 8):
            raise OptionError(
                f"kv_cache: the ladder goes {' -> '.join(map(str, widths))} bits; give fewer bits at each step, from 8"
            )

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> KVSetting:
        """The inverse of `plain`.

        Raises:
            OptionError: a setting that this version does not know.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        if unknown := sorted(set(found) - known):
            raise OptionError(f"kv_cache: unknown {unknown[0]!r}; a setting has {', '.join(sorted(known))}")
        ladder = tuple((int(tokens), int(bits)) for tokens, bits in found.get("ladder", ()))
        return cls(**{**found, "ladder": ladder})

    def plain(self) -> dict[str, Any]:
        """The setting as JSON has it: what differs from the defaults, and ``bits``."""
        found = {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if one.name == "bits" or getattr(self, one.name) != one.default
        }
        return found | ({"ladder": [list(step) for step in self.ladder]} if self.ladder else {})

    @property
    def steps(self) -> tuple[tuple[int | None, int], ...]:
        """(groups held at most, bits) of each step, newest first; the last holds any number."""
        if self.bits == 16:
            return ()
        return (*((tokens // self.group_size, bits) for tokens, bits in self.ladder), (None, self.bits))

    def groups(self, tokens: int) -> tuple[int, ...]:
        """Groups at each step after ``tokens`` tokens."""
        left, found = max(0, tokens - self.residual) // self.group_size, []
        for most, _ in self.steps:
            found.append(left if most is None else min(left, most))
            left -= found[-1]
        return tuple(found)


@dataclass(frozen=True)
class Kept:
    """What one layer's cache takes: every byte of its codes, scales, zeros and unpacked tokens.

    Attributes:
        setting: how it is kept.
        heads: B * H.
        key_dim, value_dim: D of each.
        itemsize: bytes of an unpacked number.
    """

    setting: KVSetting
    heads: int
    key_dim: int
    value_dim: int
    itemsize: int

    def bytes_at(self, tokens: int) -> int:
        """Bytes after ``tokens`` tokens."""
        groups = self.setting.groups(tokens)
        plain = tokens - self.setting.group_size * sum(groups)
        widths = [bits for _, bits in self.setting.steps]
        packed = sum(count * self.group_bytes(bits) for count, bits in zip(groups, widths, strict=True))
        return packed + plain * self.heads * (self.key_dim + self.value_dim) * self.itemsize

    def group_bytes(self, bits: int) -> int:
        """Bytes of a group of tokens at ``bits`` bits."""
        size = self.setting.group_size
        heads = _heads(self.value_dim, self.setting.value_group)
        keys = self.key_dim * (packed_width(size, bits) + _HEAD)
        return self.heads * (keys + size * (packed_width(self.value_dim, bits) + heads * _HEAD))

    @property
    def per_token(self) -> int:
        """Bytes that one more token takes in the long run, rounded up: it then displaces one into the last step."""
        if not self.setting.steps:
            return self.heads * (self.key_dim + self.value_dim) * self.itemsize
        return -(-self.group_bytes(self.setting.bits) // self.setting.group_size)


@dataclass(frozen=True)
class Packed:
    """Rows of codes: what a code stands for is ``zero + scale * code``.

    Attributes:
        codes: (B, H, N, R, W) uint8.
        scale, zero: (B, H, N, R, C / S) float16.
        bits: of a code.
        columns: C.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    columns: int

    @classmethod
    def nearest(cls, x: Tensor, bits: int, share: int) -> Packed:
        """The codes nearest to ``x`` (B, H, N, R, C), each range from its minimum to its maximum.

        Args:
            x: what to pack.
            bits: 2 to 8.
            share: S, columns that share a scale; divides C.

        Error: half a scale at most, for no value lies outside its range.

        Raises:
            FormError: NaN, infinity, or beyond float16.
        """
        columns, groups = x.shape[-1], x.float().reshape(*x.shape[:-1], -1, share)
        low, high = groups.aminmax(dim=-1)
        zero = _outward(low, -1)
        scale = _outward((high - zero.float()) / (2**bits - 1), 1)
        if not bool(torch.isfinite(scale).all() & torch.isfinite(zero).all()):
            raise FormError(
                f"kv_cache: keys or values from {float(x.min()):.4g} to {float(x.max()):.4g} are beyond float16 "
                "scales; keep this model's cache in 16 bits"
            )
        step = torch.where(scale > 0, scale, torch.ones_like(scale)).float()[..., None]
        codes = ((groups - zero.float()[..., None]) / step).round_().clamp_(0, 2**bits - 1)
        return cls(pack(codes.to(torch.uint8).flatten(-2), bits), scale, zero, bits, columns)

    def values(self) -> Tensor:
        """(B, H, N, R, C) float32."""
        codes = unpack(self.codes, self.bits, self.columns).reshape(*self.scale.shape, -1)
        return torch.addcmul(self.zero.float()[..., None], self.scale.float()[..., None], codes.float()).flatten(-2)

    def narrowed(self, bits: int, *, nested: bool) -> Packed:
        """The same in fewer bits: by the leading bits of every code, or quantized again."""
        if not nested:
            return Packed.nearest(self.values(), bits, self.columns // self.scale.shape[-1])
        drop = self.bits - bits
        codes = unpack(self.codes, self.bits, self.columns) >> drop
        # a short code stands for the middle of the 2**drop codes that it was
        zero = (self.zero.float() + self.scale.float() * (2**drop - 1) / 2).half()
        return Packed(pack(codes, bits), (self.scale.float() * 2**drop).half(), zero, bits, self.columns)

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same change to every tensor; it leaves rows and columns alone."""
        return Packed(change(self.codes), change(self.scale), change(self.zero), self.bits, self.columns)

    def then(self, newer: Packed) -> Packed:
        """These groups and ``newer`` ones after them."""
        codes, scale, zero = (torch.cat(pair, dim=2) for pair in zip(self.tensors, newer.tensors, strict=True))
        return Packed(codes, scale, zero, self.bits, self.columns)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything held."""
        return self.codes, self.scale, self.zero


def _outward(x: Tensor, sign: int) -> Tensor:
    """``x`` in float16, rounded up (+1) or down (-1)."""
    near = x.half()
    # one part in 1024 and the smallest step are more than rounding can take
    beyond = (x + sign * (x.abs() * 2**-10 + 2**-24)).half()
    return torch.where((near.float() - x) * sign < 0, beyond, near)


def _heads(value_dim: int, value_group: int | None) -> int:
    """Scales of one token's value."""
    if value_group is not None and value_dim % value_group:
        raise OptionError(
            f"kv_cache: value_group {value_group} does not divide the {value_dim} numbers of a value; give a divisor, "
            "or none for all of them"
        )
    return 1 if value_group is None else value_dim // value_group


@dataclass(frozen=True)
class _Step:
    """The groups at one step of the ladder, oldest first: keys (.., N, D, G) and values (.., N, G, D)."""

    keys: Packed
    values: Packed

    @property
    def groups(self) -> int:
        return self.keys.codes.shape[2]

    def each(self, change: Callable[[Tensor], Tensor]) -> _Step:
        return _Step(self.keys.each(change), self.values.each(change))

    def then(self, newer: _Step) -> _Step:
        return _Step(self.keys.then(newer.keys), self.values.then(newer.values))

    def narrowed(self, bits: int, *, nested: bool) -> _Step:
        return _Step(self.keys.narrowed(bits, nested=nested), self.values.narrowed(bits, nested=nested))

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, H, N*G, D) keys and values."""
        keys = self.keys.values().transpose(-1, -2).flatten(2, 3)
        return keys.to(dtype), self.values.values().flatten(2, 3).to(dtype)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of several stretches of tokens, oldest first, as one."""
    return torch.cat([keys for keys, _ in parts], dim=-2), torch.cat([values for _, values in parts], dim=-2)


class PackedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: packed ones by age, and the newest in ``keys`` and ``values`` as they came.

    Args:
        setting: how they are kept.
    """

    is_croppable = False  # cutting into a group leaves what rounding made of the rest of it

    def __init__(self, setting: KVSetting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.setting = setting
        self._held: list[_Step | None] = [None] * len(setting.steps)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype, device and shapes from the first states (B, H, T, D)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :].clone(), value_states[..., :0, :].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # (B, H, T, D) twice -> all tokens so far
        """Add tokens; all keys and values as this call's queries are to see them: packed ones, then plain ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plain = _joined([self._plain, (key_states, value_states)])
        old = [step.unpacked(self.dtype) for step in reversed(self._held) if step is not None]
        self.keys, self.values = plain
        self._pack(*plain)
        return _joined([*old, plain]) if old else plain

    @property
    def _plain(self) -> tuple[Tensor, Tensor]:
        """The tokens that are not packed: (B, H, T, D) keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        size = self.setting.group_size
        groups = (keys.shape[-2] - self.setting.residual) // size
        if not self.setting.steps or groups < 1:
            return
        end = groups * size
        # copies: a slice would keep the memory of what was packed
        self.keys, self.values = keys[..., end:, :].clone(), values[..., end:, :].clone()
        keys, values = (
            part[..., :end, :].reshape(*part.shape[:2], groups, size, part.shape[-1]) for part in (keys, values)
        )
        bits = self.setting.steps[0][1]
        share = values.shape[-1] // _heads(values.shape[-1], self.setting.value_group)
        self._push(0, _Step(Packed.nearest(keys.transpose(-1, -2), bits, size), Packed.nearest(values, bits, share)))

    def _push(self, at: int, newer: _Step) -> None:
        held = self._held[at]
        whole = newer if held is None else held.then(newer)
        most = self.setting.steps[at][0]
        over = 0 if most is None else max(0, whole.groups - most)
        if over:
            older = whole.each(lambda tensor: tensor[:, :, :over])
            self._push(at + 1, older.narrowed(self.setting.steps[at + 1][1], nested=self.setting.nested))
            whole = whole.each(lambda tensor: tensor[:, :, over:].clone())
        self._held[at] = whole

    def get_seq_length(self) -> int:
        """Tokens held, packed or not."""
        if not self.is_initialized:
            return 0
        packed = sum(step.groups for step in self._held if step is not None)
        return self._plain[0].shape[-2] + self.setting.group_size * packed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held."""
        packed = [part for step in self._held if step is not None for part in (step.keys, step.values)]
        plain = self._plain if self.is_initialized else ()
        return (*(tensor for part in packed for tensor in part.tensors), *plain)

    @property
    def kept(self) -> Kept:
        """What it takes at any number of tokens; it must have seen some."""
        if not self.is_initialized:
            raise ModelError("kv_cache: empty, so that the shapes of keys and values are unknown; run the model first")
        keys, values = self._plain
        heads = keys.shape[0] * keys.shape[1]
        return Kept(self.setting, heads, keys.shape[-1], values.shape[-1], keys.element_size())

    def reset(self) -> None:
        """Forget all tokens."""
        self._held = [None] * len(self.setting.steps)
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: give them as a number below 0. A group that is cut into is unpacked again."""
        if tokens_to_remove > 0:
            raise OptionError(f"kv_cache: crop({tokens_to_remove}); give minus the number of tokens to remove")
        if not tokens_to_remove or not self.is_initialized:
            return
        left = self.get_seq_length() + tokens_to_remove
        if left < 0:
            raise OptionError(f"kv_cache: crop({tokens_to_remove}) of {left - tokens_to_remove} tokens")
        plain = self._plain
        while plain[0].shape[-2] < -tokens_to_remove:
            at = next(index for index, step in enumerate(self._held) if step is not None)
            step = self._held[at]
            assert step is not None
            plain = _joined([step.each(lambda tensor: tensor[:, :, -1:]).unpacked(self.dtype), plain])
            self._held[at] = step.each(lambda tensor: tensor[:, :, :-1].clone()) if step.groups > 1 else None
        end = plain[0].shape[-2] + tokens_to_remove
        self.keys, self.values = (part[..., :end, :].clone() for part in plain)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` (B,), for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._over_sequences(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._over_sequences(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _over_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = (change(part) for part in self._plain)
            self._held = [None if step is None else step.each(change) for step in self._held]

    def offload(self) -> None:
        """Not done: what is packed stays where it is."""

    def prefetch(self) -> None:
        """Nothing was taken away."""


class KVCache(Cache):
    """The cache of a whole model; hand it to ``model(..., past_key_values=cache)`` or ``model.generate``.

    Layers that see a window only, or that keep a recurrent state, stay as they are: theirs does not grow.

    Args:
        setting: how keys and values are kept.
        config: of the model.

    Raises:
        ModelError: no layer keeps all its keys and values.
    """

    def __init__(self, setting: KVSetting, config: PreTrainedConfig) -> None:
        plain = DynamicCache(config=config)
        layers = [PackedLayer(setting) if type(layer) is DynamicLayer else layer for layer in plain.layers]
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            raise ModelError(f"kv_cache: no layer of a {config.model_type} keeps all its keys and values")
        super().__init__(layers=layers)
        self.setting = setting

    @property
    def packed_layers(self) -> tuple[PackedLayer, ...]:
        """The layers whose keys and values are packed."""
        return tuple(layer for layer in self.layers if isinstance(layer, PackedLayer))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, scales and zeros among them."""
        rest = [layer for layer in self.layers if not isinstance(layer, PackedLayer)]
        plain = (getattr(layer, name, None) for layer in rest for name in ("keys", "values"))
        packed = (tensor for layer in self.packed_layers for tensor in layer.tensors)
        return sum(tensor.nbytes for tensor in (*plain, *packed) if isinstance(tensor, Tensor))

    def kv_bytes(self, tokens: int) -> int:
        """What the packed layers take after ``tokens`` tokens; the model must have run on some."""
        return sum(layer.kept.bytes_at(tokens) for layer in self.packed_layers)


def kv_cache(
    model: Model | nn.Module, setting: KVSetting | None = None, **options: Any
) -> KVCache | EncoderDecoderCache:
    """An empty packed cache for ``model``: ``model.generate(ids, past_key_values=kv_cache(model, bits=4))``.

    Args:
        model: decodes with caches of ``transformers``.
        setting: how keys and values are kept; None for the one that was kept with the model (`keep`).
        options: of `KVSetting`, instead of ``setting``.

    Raises:
        ModelError: the model keeps no cache, or no setting.
        OptionError: options that do not go together.
    """
    module = model.module if isinstance(model, Model) else model
    config = _generating(module).config
    if setting is None:
        setting = KVSetting(**options) if options else kept_setting(module)
    elif options:
        raise OptionError(f"kv_cache: a setting and {', '.join(options)}; give one or the other")
    if setting is None:
        raise ModelError(f"kv_cache: {type(module).__name__} was saved without a setting; give one, such as bits=4")
    decoder = config.get_text_config(decoder=True)
    own = KVCache(setting, decoder)
    if not config.is_encoder_decoder:
        return own
    return EncoderDecoderCache(own, DynamicCache(config=decoder))  # what is read across is read whole, once


def keep(model: Model | nn.Module, setting: KVSetting) -> None:
    """Make ``setting`` part of the model: saved and loaded with it, and what `kv_cache` and measurements use.

    Raises:
        ModelError: the model keeps no cache.
    """
    module = model.module if isinstance(model, Model) else model
    kv_cache(module, setting)  # whether it can be
    found: Any = _generating(module).generation_config
    found._from_model_config = False  # else what it has of its own is dropped when it is read back
    setattr(found, KEY, setting.plain())


@contextmanager
def keeping(module: nn.Module, setting: KVSetting | None) -> Iterator[None]:
    """For a while ``setting`` is part of the model, in place of the one it has; None changes nothing."""
    if setting is None:
        yield
        return
    before = kept_setting(module)
    keep(module, setting)
    try:
        yield
    finally:
        found = _generating(module).generation_config
        if before is None:
            delattr(found, KEY)
        else:
            setattr(found, KEY, before.plain())


def kept_setting(model: Model | nn.Module) -> KVSetting | None:
    """The setting that was kept with ``model``."""
    module = model.module if isinstance(model, Model) else model
    found = getattr(getattr(module, "generation_config", None), KEY, None)
    return None if found is None else KVSetting.of(found)


def _generating(module: nn.Module) -> PreTrainedModel:
    if not isinstance(module, PreTrainedModel) or not isinstance(module.generation_config, GenerationConfig):
        raise ModelError(
            f"kv_cache: {type(module).__name__} keeps no cache of transformers; give one of its models that generates"
        )
    return module


def read(module: nn.Module, ids: Tensor, *, cache: Cache, chunk: int, **options: Any) -> SimpleNamespace:
    """Run a causal language model on ``ids`` (B, T) through ``cache``, ``chunk`` tokens at a time.

    With chunks of a packed cache's ``group_size`` every token sees what it would see if the text were written.

    Returns:
        An output with the ``logits`` (B, T, V).
    """
    parts = []
    mask = torch.ones_like(ids)
    for start in range(0, ids.shape[1], chunk):
        end = start + chunk
        output = module(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **options
        )
        parts.append(output.logits)
    return SimpleNamespace(logits=torch.cat(parts, dim=1))
