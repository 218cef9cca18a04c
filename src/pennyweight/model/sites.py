"""Where linear maps lie in a module tree: layers, stacked experts, norms, and the repeated blocks.

Shape letters: M out features, N in features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.weights import Weight
from pennyweight.weights.layers import CompactConv1d, CompactConv2d, CompactEmbedding

Kind = Literal["linear", "conv1d-transposed", "conv2d", "conv1d", "embedding", "expert-stack"]


@dataclass(frozen=True)
class Site:
    """A tensor that is applied as a linear map: the module at ``path`` holds it as ``parameter``."""

    path: str
    parameter: str
    kind: Kind
    shape: tuple[int, int]
    expert: int | None = None
    replaceable: bool = True

    @property
    def qualified(self) -> str:
        """The path, and behind it what else is needed to tell the site from others in the same module."""
        inner = [] if self.parameter == "weight" else [self.parameter]
        inner = inner if self.expert is None else [str(self.expert), *inner]
        return ".".join([self.path, *inner] if self.path else inner)


def sites(module: nn.Module) -> Iterator[Site]:
    """Every linear map of ``module`` in the order of its module tree."""
    inside: tuple[str, ...] = ()
    for path, layer in module.named_modules():
        if path.startswith(inside) and inside:
            continue  # the parts of a compact layer or of a fused attention are no layers of their own
        found = list(_sites_of(path, layer, module))
        if (found and isinstance(getattr(layer, "weight", None), Weight)) or isinstance(layer, nn.MultiheadAttention):
            inside = (*inside, f"{path}." if path else "")
        yield from found


def _sites_of(path: str, layer: nn.Module, root: nn.Module) -> Iterator[Site]:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Weight):
        yield Site(path, "weight", _compact_kind(layer), weight.shape)
    elif isinstance(layer, nn.MultiheadAttention):
        # its forward reads these tensors itself, so that no layer can stand in for them
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (tensor := getattr(layer, name)) is not None:
                yield Site(path, name, "linear", _matrix_shape(tensor), replaceable=False)
        inner = f"{path}.out_proj" if path else "out_proj"
        yield Site(inner, "weight", "linear", _matrix_shape(layer.out_proj.weight), replaceable=False)
    elif isinstance(layer, nn.Linear):
        yield Site(path, "weight", "linear", (layer.out_features, layer.in_features))
    elif isinstance(layer, Conv1D):
        yield Site(path, "weight", "conv1d-transposed", (layer.weight.shape[1], layer.weight.shape[0]))
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        kind: Kind = "conv1d" if isinstance(layer, nn.Conv1d) else "conv2d"
        yield Site(path, "weight", kind, (layer.out_channels, layer.weight[0].numel()))
    elif isinstance(layer, nn.Embedding):
        shape = (layer.num_embeddings, layer.embedding_dim)
        yield Site(path, "weight", "embedding", shape, replaceable=embedding_factor(layer) is not None)
    elif stacks := expert_stacks(layer):
        for expert in range(next(iter(stacks.values())).shape[0]):
            for name, tensor in stacks.items():
                rows, columns = tensor.shape[1:]
                shape = (columns, rows) if getattr(layer, "is_transposed", False) else (rows, columns)
                yield Site(path, name, "expert-stack", shape, expert=expert, replaceable=False)
    elif isinstance(weight, nn.Parameter) and weight.ndim == 2 and has_experts_beside(root, path):
        yield Site(path, "weight", "linear", _matrix_shape(weight), replaceable=False)  # a router that also picks
    else:
        for name, tensor in layer.named_parameters(recurse=False):
            if "position" in name and sum(size > 1 for size in tensor.shape) >= 2:
                shape = (tensor.numel() // tensor.shape[-1], tensor.shape[-1])
                yield Site(path, name, "embedding", shape, replaceable=False)


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1]


def _compact_kind(layer: nn.Module) -> Kind:
    if isinstance(layer, CompactEmbedding):
        return "embedding"
    return "conv2d" if isinstance(layer, CompactConv2d) else "conv1d" if isinstance(layer, CompactConv1d) else "linear"


def embedding_factor(layer: nn.Embedding) -> float | None:
    """What the layer multiplies its rows by; None when it does more than look rows up and scale them."""
    if layer.max_norm is not None:
        return None
    scale: Tensor | float | None = getattr(layer, "embed_scale", None)
    if scale is not None:
        return float(scale)
    return 1.0 if type(layer).forward is nn.Embedding.forward else None


def expert_stacks(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D tensors (E, ., .) of a module that holds all experts in one, by name; empty for other modules."""
    found = {name: tensor for name, tensor in layer.named_parameters(recurse=False) if tensor.ndim == 3}
    counts = {tensor.shape[0] for tensor in found.values()}
    return found if len(found) >= 2 and counts == {getattr(layer, "num_experts", None)} else {}


def has_experts_beside(root: nn.Module, path: str) -> bool:
    """Whether the parent of the module at ``path`` also holds experts."""
    above, _, name = path.rpartition(".")
    return bool(path) and any(
        key.endswith("experts") for key, _ in root.get_submodule(above).named_children() if key != name
    )


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is a normalisation: no children, and no tensors but vectors, one of them its scale."""
    if isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)):
        return True
    tensors = dict(layer.named_parameters(recurse=False))
    leaf = next(layer.children(), None) is None
    return (
        leaf and "weight" in tensors and all(t.ndim == 1 for t in tensors.values()) and not isinstance(layer, nn.PReLU)
    )


def bare(module: nn.Module, found: Sequence[Site]) -> Iterator[str]:
    """Names of parameters that vary along two or more dimensions and that no site, norm or compact form stands for."""
    known = {".".join(filter(None, (site.path, site.parameter))) for site in found}
    compact = tuple(
        f"{path}." for path, layer in module.named_modules() if isinstance(getattr(layer, "weight", None), Weight)
    )
    for name, tensor in module.named_parameters(remove_duplicate=False):
        varies = sum(size > 1 for size in tensor.shape) >= 2 and not name.endswith("bias")
        if varies and name not in known and not name.startswith(compact):
            yield name


def block_paths(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """Paths of the repeated blocks, given the ``paths`` of all maps.

    A block is a child of a ``ModuleList`` or ``Sequential`` that holds two maps or more. Where such children are
    themselves little more than a list of like blocks (the stages of a vision model), the inner ones are the blocks.
    """
    return list(_blocks(module, "", paths))


def _blocks(module: nn.Module, path: str, paths: Sequence[str]) -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if "expert" in name.lower() or isinstance(getattr(module, "weight", None), Weight):
            continue
        is_member = isinstance(module, (nn.ModuleList, nn.Sequential)) and _count(below, paths) >= 2
        inner = list(_blocks(child, below, paths))
        if is_member and not _is_stage(module, child, below, inner, paths):
            yield below
        else:
            yield from inner


def _is_stage(parent: nn.Module, child: nn.Module, path: str, inner: list[str], paths: Sequence[str]) -> bool:
    """Whether ``child`` is a stage: like blocks, and beside them little (a change of resolution) and no attention."""
    if not inner:
        return False
    kinds = {type(child.get_submodule(block[len(path) + 1 :])) for block in inner}
    within = sum(_count(block, paths) for block in inner)
    beside = [p for p in paths if p.startswith(f"{path}.") and not any(p.startswith(f"{b}.") for b in inner)]
    return len(kinds) == 1 and len(beside) < within and not any("att" in p[len(path) :].lower() for p in beside)


def _count(path: str, paths: Sequence[str]) -> int:
    return sum(p.startswith(f"{path}.") for p in paths)
