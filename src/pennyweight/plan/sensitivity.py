"""How much the loss minds a change of each layer, and of two layers at once: the loss's Hessian, met only in products.

Row 5. Source: C. J. S. Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
Post-Training Quantization", arXiv:2306.04879: a layer's sensitivity is the mean eigenvalue of its block of the Hessian
(its trace over its size, by M. Hutchinson's estimator, 1989, as in HAWQ-V2) times the squared change, augmented by what
changes of two layers do together. Differs from the source: the abstract gives no formula for the augmentation; here it
is the second-order term itself, ``d_i^T H_ij d_j``, exact by one product with the Hessian an offer (B. Pearlmutter,
"Fast exact multiplication by the Hessian", 1994), or the measured L(ij) - L(i) - L(j) + L(0).

Products are taken by differentiating twice, with attention computed step by step: fused kernels have no second
derivative.

Shape letters: F changes of all tensors together, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pennyweight.errors import DataError, OptionError

#: A scalar loss of one batch, differentiable by the tensors in question.
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Trace:
    """The trace of one diagonal block of the Hessian.

    Attributes:
        value: its estimate.
        standard_error: of the estimate over probes; of the batches' own spread it knows nothing.
        size: rows of the block.
        probes: random vectors behind it.
    """

    value: float
    standard_error: float
    size: int
    probes: int

    @property
    def mean(self) -> float:
        """The mean eigenvalue."""
        return self.value / self.size


@dataclass(frozen=True)
class Curvature:
    """The loss to second order along some changes.

    Attributes:
        names: of the tensors, one entry a change.
        first: (F,) ``g^T d``.
        second: (F, F) ``d_a^T H d_b``, symmetric to rounding, and made so.
    """

    names: tuple[str, ...]
    first: NDArray[np.float64]
    second: NDArray[np.float64]

    def alone(self, *, gradient: bool = True) -> NDArray[np.float64]:
        """(F,) what each change does by itself: ``g^T d + d^T H d / 2``."""
        return (self.first if gradient else 0) + self.second.diagonal() / 2

    def pairs(self) -> NDArray[np.float64]:
        """(F, F) what two changes of different tensors do beyond that; 0 for changes of one tensor."""
        names = np.array(self.names)
        return np.where(names[:, None] == names[None, :], 0.0, self.second)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain products, which can be differentiated twice; gradients on."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def traces(
    losses: Sequence[Loss], tensors: Mapping[str, Tensor], *, probes: int = 50, seed: int = 0
) -> dict[str, Trace]:
    """Traces of the Hessian's diagonal blocks, all of them from the same Rademacher probes.

    Args:
        losses: of one batch each; their mean is what is differentiated.
        tensors: leaves that require gradients.
        probes: at least 2; the standard error falls with the root of their number.
        seed: of the probes.
    """
    if probes < 2:
        raise OptionError(f"traces: {probes} probes have no standard error; give at least 2, better 50")
    names, leaves = _leaves(losses, tensors)
    found = torch.zeros(probes, len(leaves), dtype=torch.float64)
    for loss in losses:
        generator = torch.Generator().manual_seed(seed)  # the same probes for every batch: their mean is one Hessian's
        gradients = _gradients(loss, leaves)
        for probe in range(probes):
            signs = [
                (2 * torch.randint(0, 2, leaf.shape, generator=generator) - 1).to(leaf.device, leaf.dtype)
                for leaf in leaves
            ]
            products = _product(gradients, leaves, signs)
            for index, (sign, product) in enumerate(zip(signs, products, strict=True)):
                found[probe, index] += float((sign.double() * product.double()).sum()) / len(losses)
    errors = found.std(0) / math.sqrt(probes)
    return {
        name: Trace(float(found[:, index].mean()), float(errors[index]), leaves[index].numel(), probes)
        for index, name in enumerate(names)
    }


def curvature(
    losses: Sequence[Loss], tensors: Mapping[str, Tensor], changes: Mapping[str, Sequence[Tensor]]
) -> Curvature:
    """First and second derivatives of the mean loss along every change, and across every two.

    One product with the Hessian a change and batch, F in all, where measuring takes F (F - 1) / 2 evaluations.

    Args:
        losses: of one batch each.
        tensors: leaves that require gradients.
        changes: tensor name -> differences to it, of its shape; a zero one costs nothing.
    """
    names, leaves = _leaves(losses, tensors)
    owners = [n for n, name in enumerate(names) for _ in changes[name]]
    flat = [change.to(leaves[n]) for n, name in enumerate(names) for change in changes[name]]
    for n, change in zip(owners, flat, strict=True):
        if change.shape != leaves[n].shape:
            raise DataError(
                f"curvature: a change {tuple(change.shape)} of {names[n]}, which is {tuple(leaves[n].shape)}"
            )
    first = np.zeros(len(flat))
    second = np.zeros((len(flat), len(flat)))
    for loss in losses:
        gradients = _gradients(loss, leaves)
        first += [float((gradients[n].detach().double() * d).sum()) for n, d in zip(owners, flat, strict=True)]
        for a, (n, change) in enumerate(zip(owners, flat, strict=True)):
            if not bool(change.any()):
                continue
            products = _product([gradients[n]], leaves, [change])
            second[a] += [float((products[m].double() * d).sum()) for m, d in zip(owners, flat, strict=True)]
    first, second = first / len(losses), second / len(losses)
    return Curvature(tuple(names[n] for n in owners), first, (second + second.T) / 2)


def measured_pairs(
    evaluate: Callable[[Mapping[str, int]], float], offers: Mapping[str, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """What changes do alone, L(i) - L(0), and in pairs, L(ij) - L(i) - L(j) + L(0), by running all of them.

    Args:
        evaluate: from layer -> number of its change, the mean loss with these and no others.
        offers: layer -> how many changes it has.

    Returns:
        (F,), (F, F), and the evaluations it took: 1 + F + one for each pair of changes of two layers.
    """
    flat = [(name, index) for name, count in offers.items() for index in range(count)]
    base = evaluate({})
    alone = np.array([evaluate({name: index}) - base for name, index in flat])
    pairs, count = np.zeros((len(flat), len(flat))), 1 + len(flat)
    for (a, (first, i)), (b, (second, j)) in combinations(enumerate(flat), 2):
        if first != second:
            pairs[a, b] = pairs[b, a] = evaluate({first: i, second: j}) - base - alone[a] - alone[b]
            count += 1
    return alone, pairs, count


def _leaves(losses: Sequence[Loss], tensors: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    if not losses or not tensors:
        raise DataError("sensitivity: no data or no layers; give at least one of each")
    for name, tensor in tensors.items():
        if not tensor.requires_grad:
            raise DataError(f"sensitivity: {name} takes no gradients; call requires_grad_() on it")
    return list(tensors), list(tensors.values())


def _gradients(loss: Loss, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    with twice_differentiable():
        value = loss()
        if not bool(value.isfinite()):
            raise DataError(f"sensitivity: the loss is {value.item()}; the model's outputs are broken there")
        return torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)


def _product(gradients: Sequence[Tensor], leaves: Sequence[Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The Hessian times the vectors that stand beside ``gradients``."""
    usable = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not usable:  # a loss that is linear in these
        return [torch.zeros_like(leaf) for leaf in leaves]
    with twice_differentiable():
        return torch.autograd.grad(
            [g for g, _ in usable], leaves, [v for _, v in usable], retain_graph=True, materialize_grads=True
        )
