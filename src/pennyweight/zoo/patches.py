"""A plain vision Transformer whose patch size is an axis of its own, and changing that size of a trained one.

Row 88. Source: F. Wang et al., "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
arXiv:2502.03738: nothing but the patch embedding and the positions changes with the patch, and smaller patches help
down to single pixels. Resizing by the pseudo-inverse of the resizing of images: L. Beyer et al., "FlexiViT",
arXiv:2212.08013. Differs from the source: pooling is the mean of tokens, positions are learned.

Shape letters: B images, C channels, H side of an image, P side of a patch, T tokens (H/P)^2, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import ModelError, OptionError, ShapeError


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a `ViT`.

    Attributes:
        image: H.
        patch: P, a divisor of it.
        channels: C.
        width: D, a multiple of ``num_heads``.
        depth: blocks.
        num_heads: of attention.
        classes: of the head.
        expansion: width of the feed-forward layers / D.
    """

    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    classes: int = 1000
    expansion: int = 4

    def __post_init__(self) -> None:
        if min(self.image, self.patch, self.channels, self.width, self.depth, self.num_heads, self.classes) < 1:
            raise OptionError(f"{self}: give sizes of at least 1")
        if self.image % self.patch or self.width % self.num_heads:
            raise OptionError(
                f"vit: patches of {self.patch} in an image of {self.image}, {self.num_heads} heads of a width of "
                f"{self.width}; give divisors"
            )

    @property
    def tokens(self) -> int:
        """(H/P)^2."""
        return (self.image // self.patch) ** 2


class ViT(nn.Module):
    """An image classifier: images (B, C, H, H) -> logits (B, classes)."""

    def __init__(self, config: ViTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim > 1 and name != "positions":
                    weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
                elif name.endswith("bias"):
                    weight.zero_()  # torch draws them from its own generator, whatever the seed
            self.positions.normal_(0, 0.02, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        side = self.config.image
        if images.shape[1:] != (self.config.channels, side, side):
            raise ShapeError(
                f"vit: images {tuple(images.shape)}; this model reads (B, {self.config.channels}, {side}, {side})"
            )
        x = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.positions  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class _Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.o_proj = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up_proj = nn.Linear(config.width, config.expansion * config.width)
        self.down_proj = nn.Linear(config.expansion * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(x))))
        return out


def vit(patch: int = 16, *, seed: int | None = None, **sizes: int) -> ViT:
    """A ViT with random weights; sizes as of `ViTConfig`."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return ViT(ViTConfig(patch=patch, **sizes), generator=generator)


def resizing(old: int, new: int) -> Tensor:
    """The matrix (new^2, old^2), float64, that resizes a patch of side ``old`` to ``new`` bilinearly."""
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = functional.interpolate(basis, size=(new, new), mode="bilinear", antialias=new < old, align_corners=False)
    return resized.reshape(old * old, new * new).T.contiguous()


def resize_patch(kernel: Tensor, new: int) -> Tensor:
    """A patch kernel (D, C, P, P) for patches of side ``new``.

    With B the resizing of patches, the new kernel w' = (B^T)^+ w answers a resized patch as w answered the patch:
    exactly when ``new`` >= P, in the least-squares sense below.
    """
    old = kernel.shape[-1]
    if kernel.ndim != 4 or kernel.shape[-2] != old or new < 1:
        raise ShapeError(f"resize_patch: a kernel of {tuple(kernel.shape)} to {new}; give (D, C, P, P) and 1 or more")
    turn = torch.linalg.pinv(resizing(old, new).T)  # (new^2, old^2)
    flat = kernel.detach().double().flatten(2)  # (D, C, P^2)
    resized: Tensor = (flat @ turn.T).unflatten(-1, (new, new)).to(kernel)
    return resized


def repatch(model: nn.Module, new_patch: int, *, image: int | None = None) -> nn.Module:
    """A copy of a ViT that reads patches of side ``new_patch``, its function kept where that is possible.

    The kernel is resized by the pseudo-inverse, the table of positions bicubically. On images resized along with the
    patch (``image`` = H * new_patch / P) a larger patch computes exactly what the old one did; on the same images more
    and smaller patches see new detail, and the copy is a start for tuning.

    Args:
        model: a `ViT`.
        new_patch: side of the new patches.
        image: side of the images it will read; None for the same as before.

    Raises:
        ModelError: not a `ViT`.
        OptionError: patches that do not tile the image.
    """
    if not isinstance(model, ViT):
        raise ModelError(f"repatch: a {type(model).__name__} has no patch embedding known here; give a zoo.patches.ViT")
    before = model.config
    config = ViTConfig(**{**vars(before), "patch": new_patch, "image": image or before.image})
    made = copy.deepcopy(model)
    made.config = config
    old = model.patch_embedding
    embedding = nn.Conv2d(config.channels, config.width, new_patch, stride=new_patch, bias=old.bias is not None)
    embedding = embedding.to(old.weight)
    with torch.no_grad():
        embedding.weight.copy_(resize_patch(old.weight, new_patch))
        if embedding.bias is not None and old.bias is not None:
            embedding.bias.copy_(old.bias)
        grid, wanted = before.image // before.patch, config.image // new_patch
        table = model.positions.detach()
        if grid != wanted:
            square = table.view(1, grid, grid, -1).permute(0, 3, 1, 2)
            square = functional.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
            table = square.permute(0, 2, 3, 1).flatten(1, 2)
    made.patch_embedding, made.positions = embedding, nn.Parameter(table.clone())
    return made
