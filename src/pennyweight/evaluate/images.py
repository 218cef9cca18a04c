"""How near images are to others: structure (SSIM), signal over noise (SQNR), and sets by their features (Frechet).

Sources: Z. Wang, A. Bovik, H. Sheikh and E. Simoncelli, "Image quality assessment: from error visibility to structural
similarity", 2004 (window of 11 x 11, Gaussian of deviation 1.5, K1 = 0.01, K2 = 0.03); D. Dowson and B. Landau, "The
Frechet distance between multivariate normal distributions", 1982, which FID (M. Heusel et al., arXiv:1706.08500) takes
between features of images. Differs from the sources: nothing; the window may be smaller, for images that are.

Shape letters: B images, C channels, S height, W width, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pennyweight.errors import DataError, OptionError, ShapeError


def ssim(one: Tensor, other: Tensor, *, data_range: float = 1.0, window: int = 11, deviation: float = 1.5) -> Tensor:
    """Structural similarity of each pair of images (B, C, S, W): (B,) float64, 1 for equal ones.

    The mean over channels and all places where the whole window lies inside the image.

    Args:
        one: images.
        other: as many of the same size.
        data_range: largest possible value minus the smallest.
        window: side of the Gaussian window, odd.
        deviation: of the Gaussian, in pixels.

    Raises:
        ShapeError: images of different shapes, or smaller than the window.
    """
    if one.shape != other.shape or one.ndim != 4 or min(one.shape[-2:]) < window:
        raise ShapeError(
            f"ssim: images {tuple(one.shape)} and {tuple(other.shape)}; give equal (B, C, S, W) of sides of at least "
            f"the window's {window}"
        )
    if window < 1 or window % 2 == 0 or not deviation > 0 or not data_range > 0:
        raise OptionError(f"ssim: window = {window}, deviation = {deviation}, data_range = {data_range}; odd, above 0")
    x, y = (t.detach().double().flatten(0, 1)[:, None] for t in (one, other))
    at = torch.arange(window, dtype=torch.float64, device=x.device) - window // 2
    bell = torch.exp(-at.square() / (2 * deviation**2))
    bell = bell / bell.sum()
    kernel = torch.outer(bell, bell)[None, None]

    def mean(t: Tensor) -> Tensor:
        return functional.conv2d(t, kernel)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    both = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    similar = similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similar.flatten(1).mean(1).view(len(one), -1).mean(1)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in decibels: ``10 log10(|reference|^2 / |reference - other|^2)``; inf for equals."""
    if reference.shape != other.shape:
        raise ShapeError(f"sqnr: {tuple(reference.shape)} and {tuple(other.shape)}; give equal shapes")
    signal, noise = reference.detach().double(), (reference - other).detach().double()
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Frechet distance of two sets of features (B, F), each taken for a Gaussian.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, 0 for equal sets.

    Raises:
        DataError: fewer than two rows.
        ShapeError: sets of different features.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise ShapeError(
            f"frechet_distance: features {tuple(one.shape)} and {tuple(other.shape)}; give (rows, features)"
        )
    if min(len(one), len(other)) < 2:
        raise DataError("frechet_distance: a set of one has no spread; give at least two rows each")
    a, b = one.detach().double(), other.detach().double()
    first, second = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # the eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(distance))
