"""What each operation says of the dimensions of its inputs and outputs.

One rule an operation of ATen, as a program dispatches them (composite ones, such as ``einsum``, have fallen apart by
then). An operation without a rule locks what it touches: nothing is removed that is not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

from torch import Tensor

from pennyweight.surgery.axes import Axis, concat, lock, mark, product, split_concat, split_product, unify


class Trace(Protocol):
    """What a rule may do."""

    def of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor."""

    def give(self, tensor: Any, axes: Sequence[Axis]) -> None:
        """Say what the axes of a result are; nothing happens for what is no tensor."""

    def reduces(self, tensor: Tensor, dims: Sequence[int]) -> None:
        """Note that this operation averages over ``dims`` of its first input."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter, or a view of one."""


Rule = Callable[[Trace, Sequence[Any], Any], None]
RULES: dict[str, Rule] = {}
_INDEX = "single entries are looked up by their place"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations of these names; in-place twins have the same."""

    def register(found: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, found))
        return found

    return register


def elementwise(trace: Trace, args: Sequence[Any], out: Any) -> None:
    """Inputs broadcast together."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    axes = []
    for back in range(out.ndim, 0, -1):
        size = out.shape[-back]
        met = [trace.of(t)[-back] for t in tensors if t.ndim >= back and t.shape[-back] == size]
        for other in met[1:] if size > 1 else ():
            unify(met[0], other)
        axes.append(met[0] if met else Axis(size))
    trace.give(out, axes)


def unknown(trace: Trace, name: str, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """An operation that no rule tells of."""
    for tensor in tensors:
        for axis in trace.of(tensor):
            lock(axis, f"it goes through {name}")
    for out in outs:
        trace.give(out, [Axis(size, f"it comes out of {name}") for size in out.shape])


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "native_dropout",
    "copy",
    "_conj",
    "fill",
    "zero",
)
def _same(trace: Trace, args: Sequence[Any], out: Any) -> None:
    first = out[0] if isinstance(out, tuple) else out
    elementwise(trace, args[:2], first)


for _name in (
    "masked_fill",
    "softplus",
    "gelu",
    "silu",
    "hardtanh",
    "leaky_relu",
    "elu",
    "where",
    "clamp",
    "triu",
    "tril",
):
    RULES[_name] = elementwise


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(trace: Trace, args: Sequence[Any], out: Any) -> None:
    old = [axis for axis in trace.of(args[0]) if axis.size != 1]
    new: list[Axis] = []
    wanted = [size for size in out.shape if size != 1]
    if out.numel() == 0:
        return unknown(trace, "an empty view", args[:1], [out])
    while wanted:
        taken, sizes = [old.pop(0)], [wanted.pop(0)]
        while prod(axis.size for axis in taken) != prod(sizes):
            if prod(axis.size for axis in taken) < prod(sizes):
                taken.append(old.pop(0))
            else:
                sizes.append(wanted.pop(0))
        # several axes to several: over the merged one, unless they match one by one, which the loop above ends on
        new += split_product(product(taken), sizes)
    found = iter(new)
    trace.give(out, [Axis(1) if size == 1 else next(found) for size in out.shape])
    return None


@rule("expand", "broadcast_to")
def _expand(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    own = [Axis(1)] * (out.ndim - len(own)) + own
    trace.give(out, [axis if axis.size == size else Axis(size) for axis, size in zip(own, out.shape, strict=True)])


@rule("permute")
def _permute(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    trace.give(out, [own[dim] for dim in args[1]])


@rule("t", "transpose")
def _transpose(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    if len(own) > 1:
        one, other = args[1:3] if len(args) > 2 else (0, 1)
        own[one], own[other] = own[other], own[one]
    trace.give(out, own)


@rule("unsqueeze")
def _unsqueeze(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    own.insert(args[1] % out.ndim, Axis(1))
    trace.give(out, own)


@rule("squeeze")
def _squeeze(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    dims = range(len(own)) if len(args) == 1 else args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    gone = {dim % len(own) for dim in dims if own[dim].size == 1} if own else set()
    trace.give(out, [axis for dim, axis in enumerate(own) if dim not in gone])


@rule("select")
def _select(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    lock(own.pop(args[1]), _INDEX)
    trace.give(out, own)


@rule("unbind")
def _unbind(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    lock(own.pop(args[1] if len(args) > 1 else 0), _INDEX)
    for one in out:
        trace.give(one, own)


@rule("slice")
def _slice(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    dim: int = args[1] if len(args) > 1 else 0
    start: int = (args[2] if len(args) > 2 else 0) or 0
    step: int = args[4] if len(args) > 4 else 1
    size = own[dim].size
    if out.shape[dim] != size:
        start = min(max(start + (size if start < 0 else 0), 0), size)
        if step != 1:
            lock(own[dim], _INDEX)
            own[dim] = Axis(out.shape[dim], _INDEX)
        else:
            length = out.shape[dim]
            own[dim] = split_concat(own[dim], [start, length, size - start - length])[1]
    trace.give(out, own)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    dim = args[2] if len(args) > 2 else 0
    for piece, one in zip(split_concat(own[dim], [one.shape[dim] for one in out]), out, strict=True):
        axes = list(own)
        axes[dim] = piece
        trace.give(one, axes)


@rule("cat")
def _cat(trace: Trace, args: Sequence[Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.ndim
    tensors = [tensor for tensor in args[0] if tensor.ndim == out.ndim]
    own = [trace.of(tensor) for tensor in tensors]
    axes = list(own[0])
    for other in own[1:]:
        for place in range(out.ndim):
            if place != dim:
                unify(axes[place], other[place])
    axes[dim] = concat([one[dim] for one in own])
    trace.give(out, axes)


@rule("stack")
def _stack(trace: Trace, args: Sequence[Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.ndim
    own = [trace.of(tensor) for tensor in args[0]]
    for other in own[1:]:
        for one, two in zip(own[0], other, strict=True):
            unify(one, two)
    axes = list(own[0])
    axes.insert(dim, Axis(out.shape[dim], _INDEX))
    trace.give(out, axes)


@rule("repeat")
def _repeat(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    own = [Axis(1)] * (out.ndim - len(own)) + own
    trace.give(out, [product([Axis(times), axis]) for times, axis in zip(args[1], own, strict=True)])


def _places(dims: Any, ndim: int) -> list[int]:
    dims = range(ndim) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    return [dim % ndim for dim in dims] if ndim else []


@rule("sum", "mean", "var", "amax", "amin", "linalg_vector_norm", "all", "any", "logsumexp")
def _reduce(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    # the norm has its order before its dimensions
    dims = next((arg for arg in args[1:] if isinstance(arg, (list, tuple))), None)
    gone = _places(dims, len(own))
    keep = out.ndim == len(own)
    trace.give(out, [Axis(1) if d in gone else axis for d, axis in enumerate(own) if keep or d not in gone])


@rule("averaged")
def _averaged(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    dims = _places(next((arg for arg in args[1:] if isinstance(arg, (list, tuple))), None), len(own))
    for dim in dims:
        mark(own[dim], "averaged")
    trace.reduces(args[0], dims)
    _reduce(trace, args, out)


RULES |= {"mean": _averaged, "var": _averaged}


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort", "flip", "argmax", "argsort", "max", "min")
def _along(trace: Trace, args: Sequence[Any], out: Any) -> None:
    """What looks along whole dimensions: removing an index would not be the same as a zero there."""
    own = trace.of(args[0])
    if len(args) > 1 and isinstance(args[1], Tensor):  # the larger of two
        return elementwise(trace, args, out)
    for dim in _places(args[1] if len(args) > 1 else None, len(own)):
        lock(own[dim], "it is compared over")
    for one in out if isinstance(out, (tuple, list)) else [out]:
        axes = own if one.ndim == len(own) else [Axis(size, "it is chosen from") for size in one.shape]
        sizes = zip(axes, one.shape, strict=True)
        trace.give(one, [axis if axis.size == size else Axis(size, "it is chosen from") for axis, size in sizes])
    return None


# its k comes before its dimension
RULES["topk"] = lambda trace, args, out: _along(trace, [args[0], args[2] if len(args) > 2 else -1], out)
RULES["roll"] = lambda trace, args, out: _along(trace, [args[0], *args[2:3]], out)


@rule("mm", "bmm", "matmul")
def _matmul(trace: Trace, args: Sequence[Any], out: Any) -> None:
    a, b = trace.of(args[0]), trace.of(args[1])
    unify(a[-1], b[-2])
    if len(a) == 3:
        unify(a[0], b[0])
        if not (trace.holds(args[0]) or trace.holds(args[1])):  # attention: two activations, head by head
            mark(a[0], "parallel")
            mark(a[-1], "inner")
            mark(b[-1], "inner")
    trace.give(out, [*a[:-1], b[-1]])


@rule("addmm", "baddbmm", "addbmm")
def _addmm(trace: Trace, args: Sequence[Any], out: Any) -> None:
    _matmul(trace, args[1:3], out)
    elementwise(trace, [out, args[0]], out)


@rule("linear")
def _linear(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x, weight = trace.of(args[0]), trace.of(args[1])
    unify(x[-1], weight[1])
    trace.give(out, [*x[:-1], weight[0]])
    if len(args) > 2 and args[2] is not None:
        unify(weight[0], trace.of(args[2])[0])


@rule("_grouped_mm")
def _grouped(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x, weight = trace.of(args[0]), trace.of(args[1])
    unify(x[-1], weight[-2])
    lock(weight[0], "it runs over experts")
    trace.give(out, [*x[:-1], weight[-1]])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "_fused_sdp_choice",
)  # fmt: skip
def _attention(trace: Trace, args: Sequence[Any], out: Any) -> None:
    if not isinstance(out, tuple):
        return
    query, key, value = (trace.of(args[i]) for i in range(3))
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    unify(key[1], value[1])
    for bias in (arg for arg in args[3:] if isinstance(arg, Tensor) and arg.ndim == 4 and arg.shape[1] > 1):
        unify(query[1], trace.of(bias)[1])
    if query[1].size == key[1].size:
        unify(query[1], key[1])
    else:  # grouped queries
        unify(query[1], product([key[1], Axis(query[1].size // key[1].size)]))
    mark(query[1], "parallel")
    for axis in (query[-1], value[-1]):
        mark(axis, "inner")
    trace.give(out[0], [*query[:-1], value[-1]])
    for rest in out[1:]:
        if isinstance(rest, Tensor):
            trace.give(rest, [Axis(size, "it belongs to the attention") for size in rest.shape])


@rule("convolution", "_convolution", "mkldnn_convolution")
def _convolution(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x, weight, groups, transposed = trace.of(args[0]), trace.of(args[1]), args[8], bool(args[6])
    ins, outs = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if groups == 1:
        unify(x[1], ins)
        channels = outs
    elif transposed:
        for axis in (*weight[:2], x[1]):
            lock(axis, "it goes through a transposed convolution in groups")
        channels = Axis(out.shape[1], "it comes out of a transposed convolution in groups")
    else:
        group = Axis(groups)
        unify(x[1], product([group, ins]))
        unify(outs, product([group, Axis(outs.size // groups)]))
        channels = outs
    for axis in (*weight[2:], *x[2:]):
        lock(axis, "it runs over positions")
    if args[2] is not None:
        unify(channels, trace.of(args[2])[0])
    trace.give(out, [x[0], channels, *(Axis(size, "it runs over positions") for size in out.shape[2:])])


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x, count = trace.of(args[0]), len(args[1])
    for scale in (arg for arg in args[2:4] if isinstance(arg, Tensor)):
        for axis, other in zip(x[-count:], trace.of(scale), strict=True):
            unify(axis, other)
    for axis in x[-count:]:
        mark(axis, "averaged")
    trace.reduces(args[0], range(len(x) - count, len(x)))
    _first_like(trace, x, out)


@rule("native_group_norm")
def _group_norm(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x, groups = trace.of(args[0]), args[6]
    inner = product([Axis(groups), Axis(x[1].size // groups)])
    unify(x[1], inner)
    for scale in (arg for arg in args[1:3] if isinstance(arg, Tensor)):
        unify(x[1], trace.of(scale)[0])
    mark(x[1], "averaged")
    trace.reduces(args[0], [1])
    _first_like(trace, x, out)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_native_batch_norm_legit")
def _batch_norm(trace: Trace, args: Sequence[Any], out: Any) -> None:
    x = trace.of(args[0])
    for vector in (arg for arg in args[1:5] if isinstance(arg, Tensor)):
        unify(x[1], trace.of(vector)[0])
    _first_like(trace, x, out)


def _first_like(trace: Trace, axes: Sequence[Axis], out: Any) -> None:
    first, *rest = out
    trace.give(first, axes)
    for one in rest:
        if isinstance(one, Tensor):
            trace.give(one, [Axis(size) for size in one.shape])


@rule(
    "avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_bicubic2d", "avg_pool1d", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d",
)  # fmt: skip
def _pool(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = trace.of(args[0])
    first = out[0] if isinstance(out, tuple) else out
    axes = []
    for axis, size in zip(own, first.shape, strict=True):
        if axis.size != size:
            lock(axis, "it runs over positions")
        axes.append(axis if axis.size == size else Axis(size, "it runs over positions"))
    trace.give(first, axes)
    if isinstance(out, tuple):
        trace.give(out[1], [Axis(size, "it holds places") for size in out[1].shape])


@rule("embedding")
def _embedding(trace: Trace, args: Sequence[Any], out: Any) -> None:
    table, index = trace.of(args[0]), trace.of(args[1])
    lock(table[0], _INDEX)
    trace.give(out, [*index, table[1]])


@rule("index")
def _index(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own, indices = trace.of(args[0]), list(args[1])
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype.itemsize == 1 for index in indices if index is not None) or used != list(range(len(used))):
        return unknown(trace, "an index", args[:1], [out])
    for dim in used:
        lock(own[dim], _INDEX)
    rest = own[len(used) :]
    trace.give(out, [*(Axis(size, _INDEX) for size in out.shape[: out.ndim - len(rest)]), *rest])
    return None


@rule("index_select")
def _index_select(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own = list(trace.of(args[0]))
    lock(own[args[1]], _INDEX)
    own[args[1]] = Axis(out.shape[args[1]], _INDEX)
    trace.give(out, own)


@rule("index_add", "index_copy")
def _index_add(trace: Trace, args: Sequence[Any], out: Any) -> None:
    own, source = trace.of(args[0]), trace.of(args[3])
    for dim in range(len(own)):
        if dim == args[1] % len(own):
            lock(own[dim], _INDEX)
        else:
            unify(own[dim], source[dim])
    trace.give(out, own)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like")
def _made(trace: Trace, args: Sequence[Any], out: Any) -> None:
    trace.give(out, [Axis(size) for size in out.shape])


RULES |= dict.fromkeys(("full_like", "empty_like", "scalar_tensor", "rand", "randn", "rand_like", "randn_like"), _made)
