"""The contract of a compact weight, its cost, and the registry of forms.

A weight stands for a matrix W of shape (out, in) and is applied as ``x @ W.T``. A form writes `forward`, `dense`, `T`,
`cost` and, where it has settings beside tensors and parts, `settings`; everything else is derived here.

Shape letters: M out features, N in features; ... any leading dimensions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pennyweight.errors import FormError, ShapeError, UserError

if TYPE_CHECKING:
    from pennyweight.weights.one_row import Prepared

_FORMS: dict[str, type[Weight]] = {}
FormType = TypeVar("FormType", bound="type[Weight]")


@dataclass(frozen=True)
class Cost:
    """What a weight costs: exact integers, read off the structure.

    Attributes:
        params: stored numbers that stand for the matrix (codes, values, factors, scales; not indices).
        bytes: bytes of the stored tensors, as a safetensors file holds them (its header not counted).
        flops: floating-point operations that one more row of input costs as `Weight.forward` runs it: a multiply-add
            in a matrix product counts two, an addition or multiplication of entries one. What a call does once for
            all of its rows (unpacking, filling zeros in, making a matrix) is not counted.
    """

    params: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.bytes + other.bytes, self.flops + other.flops)


def form(name: str) -> Callable[[FormType], FormType]:
    """Register a final `Weight` class under ``name``, the word that its structure carries in ``weights.json``."""

    def register(cls: FormType) -> FormType:
        assert name not in _FORMS, f"form {name!r} registered twice"
        cls.form = name
        _FORMS[name] = cls
        return cls

    return register


def forms() -> dict[str, type[Weight]]:
    """Every registered form by name, sorted."""
    return dict(sorted(_FORMS.items()))


class Weight(nn.Module, abc.ABC):
    """A matrix of shape (M, N) in a compact form; see the module's text for what a form writes.

    Tensors are parameters (trained) or buffers (not), so that ``state_dict`` holds all of them; parts are child
    modules. `structure` and `rebuild` bring it back from those tensors without a pickle.
    """

    form: ClassVar[str]
    #: Names of constructor arguments that are tensors, in order; a None is left out of the state dict.
    tensors: ClassVar[tuple[str, ...]] = ()
    #: Names of constructor arguments that are weights (one each), in order; a None is left out.
    parts: ClassVar[tuple[str, ...]] = ()
    #: Whether it computes alike in every dtype, holding no floating tensor: combinators then follow their other terms.
    any_dtype: ClassVar[bool] = False

    def __init__(self, *, shape: tuple[int, int]) -> None:
        super().__init__()
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(f"{type(self).__name__}: shape {tuple(shape)} is not (out, in) with both at least 1")
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T``: (..., N) -> (..., M), in the dtype of ``x``."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The matrix (M, N) itself, differentiable where the form is trained."""

    @property
    @abc.abstractmethod
    def T(self) -> Weight:
        """The transposed weight (N, M), in a compact form as well, sharing memory where it can.

        What it trains are its own parameters; for gradients into this weight use `left`.
        """

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Exact parameters, stored bytes and FLOPs a row."""

    def left(self, x: Tensor) -> Tensor:
        """``x @ W``: (..., M) -> (..., N), in the dtype of ``x``; unlike ``T``, it trains this weight itself."""
        return x @ self.dense().to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows ``W[index]`` of shape (*index.shape, N): the look-up of an embedding."""
        return self.dense()[index]

    def prepared(self) -> Prepared | None:
        """What the C routines multiply one row with, read from the form itself; None where they know no such form."""
        return None

    def settings(self) -> dict[str, Any]:
        """The JSON-able constructor arguments that are neither tensors nor parts."""
        return {}

    @classmethod
    def build(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Mapping[str, Weight]) -> Weight:
        """The inverse of `settings`, `tensors` and `parts`; the default passes all of them by name."""
        made: Callable[..., Weight] = cls
        return made(**tensors, **parts, **settings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `dense` returns: the widest of its tensors and parts, float32 where none is floating."""
        own = (t.dtype for t in (*self._parameters.values(), *self._buffers.values()) if t is not None)
        found = [dtype for dtype in own if dtype.is_floating_point]
        found += [part.dtype for _, part in self.named_parts() if not part.any_dtype]
        return reduce(torch.promote_types, found) if found else torch.float32

    def named_parts(self) -> list[tuple[str, Weight]]:
        """The weights it is made of, by the prefix that they have in its state dict."""
        return [(name, part) for name in self.parts if (part := getattr(self, name)) is not None]

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def error(self, matrix: Tensor, second_moment: Tensor | None = None) -> float:
        """Relative error to the matrix it stands for: ``|W - matrix| / |matrix|`` in the Frobenius norm.

        Args:
            matrix: (M, N).
            second_moment: (N, N), ``E[x x^T]`` of the inputs; the norm is then that of the outputs, ``tr(D H D^T)``.
        """
        reference = matrix.detach().double()
        difference = self.dense().detach().double() - reference
        if second_moment is None:
            return float(difference.norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))
        h = second_moment.double()
        wrong, whole = ((d @ h * d).sum().clamp_min(0) for d in (difference, reference))
        return float((wrong / whole.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    def extra_repr(self) -> str:
        shown = ", ".join(f"{key}={value}" for key, value in self.settings().items())
        return f"{self.shape[0]}x{self.shape[1]}" + (f", {shown}" if shown else "")


def structure(weight: Weight) -> dict[str, Any]:
    """The JSON-able structure of ``weight``: with its state dict it rebuilds the weight exactly."""
    found: dict[str, Any] = {"form": weight.form, **weight.settings()}
    held = [name for name in weight.tensors if getattr(weight, name) is not None]
    if held != list(weight.tensors):
        found["tensors"] = held
    inner = {name: structure(part) for name, part in weight.named_parts()}
    if inner:
        found["parts"] = inner
    return found


class Nested(Weight):
    """A combinator over any number of weights, held in ``terms``; abstract."""

    def __init__(self, terms: tuple[Weight, ...], *, shape: tuple[int, int]) -> None:
        super().__init__(shape=shape)
        self.terms = nn.ModuleList(terms)

    def named_terms(self) -> list[tuple[str, Weight]]:
        """``("terms.0", first), ...`` as the state dict names them."""
        return [(f"terms.{index}", term) for index, term in enumerate(self.terms)]  # type: ignore[misc]

    def named_parts(self) -> list[tuple[str, Weight]]:
        return self.named_terms()

    @classmethod
    def build(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Mapping[str, Weight]) -> Weight:
        return cls(*parts.values(), **settings)  # type: ignore[arg-type]


def rebuild(found: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "weight") -> Weight:
    """The weight that ``found`` (from `structure`) and ``tensors`` (its state dict) describe.

    Args:
        found: the structure, as read from JSON.
        tensors: the state dict; keys as ``weight.state_dict()`` gives them, further keys are not looked at.
        where: named in errors.

    Raises:
        FormError: an unknown form, a missing tensor, or settings the form does not take.
    """
    name = found.get("form") if isinstance(found, Mapping) else None
    if not isinstance(name, str) or name not in _FORMS:
        raise FormError(f"{where}: unknown form {name!r}; this version knows {', '.join(forms())}")
    cls = _FORMS[name]
    settings = {key: value for key, value in found.items() if key not in ("form", "tensors", "parts")}
    held, parts = found.get("tensors", cls.tensors), found.get("parts", {})
    names = isinstance(held, (list, tuple)) and all(isinstance(key, str) for key in held)
    if not names or not isinstance(parts, Mapping):
        raise FormError(
            f"{where}: form {name!r} wants a list of tensors and a table of parts; the structure is damaged"
        )
    own = {}
    for key in held:
        if key not in tensors:
            raise FormError(f"{where}: form {name!r} needs a tensor {key!r} that the file does not hold")
        own[key] = tensors[key]
    inner = {}
    for key, part in parts.items():
        prefix = f"{key}."
        below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        inner[key] = rebuild(part, below, f"{where}.{key}")
    try:
        return cls.build(settings, own, inner)
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None
    except (TypeError, KeyError, RuntimeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
        raise FormError(f"{where}: form {name!r} cannot be built from what the file holds: {error}") from error


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """``tensor`` itself, or a FormError that names it when it holds NaN or infinity."""
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return tensor
    # a sum is NaN or infinite exactly when an element is, or when finite elements overflow: only then look closer
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise FormError(f"{name}: {wrong} of {tensor.numel()} values are NaN or infinite; mend the checkpoint")
    return tensor


def stored_bytes(weight: nn.Module) -> int:
    """Bytes of the tensors in the state dict, a tensor held twice counted once."""
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], int] = {}
    for tensor in weight.state_dict().values():
        # the storage itself, not its address: on the meta device every address is 0
        storage = tensor.untyped_storage()._cdata
        seen[(storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())] = tensor.nbytes
    return sum(seen.values())
