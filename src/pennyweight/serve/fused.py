"""One C call a decoded token: all layers of a decoder at once, over any `Weight` form, with no Python between them.

`fuse` gives a Llama-shaped model (rotary positions, grouped queries, gated feed-forward net) a second way to compute
one token: where ``transformers`` calls it with one token, a cache and nothing to differentiate, a compiled routine runs
all layers, straight from the codes. A prompt that is read into a cache multiplies in bfloat16 where the processor has
it, and goes through `pennyweight.serve.prompt` where it is one sequence from its beginning. Everything else (several
sequences, padding, training, hooks, attention weights asked for, a forward pass without a cache to fill) is computed as
before, and so is everything on a machine without a C compiler. The cache stays an ordinary ``DynamicCache`` whose
tensors lie in memory of our own, so that plain ``generate`` works, crops and copies it.

The first token after the weights have changed is computed both ways; if they disagree, or the plain way is faster on
this machine, the model keeps the plain way.
Decoded tokens differ by the order of sums in float32; a bfloat16 model keeps more digits than it does by itself.

Shape letters: L layers, G key-value heads, C positions there is room for, P positions held, S size of a head, W width.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from pennyweight import native
from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import native_dtype
from pennyweight.serve.prompt import Reader
from pennyweight.weights import CompactLinear, LowRank, Product, Sum, Weight, one_row
from pennyweight.weights.one_row import Matrix, Prepared

_KINDS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LEAST_ROOM = 256
_TIMED = 3  # runs of the routine beside the first token's plain way
_FEW = 4  # tokens that are too few to make matrices for
_VERSION = attrgetter("_version")
_TRIED = 16  # tokens of the first prompt that are read both ways
#: A factor of a map, and where it reads and writes.
_Step = tuple[Prepared, int, int]


class _Part(ctypes.Structure):
    _fields_ = (("matrix", ctypes.POINTER(Matrix)), ("source", ctypes.c_int64), ("target", ctypes.c_int64))


class _Map(ctypes.Structure):
    _fields_ = (("parts", ctypes.POINTER(_Part)), ("count", ctypes.c_int64), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("heads", ctypes.c_int64), ("groups", ctypes.c_int64), ("inner", ctypes.c_int64),
        *((name, _Map) for name in _MAPS),
        ("before", ctypes.c_void_p), ("between", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p), ("key_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
    )  # fmt: skip


class _Network(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int64), ("width", ctypes.c_int64), ("size", ctypes.c_int64), ("context", ctypes.c_int64),
        ("widest", ctypes.c_int64), ("scratch", ctypes.c_int64), ("brain", ctypes.c_int64),
        ("epsilon", ctypes.c_float), ("scaling", ctypes.c_float),
        ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p), ("norm", ctypes.c_void_p),
        ("layer", ctypes.POINTER(_Layer)),
    )  # fmt: skip


def fuse(module: nn.Module, *, prompt: torch.dtype | None = None) -> bool:
    """Let a causal language model decode through the routine; whether it is of the kind that can.

    Args:
        module: a model of ``transformers``, changed in place: its class becomes one of the same name whose ``forward``
            looks for tokens to decode. Copies and pickles are of the plain class.
        prompt: what a prompt's matrix products are taken in; None for bfloat16 where the processor has it, else as
            the model is. float32 reads prompts exactly as without `fuse`.
    """
    if prompt not in (None, torch.float32, torch.bfloat16):
        raise OptionError(f"fuse: prompts in {prompt}; give float32 or bfloat16")
    base = _base_of(module)
    if base is None or native.library("decode") is None:
        return False
    _PROMPTS[base] = native_dtype("cpu") if prompt is None else prompt
    if not hasattr(type(base), "unfused"):
        base.__class__ = _fused_class(type(base))  # type: ignore[arg-type]  # classes can be hashed
    return True


def unfuse(module: nn.Module) -> None:
    """Take `fuse` back; nothing where it was not done."""
    base = _base_of(module)
    if base is not None and (plain := getattr(type(base), "unfused", None)) is not None:
        _STATES.pop(base, None)
        _PROMPTS.pop(base, None)
        base.__class__ = plain


def fused(module: nn.Module) -> bool:
    """Whether the last token that ``module`` was asked to decode went through the routine."""
    base = _base_of(module)
    state = None if base is None else _STATES.get(base)
    return state is not None and state.agrees


def reads_prompts(module: nn.Module) -> bool:
    """Whether the last prompt of ``module`` could be read the short way."""
    base = _base_of(module)
    state = None if base is None else _STATES.get(base)
    return state is not None and state.reader is not None and state.reads


def _base_of(module: nn.Module) -> nn.Module | None:
    return next((part for part in (module, getattr(module, "model", None)) if type(part).__name__ in _KINDS), None)


@cache  # one class of each kind, however many models
def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        if _ours(self, input_ids, attention_mask, past_key_values, inputs_embeds, options):
            assert input_ids is not None
            compute = _decoded if input_ids.shape[1] == 1 else _prompted
            found = compute(self, input_ids, position_ids, past_key_values)
            if found is not None:
                return BaseModelOutputWithPast(last_hidden_state=found, past_key_values=past_key_values)
        lower = _reads_prompt(self, input_ids, past_key_values)
        with torch.autocast("cpu", torch.bfloat16) if lower else nullcontext():
            return plain.forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **options,
            )

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return (_empty, (plain,), *object.__reduce_ex__(self, protocol)[2:])

    body = {"forward": forward, "unfused": plain, "__reduce_ex__": reduce, "__module__": plain.__module__}
    return type(plain.__name__, (plain,), body | {"__qualname__": plain.__qualname__, "__doc__": plain.__doc__})


def _empty(cls: type[nn.Module]) -> nn.Module:
    """What a copy or a pickle of a fused model begins with: the plain class."""
    return cls.__new__(cls)


def _ours(
    module: Any,
    ids: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
    embeds: Tensor | None,
    options: dict[str, Any],
) -> bool:
    """Whether this call puts tokens of one sequence into a cache, asks for nothing else, and nobody looks on."""
    config = module.config
    return (
        embeds is None
        and ids is not None
        and ids.ndim == 2
        and len(ids) == 1
        and ids.device.type == "cpu"
        and type(cache) is DynamicCache
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and (mask is None or (mask.ndim == 2 and len(mask) == 1 and bool(mask.all())))
        and not torch.is_grad_enabled()
        and not module.training
        and not any(value for name, value in options.items() if name not in ("cache_position", "return_dict"))
        and not (config.output_attentions or config.output_hidden_states)
        and config._attn_implementation in ("eager", "sdpa")
        and getattr(config, "sliding_window", None) is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch.jit._trace.is_tracing()  # type: ignore[no-untyped-call]
    )


def _reads_prompt(module: Any, ids: Tensor | None, cache: Cache | None) -> bool:
    """Whether these are tokens to put into a cache that was asked for, and may be multiplied in bfloat16."""
    return (
        ids is not None
        and ids.device.type == "cpu"
        and ids.numel() > _FEW
        and type(cache) is DynamicCache
        and _PROMPTS.get(module) == torch.bfloat16
        and module.norm.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@dataclass(frozen=True)
class _Mark:
    """What a module is made of at one time. To look whether it still is takes a third of the time of walking it.

    Attributes:
        held: the tables of children, parameters and buffers of every module in it that has any, and what was in them.
        tensors: all parameters and buffers.
        counted: those of them that count their versions.
        addresses, versions: of ``tensors`` and of ``counted``.
    """

    held: tuple[tuple[dict[str, Any], list[int]], ...]
    tensors: tuple[Tensor, ...]
    counted: tuple[Tensor, ...]
    addresses: list[int]
    versions: list[int]

    @classmethod
    def of(cls, module: nn.Module) -> _Mark:
        tables = [held for part in module.modules() for held in (part._modules, part._parameters, part._buffers)]
        tensors = (*module.parameters(), *module.buffers())
        counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
        # ids, not the tensors: comparing these would compare their numbers
        held = tuple((table, list(map(id, table.values()))) for table in tables if table)
        return cls(held, tensors, counted, list(map(Tensor.data_ptr, tensors)), list(map(_VERSION, counted)))

    def stands(self) -> bool:
        """Whether nothing was exchanged, trained, moved or overwritten since."""
        return (
            all(list(map(id, table.values())) == ids for table, ids in self.held)
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(_VERSION, self.counted)) == self.versions
        )


@dataclass
class _State:
    """A model as the routine reads it, and the cache it writes to.

    Attributes:
        mark: of its tensors and modules when it was read.
        network: the C structure; what it points to is in ``held``.
        modules: those whose hooks would be passed over.
        agrees: whether its first token was that of the plain way; known once it is ``checked``.
        reads: the same of the first tokens of a prompt; known once there is a ``reader``.
        keys, values: (L, 1, G, C, S), the room of the cache.
        owner: the first layer of the cache that was written to last.
        count: P.
    """

    mark: _Mark
    network: _Network
    layers: Any
    held: list[Any]
    modules: tuple[nn.Module, ...]
    dtype: torch.dtype
    groups: int
    agrees: bool = True
    checked: bool = False
    reads: bool = True
    reader: Reader | None = None
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    owner: weakref.ref[DynamicLayer] | None = None
    count: int = 0


#: Beside the modules, not in them: what points into memory can be neither copied nor pickled.
_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_PROMPTS: weakref.WeakKeyDictionary[nn.Module, torch.dtype] = weakref.WeakKeyDictionary()


def _decoded(module: Any, ids: Tensor, positions: Tensor | None, cache: Any) -> Tensor | None:
    """The normalized hidden state (1, 1, W) of one more token, whose keys and values ``cache`` then holds; or None."""
    count = int(cache.get_seq_length())
    if count < 1 or (positions is not None and int(positions) != count) or len(cache.layers) != len(module.layers):
        return None
    state = _STATES.get(module)
    if state is None or not state.agrees or not _continues(state, cache, count):
        state = _prepared(module, state)
        if not state.agrees or not _adopted(module, state, cache, count):
            return None
    if _hooked(state):
        return None
    if count == state.keys.shape[3]:
        _moved(module, state, 2 * count)
    embedded = module.embed_tokens(ids)
    x = embedded.detach().float().reshape(-1).clone()
    kept = None if state.checked else x.clone()
    _decode(state, x, count)
    found: Tensor = x.to(embedded.dtype).view(1, 1, -1)
    if kept is not None:
        allowed = 5e-2 if found.dtype == torch.bfloat16 else 1e-3
        started = perf_counter()
        state.checked, state.agrees = True, _agree(module, ids, cache, found, allowed)
        plain = perf_counter() - started
        state.agrees = state.agrees and _best(lambda: _decode(state, kept.clone(), count)) < plain
        if not state.agrees:
            return None
    state.count = count + 1
    _show(state, cache)
    return found


def _decode(state: _State, x: Tensor, count: int) -> None:
    """``x``, a token's embedding (W,) in float32, becomes its normalized hidden state; done again, it does the same."""
    library = native.library("decode")
    assert library is not None
    if library.decode(ctypes.byref(state.network), ctypes.c_void_p(x.data_ptr()), count, torch.get_num_threads()):
        raise MemoryError(f"no memory to decode after {count} tokens")


def _best(compute: Callable[[], None]) -> float:
    """The seconds of the shortest of a few runs, so that another program's moment does not decide."""
    taken = []
    for _ in range(_TIMED):
        started = perf_counter()
        compute()
        taken.append(perf_counter() - started)
    return min(taken)


def _prompted(module: Any, ids: Tensor, positions: Tensor | None, cache: Any) -> Tensor | None:
    """The normalized hidden states (1, P, W) of a prompt, whose keys and values ``cache`` then holds; or None."""
    if ids.shape[1] <= _FEW or _PROMPTS.get(module) != torch.bfloat16 or cache.get_seq_length():
        return None
    if positions is not None and not torch.equal(positions, torch.arange(ids.shape[1])[None]):
        return None
    state = _prepared(module, _STATES.get(module))
    if not state.agrees or not state.reads or _hooked(state):
        return None
    if state.reader is None:
        few = ids[:, :_TRIED]
        state.reader = Reader(module)
        state.reads = _agree(module, few, DynamicCache(), state.reader.read(module, few, DynamicCache()), 5e-2)
        if not state.reads:
            return None
    return state.reader.read(module, ids, cache)


def _hooked(state: _State) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in state.modules)


def _continues(state: _State, cache: Any, count: int) -> bool:
    """Whether ``cache`` is as the last token left it."""
    first = cache.layers[0]
    owner: Any = None if state.owner is None else state.owner()
    return bool(
        first is owner
        and state.count == count
        and first.keys.data_ptr() == state.keys.data_ptr()
        and cache.layers[-1].values.data_ptr() == state.values[-1].data_ptr()
    )


def _show(state: _State, cache: Any) -> None:
    """Let the layers of ``cache`` hold what is written, in place."""
    keys, values = (kept[:, :, :, : state.count].unbind(0) for kept in (state.keys, state.values))
    for layer, key, value in zip(cache.layers, keys, values, strict=True):
        layer.keys, layer.values = key, value


def _adopted(module: Any, state: _State, cache: Any, count: int) -> bool:
    """Whether the keys and values of ``cache`` could be taken over."""
    held = [kept for layer in cache.layers for kept in (layer.keys, layer.values)]
    shape = (1, state.groups, count, int(state.network.size))
    if any(kept is None or kept.shape != shape for kept in held):
        return False
    # new room each time: another cache may still show what lies in the old one
    state.keys, state.values = (
        torch.stack([kept.to(state.dtype) for kept in held[start::2] if kept is not None]) for start in (0, 1)
    )
    state.owner, state.count = weakref.ref(cache.layers[0]), count
    _moved(module, state, max(_LEAST_ROOM, 2 * count))
    return True


def _moved(module: Any, state: _State, room: int) -> None:
    """Make room for ``room`` positions, and the turns of queries and keys up to there."""
    more = room - state.keys.shape[3]
    state.keys, state.values = (
        nn.functional.pad(kept, (0, 0, 0, more)).contiguous() for kept in (state.keys, state.values)
    )
    for layer, key, value in zip(state.layers, state.keys, state.values, strict=True):
        layer.keys, layer.values = key.data_ptr(), value.data_ptr()
    like = torch.empty(0, dtype=torch.float32)
    with torch.no_grad():
        turns = module.rotary_emb(like, position_ids=torch.arange(room)[None])
    cosine, sine = (turn[0].float().contiguous() for turn in turns)
    state.held[0] = (cosine, sine)
    state.network.cosine, state.network.sine, state.network.context = cosine.data_ptr(), sine.data_ptr(), room


def _agree(module: Any, ids: Tensor, cache: Any, found: Tensor, allowed: float) -> bool:
    """Whether the plain way finds the same hidden states, but for a share of their length."""
    plain = type(module).unfused.forward(module, input_ids=ids, past_key_values=deepcopy(cache), use_cache=True)
    wanted = plain.last_hidden_state.float()
    off = float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not off <= allowed:
        warnings.warn(f"{type(module).__name__}: its short way is off by {off:.1e} here and is not used", stacklevel=2)
        return False
    return True


def _prepared(module: Any, known: _State | None) -> _State:
    """The model as it is now; what was made before is kept where nothing has changed."""
    if known is not None and known.mark.stands():
        return known
    modules, mark = tuple(module.modules()), _Mark.of(module)
    try:
        state = _read(module, modules, mark)
    except (ModelError, AttributeError):  # other parts than those of the kind
        state = _State(mark, _Network(), None, [], modules, torch.float32, 0, agrees=False)
    _STATES[module] = state
    return state


def _read(module: Any, modules: tuple[nn.Module, ...], mark: _Mark) -> _State:
    """Raises ModelError for parts that are not of the kind."""
    blocks = list(module.layers)
    layers = (_Layer * len(blocks))()
    dtype, size = module.norm.weight.dtype, int(blocks[0].self_attn.head_dim)
    state = _State(mark, _Network(), layers, [None, layers], modules, dtype, 0)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"norms in {dtype}")
    widest = scratch = 0
    for layer, block in zip(layers, blocks, strict=True):
        attention, net = block.self_attn, block.mlp
        if type(net.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise ModelError(f"activation {type(net.act_fn).__name__}")
        if attention.scaling != blocks[0].self_attn.scaling or attention.head_dim != size:
            raise ModelError("heads that differ between layers")
        room = 0
        for name in _MAPS:
            linear = getattr(attention if name in _MAPS[:4] else net, name)
            weight, bias = _weight_of(linear)
            parts, room = _program(weight, -1, -1, room)
            setattr(layer, name, _map(parts, bias, state.held))
            sizes = {"q_proj": "heads", "k_proj": "groups", "gate_proj": "inner"}
            if name in sizes:
                setattr(layer, sizes[name], weight.shape[0] // (1 if name == "gate_proj" else size))
            widest = max(widest, *weight.shape)
        scratch = max(scratch, room)
        norms = {
            "before": block.input_layernorm,
            "between": block.post_attention_layernorm,
            "query_norm": getattr(attention, "q_norm", None),
            "key_norm": getattr(attention, "k_norm", None),
        }
        for name, norm in norms.items():
            setattr(layer, name, None if norm is None else _norm(norm, state))
    groups = {int(layer.groups) for layer in layers}
    if len(groups) != 1 or any(layer.heads % layer.groups for layer in layers):
        raise ModelError("key-value heads that differ between layers")
    state.groups = groups.pop()
    state.network = _Network(
        layers=len(blocks), width=module.norm.weight.numel(), size=size, widest=widest, scratch=scratch,
        brain=dtype == torch.bfloat16, epsilon=module.norm.variance_epsilon, scaling=blocks[0].self_attn.scaling,
        norm=_norm(module.norm, state), layer=ctypes.cast(layers, ctypes.POINTER(_Layer)),
    )  # fmt: skip
    return state


def _norm(norm: Any, state: _State) -> int:
    if not type(norm).__name__.endswith("RMSNorm") or set(norm.state_dict()) != {"weight"}:
        raise ModelError(f"norm {type(norm).__name__}")
    held = norm.weight.detach().float().contiguous()
    state.held.append(held)
    return int(held.data_ptr())


def _weight_of(linear: Any) -> tuple[Weight | Prepared, Tensor | None]:
    if type(linear) is nn.Linear:
        return one_row.plain(linear.weight), linear.bias
    if type(linear) is CompactLinear and linear.activation is None and linear.product is None:
        return linear.weight, linear.bias
    raise ModelError(f"a {type(linear).__name__} that computes otherwise")


def _program(weight: Weight | Prepared, source: int, target: int, room: int) -> tuple[list[_Step], int]:
    """The factors that are applied one after the other, with what each reads and writes; and the room taken by then.

    -1 is the map's own input or output; several that write the output are added up.
    """
    if isinstance(weight, Prepared):
        return [(weight, source, target)], room
    if isinstance(weight, Sum) and target == -1:
        parts = []
        for _, term in weight.named_terms():
            more, room = _program(term, source, target, room)
            parts += more
        return parts, room
    chain: list[Any] = []
    if isinstance(weight, Product):
        chain = [term for _, term in reversed(weight.named_terms())]
    elif isinstance(weight, LowRank):
        chain = [one_row.plain(weight.down), one_row.plain(weight.up)]
    if len(chain) < 2:
        found = weight.prepared()
        return [(one_row.plain(weight.dense()) if found is None else found, source, target)], room
    parts = []
    for index, term in enumerate(chain):
        last = index == len(chain) - 1
        to = target if last else room
        room += 0 if last else term.shape[0]
        more, room = _program(term, source, to, room)
        parts, source = parts + more, to
    return parts, room


def _map(parts: list[_Step], bias: Tensor | None, held: list[Any]) -> _Map:
    made = (_Part * len(parts))(*(_Part(ctypes.pointer(part.matrix), source, target) for part, source, target in parts))
    held += [parts, made]
    where = None
    if bias is not None:
        held.append(bias.detach().float().contiguous())
        where = held[-1].data_ptr()
    return _Map(ctypes.cast(made, ctypes.POINTER(_Part)), len(parts), where)
