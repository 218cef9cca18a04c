"""One view of any model: its blocks, and the role of every linear map in them.

Levers, the calibration walk and the planner ask the anatomy, never the name of a class. It is read off the module tree:
blocks are the repeated children of a ``ModuleList`` or ``Sequential`` (`sites.py`), roles come from names (`roles.py`),
layouts of fused maps from shapes and the attention's own head counts.

Shape letters: M out features, N in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, ShapeError
from pennyweight.model import sites as find
from pennyweight.model.roles import UNKNOWN, role_of
from pennyweight.model.sites import Kind, Site
from pennyweight.weights import Weight
from pennyweight.weights.layers import CompactConv1d, CompactConv2d, CompactEmbedding, CompactLinear


@dataclass(frozen=True)
class Map:
    """One linear map of a model.

    Attributes:
        name: its key everywhere: the path, or ``path#role`` when several maps lie in one layer.
        role: see `pennyweight.model.roles`.
        path: the module that holds it.
        rows: the slice of out rows it takes when maps are stacked in one layer; None for the whole layer, and for fused
            layouts whose parts are interleaved.
        shape: (M, N); a convolution counts as (out channels, in channels of a group * kernel size).
        kind: how the layer stores and applies it.
        block: index of the block it lies in, None outside.
        input_group: maps of equal group multiply the very same rows; the name of the first of them.
        parameter: name of the tensor in the module at ``path``.
        expert: which slice of a stacked expert tensor.
        replaceable: whether `replace` can put a compact layer at ``path``.
        tied_to: name of the earlier map that shares its tensor.
    """

    name: str
    role: str
    path: str
    rows: tuple[int, int] | None
    shape: tuple[int, int]
    kind: Kind
    block: int | None
    input_group: str
    parameter: str = "weight"
    expert: int | None = None
    replaceable: bool = True
    tied_to: str | None = None


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks: its running index over all stacks, its path, and its maps in order."""

    index: int
    path: str
    maps: tuple[Map, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        blocks: in order; an encoder-decoder lists the encoder's first, a staged vision model stage by stage.
        embedding: the table of token vectors, None for models without tokens.
        head: the map from hidden states to vocabulary scores, None for models without one.
        tied: whether head and embedding share one tensor.
        norms: paths of the normalization layers.
        unknown: what has no role: names of maps (listed by `maps` with role "unknown"), and of bare parameters of two
            or more dimensions that no map stands for.
        whole: one map a layer, fused layers in one piece.
    """

    blocks: tuple[Block, ...]
    embedding: Map | None
    head: Map | None
    tied: bool
    norms: tuple[str, ...]
    unknown: tuple[str, ...]
    whole: tuple[Map, ...]
    parts: tuple[Map, ...]

    def maps(self) -> tuple[Map, ...]:
        """All maps in the order of the module tree, fused layers in their parts; tied ones are listed each."""
        return self.parts

    def layers(self) -> tuple[Map, ...]:
        """The layers that `replace` can change: one map a path, fused layers whole, tied ones once."""
        return tuple(found for found in self.whole if found.replaceable and found.tied_to is None)


def of(module: nn.Module) -> Anatomy:
    """The anatomy of ``module``: a ``transformers`` model or any ``nn.Module``, dense or already compact."""
    sites = list(find.sites(module))
    blocks = find.block_paths(module, sorted({site.path for site in sites}))
    whole = [_map(module, site, blocks) for site in sites]
    if not any(found.role.startswith(("attention", "cross_attention", "ffn", "moe")) for found in whole):
        # a plain network: its names mean nothing, and nothing finer is to be said of its layers
        whole = [changed(found, role="linear") if found.role == UNKNOWN else found for found in whole]
    embedding, head = _ends(module, whole)
    whole = [changed(found, role="head") if head and found.name == head.name else found for found in whole]
    whole = _tied(module, _grouped(module, whole, blocks))
    parts = tuple(part for found in whole for part in _parts(module, found))
    by_name = {found.name: found for found in whole}
    return Anatomy(
        blocks=tuple(
            Block(index, path, tuple(part for part in parts if part.block == index))
            for index, path in enumerate(blocks)
        ),
        embedding=by_name[embedding.name] if embedding else None,
        head=by_name[head.name] if head else None,
        tied=embedding is not None and head is not None and _tensor(module, embedding) is _tensor(module, head),
        norms=tuple(path for path, layer in module.named_modules() if path and find.is_norm(layer)),
        unknown=(*(found.name for found in whole if found.role == UNKNOWN), *find.bare(module, sites)),
        whole=tuple(whole),
        parts=parts,
    )


def _map(module: nn.Module, site: Site, blocks: Sequence[str]) -> Map:
    block = next((index for index, path in enumerate(blocks) if site.path.startswith(f"{path}.")), None)
    parent = module.get_submodule(site.path.rpartition(".")[0])
    role = role_of(
        site.qualified if block is None else site.qualified[len(blocks[block]) + 1 :],
        kind=site.kind,
        siblings={name.lower() for name, _ in parent.named_children()},
        in_block=block is not None,
        beside_experts=find.has_experts_beside(module, site.path),
    )
    name = f"{site.path}#{role}" if site.kind == "expert-stack" else site.qualified
    return Map(
        name=name,
        role=role,
        path=site.path,
        rows=None,
        shape=site.shape,
        kind=site.kind,
        block=block,
        input_group=name,
        parameter=site.parameter,
        expert=site.expert,
        replaceable=site.replaceable,
    )


def _tensor(module: nn.Module, found: Map) -> Tensor | Weight:
    held: Tensor | Weight = getattr(module.get_submodule(found.path), found.parameter)
    return held


def _ends(module: nn.Module, whole: Sequence[Map]) -> tuple[Map | None, Map | None]:
    """The token embedding and the head over its vocabulary, as the model itself names them where it does."""
    tables = [found for found in whole if found.role == "embedding" and found.block is None]
    embedding = _first(_announced(module, "get_input_embeddings", tables) or tables)
    linear = [found for found in whole if found.kind in ("linear", "conv1d-transposed") and found.block is None]
    heads = _announced(module, "get_output_embeddings", linear) or [m for m in linear if m.role == "head"]
    if embedding is not None:
        tied = [m for m in linear if _tensor(module, m) is _tensor(module, embedding)]
        heads = tied or heads
    return embedding, _first(heads)


def _first(found: Sequence[Map]) -> Map | None:
    return found[0] if found else None


def _announced(module: nn.Module, getter: str, among: Sequence[Map]) -> list[Map]:
    get = getattr(module, getter, None)
    try:
        layer = get() if callable(get) else None
    except NotImplementedError:  # how the library says that a model has none
        layer = None
    return [found for found in among if layer is not None and module.get_submodule(found.path) is layer]


def _tied(module: nn.Module, whole: Sequence[Map]) -> list[Map]:
    first: dict[tuple[int, int | None], str] = {}
    for found in whole:
        first.setdefault((id(_tensor(module, found)), found.expert), found.name)
    owners = [first[(id(_tensor(module, found)), found.expert)] for found in whole]
    return [changed(f, tied_to=o if o != f.name else None) for f, o in zip(whole, owners, strict=True)]


def _grouped(module: nn.Module, whole: Sequence[Map], blocks: Sequence[str]) -> list[Map]:
    """The same maps with their input groups."""
    parallel = [_is_parallel(module.get_submodule(path)) for path in blocks]
    keys = [found.name if found.block is None else _input_key(found, blocks, parallel) for found in whole]
    first: dict[str, str] = {}
    for key, found in zip(keys, whole, strict=True):
        first.setdefault(key, found.name)
    return [changed(found, input_group=first[key]) for key, found in zip(keys, whole, strict=True)]


def _input_key(found: Map, blocks: Sequence[str], parallel: Sequence[bool]) -> str:
    """What a map in a block reads, in words that are equal for maps that read the same."""
    assert found.block is not None
    block, above = blocks[found.block], found.path.rpartition(".")[0]
    kind, _, part = found.role.rpartition(".")
    if kind == "cross_attention" and part in ("key", "value"):
        return f"{block.rpartition('.')[0]}: the other stream"  # every block of the stack attends to the same one
    if kind == "cross_attention" and part == "query":
        return f"{above}: {kind}"
    if kind == "attention" and part in ("query", "key", "value", "qkv", "query_down", "kv_down"):
        return f"{block}: the one norm" if parallel[found.block] else f"{above}: {kind}"
    if kind.startswith("moe.experts") and part in ("gate", "up", "gate_up"):
        return f"{block}: {kind}"  # the rows routed to this expert
    if kind in ("ffn", "moe", "moe.shared") and part in ("gate", "up", "gate_up", "router"):
        # shared experts lie one level below the router that reads the same rows
        mixture = above.rpartition(".")[0] if kind == "moe.shared" and part != "router" else above
        return f"{block}: the one norm" if parallel[found.block] else f"{mixture}: ffn"
    return found.name


def _is_parallel(block: nn.Module) -> bool:
    """Whether attention and feed-forward both read the output of the block's one norm, which stands before both."""
    names = [name.rpartition(".")[2].lower() for name, layer in block.named_modules() if find.is_norm(layer)]
    # norms of queries, keys and latents lie inside the attention and say nothing of the residual stream
    stream = [name for name in names if not name.startswith(("q", "k"))]
    return len(stream) == 1 and ("input" in stream[0] or stream[0] in ("ln_1", "ln1", "norm1", "norm_1"))


def _parts(module: nn.Module, found: Map) -> Iterator[Map]:
    """The maps that lie in one layer: itself, or its slices when it is fused and its layout is known."""
    cuts = _cuts(module, found)
    start = 0
    for role, size in cuts:
        yield changed(
            found, name=f"{found.path}#{role}", role=role, rows=(start, start + size), shape=(size, found.shape[1])
        )
        start += size
    if not cuts:
        yield found


def _cuts(module: nn.Module, found: Map) -> list[tuple[str, int]]:
    """(role, rows) of the parts stacked in a fused layer; empty for a layer that is not fused or is interleaved."""
    layer = module.get_submodule(found.path)
    stem, _, part = found.role.rpartition(".")
    rows = found.shape[0]
    if part == "gate_up" and getattr(layer, "is_concatenated", True) and rows % 2 == 0:
        return [(f"{stem}.gate", rows // 2), (f"{stem}.up", rows // 2)]
    if part == "qkv" and (sizes := _stacked_heads(module, found, rows)):
        return [(f"{stem}.{name}", size) for name, size in zip(("query", "key", "value"), sizes, strict=True)]
    return []


def _stacked_heads(module: nn.Module, found: Map, rows: int) -> tuple[int, int, int] | None:
    """Rows of query, key and value where they are stacked in this order; None where heads are interleaved or unsure."""
    above, _, leaf = found.name.rpartition(".")
    attention = module.get_submodule(above)
    leaf = leaf.lower()
    if leaf in ("c_attn", "query_key_value") and hasattr(attention, "multi_query"):
        # one key and one value head behind all query heads; otherwise q, k and v alternate, head by head or by groups
        grouped = getattr(attention, "new_decoder_architecture", False)
        width: int = getattr(attention, "head_dim", 0)
        stacked = bool(attention.multi_query) and not grouped
        return (rows - 2 * width, width, width) if stacked else None
    if leaf in ("in_proj_weight", "qkv", "wqkv", "c_attn"):
        return (rows // 3, rows // 3, rows // 3) if rows == 3 * found.shape[1] else None
    if leaf == "qkv_proj":
        config = getattr(attention, "config", None)
        heads, kv_heads = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
        if heads and kv_heads and rows % (heads + 2 * kv_heads) == 0:
            width = rows // (heads + 2 * kv_heads)
            return heads * width, kv_heads * width, kv_heads * width
    return None


def matrix(module: nn.Module, found: Map) -> Tensor:
    """The matrix (M, N) that ``found`` stands for in ``module``, detached; a view where the layer stores it as such."""
    layer = module.get_submodule(found.path)
    held = getattr(layer, found.parameter)
    if isinstance(held, Weight):
        whole = held.dense()
    elif found.kind == "conv1d-transposed":
        whole = held.T
    elif found.kind == "expert-stack":
        whole = held[found.expert].T if getattr(layer, "is_transposed", False) else held[found.expert]
    else:
        whole = held.reshape(-1, held.shape[-1]) if found.kind == "embedding" else held.flatten(1)
    return (whole if found.rows is None else whole[slice(*found.rows)]).detach()


def replace(module: nn.Module, path: str, weight: Weight) -> None:
    """Put a compact layer with ``weight`` where the linear, convolution or embedding at ``path`` stands.

    The bias stays. Every layer that shares the old tensor (a tied head) shares ``weight`` from then on.

    Raises:
        ModelError: nothing at ``path`` that a compact layer can stand in for.
        ShapeError: ``weight`` is not of the layer's shape.
    """
    replace_all(module, {path: weight})


def replace_all(module: nn.Module, weights: Mapping[str, Weight]) -> None:
    """`replace` for many paths, with one look at the module; nothing is replaced where one of them cannot be."""
    sites = {site.path: site for site in find.sites(module)}
    for path, weight in weights.items():
        if path not in sites or not path:
            raise ModelError(
                f"{path or 'the model itself'}: no linear map lies there; `anatomy.of(model).layers()` lists them"
            )
        if not sites[path].replaceable:
            stacked = sites[path].kind == "expert-stack"
            remedy = "call model.experts.split_experts(model) first" if stacked else "leave it dense"
            raise ModelError(f"{path}: {type(module.get_submodule(path)).__name__} reads its tensors itself; {remedy}")
        if weight.shape != sites[path].shape:
            raise ShapeError(f"{path}: a weight of shape {weight.shape} for a layer of shape {sites[path].shape}")
    sharing: dict[int, list[nn.Module]] = {}
    for site in sites.values():
        if site.replaceable:
            layer = module.get_submodule(site.path)
            sharing.setdefault(id(layer.weight), []).append(layer)
    concerned = {path: sharing[id(module.get_submodule(path).weight)] for path in weights}
    made: dict[int, nn.Module] = {}
    for path, weight in weights.items():
        for layer in concerned[path]:
            if id(layer) not in made or made[id(layer)].weight is not weight:
                made[id(layer)] = _compact(layer, weight)
    for other, layer in list(module.named_modules(remove_duplicate=False)):  # a layer may hang in two places
        if id(layer) in made:
            module.set_submodule(other, made[id(layer)])


def _compact(layer: nn.Module, weight: Weight) -> nn.Module:
    """The compact twin of ``layer``, its bias shared; a layer that is compact already takes ``weight`` itself."""
    made: nn.Module
    match layer:
        case nn.Embedding():
            factor = find.embedding_factor(layer)
            assert factor is not None, "not replaceable"
            made = CompactEmbedding(weight, layer.padding_idx, factor, dtype=layer.weight.dtype)
        case nn.Conv1d():
            made = CompactConv1d.of(layer, weight)
        case nn.Conv2d():
            made = CompactConv2d.of(layer, weight)
        case nn.Linear() | Conv1D():
            made = CompactLinear(weight, layer.bias)
        case _:
            layer.weight = weight
            made = layer
    return made.train(layer.training)
