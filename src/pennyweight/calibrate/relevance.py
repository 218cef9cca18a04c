"""Layer-wise relevance propagation: how much of an answer passes through every layer, and where it comes from.

Row 56. Sources: N. Ranjan and A. Savakis, "LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise
Relevance Propagation", arXiv:2401.11243 (relevance of layers as their importance); H. Chefer et al., "Transformer
Interpretability Beyond Attention Visualization", arXiv:2012.09838 (the rules for transformers); S. Bach et al.,
"On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation", 2015.

Relevance starts at the answer and is passed back: every operation splits what its output has among its inputs, by what
each contributed, so that the sum never changes. With R_i of output i and the contribution c_ij of input j to it

* products with weights (rule "positive"): R_j = sum_i max(c_ij, 0) / sum_k max(c_ik, 0) * R_i; nothing goes to biases;
* sums of two branches: by the size of each, element by element; means likewise;
* products of two activations (scores, attention times values): half to each side, by the first rule;
* elementwise functions, norms, softmax: unchanged. Moving, cutting and joining: with the values.

Rule "plain" takes c_ij with its sign, and starts from the logit itself: on a network without biases and nonlinear
functions that is input times gradient. It can divide by nearly nothing, which is why the first rule is the default.

Differs from the sources: branches are split by absolute size (Chefer's code: by signed size, each then rescaled); where
no contribution is positive all inputs share alike, so that nothing is lost; products of activations take the positive
part, too. How the paper turns relevance into bits is not public: see `pennyweight.levers.quantize.relevance_bits`.

Shape letters: B samples, K classes, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pennyweight.calibrate.walk import Windows, inputs_of
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.evaluate.forward import first_tensor
from pennyweight.model.model import Model

Rule = Literal["positive", "plain"]
#: What every input contributes beside its own, so that outputs to which nothing contributes share alike.
_FLOOR = 1e-12

Split = Callable[[Tensor], tuple[Tensor, ...]]
Bilinear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Relevance:
    """Where the relevance of answers went.

    Attributes:
        start: (B,) what was given out: one a sample, or its logit (rule "plain").
        layers: by map name, (B,) what reached the outputs of each linear map.
        blocks: by path, (B,) what reached the output of each block; ``start`` again, where nothing runs past blocks.
        inputs: (B, ...) what reached the inputs; for token ids, what reached their embeddings.
        constants: (B,) what ended in learned tokens (a class token).
    """

    start: Tensor
    layers: Mapping[str, Tensor]
    blocks: Mapping[str, Tensor]
    inputs: Tensor
    constants: Tensor

    def contributions(self) -> dict[str, float]:
        """The share of each layer in the relevance of all layers, averaged over samples; they add up to one."""
        means = {name: float(found.double().mean()) for name, found in self.layers.items()}
        total = sum(means.values())
        return {name: value / total for name, value in means.items()}


def relevance(model: Model, windows: Windows, *, targets: Tensor | None = None, rule: Rule = "positive") -> Relevance:
    """Propagate the relevance of the answers to ``windows`` back through the whole model.

    Args:
        model: any whose logits are (B, K), or (B, T, K): then every position starts with 1/T.
        windows: (B, ...) pixels or token ids, or inputs by name.
        targets: (B,) or (B, T) classes to explain; None for those the model predicts.
        rule: of products with weights; see the module's text.

    Raises:
        ModelError: the model does something that no rule is known for; it names the operation.
        OptionError: an unknown rule.
        DataError: no inputs, or targets of another shape.
    """
    if rule not in ("positive", "plain"):
        raise OptionError(f"relevance: rule = {rule!r}; give positive or plain")
    inputs = inputs_of(model, windows)
    module, found = model.module, model.anatomy
    named = isinstance(inputs, Mapping)
    pairs = inputs.items() if isinstance(inputs, Mapping) else ((str(index), t) for index, t in enumerate(inputs))
    values = {name: tensor.clone() for name, tensor in pairs}
    main = next(iter(values))
    if values[main].is_floating_point():
        values[main].requires_grad_()
    with _explained(module, found.norms, rule) as run, _collected(module, found) as seen:
        output = module(**values) if named else module(*values.values())
        logits = first_tensor(output)
    start = _start(logits.detach(), targets, rule)
    leaf = values[main] if values[main].requires_grad else run.embedded
    if leaf is None:
        raise ModelError(f"{model.name}: relevance needs pixels or token ids; the model got neither")
    watched = [*seen.layers, *seen.blocks]
    tensors = [tensor for _, tensor in watched]
    reached = torch.autograd.grad(
        logits, [*tensors, *run.constants, leaf], grad_outputs=start, allow_unused=True, materialize_grads=True
    )
    sums = [found.flatten(1).sum(1) for found in reached[:-1]]
    count = len(seen.layers)
    return Relevance(
        start=start.flatten(1).sum(1),
        layers=_added(watched[:count], sums[:count]),
        blocks=_added(watched[count:], sums[count : len(tensors)]),
        inputs=reached[-1],
        constants=sum(sums[len(tensors) :], start=torch.zeros(len(logits))),
    )


def _start(logits: Tensor, targets: Tensor | None, rule: Rule) -> Tensor:
    targets = logits.argmax(-1) if targets is None else targets.to(logits.device)
    if targets.shape != logits.shape[:-1]:
        raise DataError(f"relevance: targets {tuple(targets.shape)} for logits {tuple(logits.shape)}; one an answer")
    found = functional.one_hot(targets, logits.shape[-1]).to(logits) / targets[0].numel()
    return found if rule == "positive" else found * logits


def _added(watched: Sequence[tuple[str, Tensor]], sums: Sequence[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for (name, _), value in zip(watched, sums, strict=True):
        found[name] = found[name] + value if name in found else value  # a layer that runs twice
    return found


@dataclass
class _Seen:
    layers: list[tuple[str, Tensor]]
    blocks: list[tuple[str, Tensor]]


@contextmanager
def _collected(module: nn.Module, found: Any) -> Iterator[_Seen]:
    """The outputs of layers and blocks of every call inside."""
    seen = _Seen([], [])

    def note(into: list[tuple[str, Tensor]], name: str, _: nn.Module, __: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        if tensor.requires_grad:
            into.append((name, tensor))

    with ExitStack() as hooks:
        for layer in found.layers():
            if layer.kind != "embedding":
                hook = partial(note, seen.layers, layer.name)
                hooks.enter_context(module.get_submodule(layer.path).register_forward_hook(hook))
        for block in found.blocks:
            hook = partial(note, seen.blocks, block.path)
            hooks.enter_context(module.get_submodule(block.path).register_forward_hook(hook))
        yield seen


@contextmanager
def _explained(module: nn.Module, norms: Sequence[str], rule: Rule) -> Iterator[_Rules]:
    """Gradients inside are relevance; the module is in eval mode and its parameters take none."""
    training = [part for part in module.modules() if part.training]
    wanted = [weight for weight in module.parameters() if weight.requires_grad]
    module.eval()
    for weight in wanted:
        weight.requires_grad_(False)
    run = _Rules(rule)
    replaced: list[nn.Module] = []
    try:
        for path in norms:  # some are written in elementary operations, which would be split one by one
            norm = module.get_submodule(path)
            norm.forward = partial(run.unchanged, norm.forward)
            replaced.append(norm)
        with torch.enable_grad(), run:
            yield run
    finally:
        for norm in replaced:
            del norm.__dict__["forward"]
        for weight in wanted:
            weight.requires_grad_()
        for part in training:
            part.training = True


class _Tie(torch.autograd.Function):
    """``value``, whose relevance ``split`` divides among ``parts``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, split: Split, *parts: Tensor) -> Tensor:
        ctx.split = split
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.split(relevance[0])


def _tied(value: Tensor, split: Split, *parts: Tensor) -> Tensor:
    found: Tensor = _Tie.apply(value.detach(), split, *parts)  # type: ignore[no-untyped-call]
    return found


class _Rules(TorchFunctionMode):
    """Runs every operation as it is, and ties its result to its inputs by the rule for it."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.constants: list[Tensor] = []
        self.embedded: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "embedding":
            return self._embed(func(*args, **options))
        if not torch.is_grad_enabled() or not any(_live(value) for value in _flat((*args, *options.values()))):
            return func(*args, **options)
        bare = name.strip("_")
        if name in _ROUTED or name.startswith("__get"):
            return func(*args, **options)
        if bare in ("cat", "stack", "concat", "concatenate"):
            return func([self._kept(part) for part in args[0]], *args[1:], **options)
        if bare in _UNCHANGED:
            options.pop("inplace", None)
            return self.unchanged(func, *args, **options)
        if bare in _AVERAGES:
            return self._average(partial(func, **options), args[0], args[1:])
        if bare in _BINARY:
            a, b = args[:2]
            # the scale of the second part of a sum
            b = b * options["alpha"] if "alpha" in options else b
            return getattr(self, f"_{_BINARY[bare]}")(a, b)
        if bare in ("linear", "conv1d", "conv2d"):
            return self._weighted(func, bare, *args, **options)
        if bare == "scaled_dot_product_attention":
            return self._attend(*args, **options)
        found = func(*args, **options)
        if any(_live(value) for value in _flat((found,))):
            raise ModelError(f"relevance: no rule is known for {name}; layers, sums, products and norms have one")
        return found

    def unchanged(self, func: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
        """``func(x)``, whose relevance is that of ``x``."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            value = func(x.detach(), *args, **options)
        if not _live(x):
            return value
        return _tied(value, lambda given: (given.to(x.dtype),), x)

    def _embed(self, value: Tensor) -> Tensor:
        if self.embedded is not None:  # positions, token types: what they add is a bias
            return value
        self.embedded = value.detach().requires_grad_()
        return self.embedded

    def _kept(self, part: Tensor) -> Tensor:
        """``part``, or a leaf that takes the relevance of a learned token."""
        if _live(part) or not part.is_floating_point() or not part.numel():  # an empty cache
            return part
        self.constants.append(part.detach().clone().requires_grad_())
        return self.constants[-1]

    def _average(self, func: Callable[..., Tensor], x: Tensor, args: Sequence[Any]) -> Tensor:
        def split(given: Tensor) -> tuple[Tensor, ...]:
            part = self._size(x.detach())
            with torch.enable_grad():
                probe = torch.zeros_like(part).requires_grad_()
                spread = func(probe, *args)
            (shares,) = torch.autograd.grad(spread, probe, given / self._stable(func(part, *args)))
            return (part * shares,)

        return _tied(func(x.detach(), *args), split, x)

    def _add(self, a: Any, b: Any) -> Tensor:
        return self._sum(a, b, _value(a) + _value(b), 1.0)

    def _subtract(self, a: Any, b: Any) -> Tensor:
        return self._sum(a, b, _value(a) - _value(b), -1.0)

    def _backward_subtract(self, a: Any, b: Any) -> Tensor:
        return self._sum(b, a, _value(b) - _value(a), -1.0)

    def _sum(self, a: Any, b: Any, value: Tensor, sign: float) -> Tensor:
        if not _live(a) or not _live(b):  # what a constant adds is a bias
            live = a if _live(a) else b
            return _tied(value, lambda given: (_gathered(given, live),), live)

        def split(given: Tensor) -> tuple[Tensor, ...]:
            first, second = self._size(a.detach()), self._size(sign * b.detach())
            shares = given / self._stable(first + second)
            return _gathered(first * shares, a), _gathered(second * shares, b)

        return _tied(value, split, a, b)

    def _multiply(self, a: Any, b: Any) -> Tensor:
        return self._alike(_value(a) * _value(b), a, b)

    def _divide(self, a: Any, b: Any) -> Tensor:
        return self._alike(_value(a) / _value(b), a, b)

    def _alike(self, value: Tensor, a: Any, b: Any) -> Tensor:
        """All to the one that is no constant; half to each where both are none (gates)."""
        parts = [part for part in (a, b) if _live(part)]
        return _tied(value, lambda given: tuple(_gathered(given / len(parts), part) for part in parts), *parts)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        # asked now: once the pass is over, weights take gradients again
        sides: list[tuple[Tensor, Tensor, Bilinear]] = [(a, b, _product)] if _live(a) else []
        sides += [(b, a, _product_from_right)] if _live(b) else []

        def split(given: Tensor) -> tuple[Tensor, ...]:
            share = given / len(sides)
            return tuple(self._through(func, share, one.detach(), other.detach()) for one, other, func in sides)

        return _tied(torch.matmul(a.detach(), b.detach()), split, *(one for one, _, _ in sides))

    def _weighted(
        self, func: Callable[..., Tensor], name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None,
        *args: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        if _live(weight) or not _live(x):
            raise ModelError(f"relevance: no rule is known for a {name} whose weight is computed from the inputs")

        def bare(given: Tensor, matrix: Tensor) -> Tensor:
            return func(given, matrix, None, *args, **options)

        value = func(x.detach(), weight, bias, *args, **options)
        return _tied(value, lambda given: (self._through(bare, given, x.detach(), weight.detach()),), x)

    def _through(self, func: Bilinear, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """What of the relevance ``given`` of ``func(x, weight)`` goes to ``x``."""
        if self.rule == "plain":
            pairs = [(x, weight)]
        else:
            # of a product the positive part is that of two positive or of two negative factors
            pairs = [(x.clamp_min(0), weight.clamp_min(0)), (x.clamp_max(0), weight.clamp_max(0))]
            even = torch.full_like(x, _FLOOR), torch.ones_like(weight)
            pairs.append(even)
        whole = sum((func(*pair) for pair in pairs[1:]), start=func(*pairs[0]))
        shares = given / self._stable(whole)
        found = torch.zeros_like(x)
        for part, matrix in pairs:
            with torch.enable_grad():
                probe = torch.zeros_like(x).requires_grad_()
                moved = func(probe, matrix)
            found = found + part * torch.autograd.grad(moved, probe, shares)[0]
        return found

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        scores = self._matmul(query, key.transpose(-2, -1))
        scores = self._multiply(scores, query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            attn_mask = seen if attn_mask is None else attn_mask
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
            scores = self._add(scores, added)
        return self._matmul(self.unchanged(torch.softmax, scores, -1), value)

    def _size(self, x: Tensor) -> Tensor:
        return x if self.rule == "plain" else x.abs() + _FLOOR

    def _stable(self, whole: Tensor) -> Tensor:
        """What is divided by; with its sign, and never zero."""
        tiny = torch.finfo(whole.dtype).tiny * 1e6
        return torch.where(whole.abs() < tiny, torch.where(whole < 0, -tiny, tiny).to(whole), whole)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _product_from_right(b: Tensor, a: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _live(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _value(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


def _gathered(given: Tensor, part: Tensor) -> Tensor:
    """``given`` summed over what was broadcast from ``part``."""
    return given.sum_to_size(part.shape).to(part.dtype)


#: Values that only move: autograd's own backward is the rule. A maximum goes to the one that was chosen.
_ROUTED = frozenset(
    "view reshape flatten transpose permute movedim moveaxis swapaxes contiguous __getitem__ chunk split unbind "
    "squeeze unsqueeze expand expand_as unflatten select narrow pad repeat repeat_interleave to float double type "
    "type_as view_as reshape_as t _pad max_pool1d max_pool2d _max_pool2d boolean_dispatch tile roll flip "
    "requires_grad_ retain_grad register_hook detach backward".split()
)
_UNCHANGED = frozenset(
    "relu relu6 gelu silu sigmoid tanh softmax log_softmax leaky_relu elu hardtanh hardswish hardsigmoid mish softplus "
    "layer_norm rms_norm group_norm batch_norm instance_norm dropout dropout1d dropout2d alpha_dropout neg clone "
    "rsqrt sqrt exp masked_fill clamp clip".split()
)
_AVERAGES = frozenset("mean sum avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d interpolate".split())
_BINARY = {
    "add": "add", "radd": "add", "iadd": "add", "sub": "subtract", "subtract": "subtract", "isub": "subtract",
    "rsub": "backward_subtract", "mul": "multiply", "multiply": "multiply", "rmul": "multiply", "imul": "multiply",
    "div": "divide", "true_divide": "divide", "truediv": "divide", "itruediv": "divide", "divide": "divide",
    "matmul": "matmul", "bmm": "matmul", "mm": "matmul",
}  # fmt: skip
