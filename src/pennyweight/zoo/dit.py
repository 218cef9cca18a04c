"""A small diffusion transformer that draws images of a text in a few steps.

Sources: W. Peebles and S. Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748 (blocks over patches,
whose norms the time of the diffusion shifts and scales, starting from the identity); J. Chen et al., "PixArt-alpha",
arXiv:2310.00426 (text by cross-attention, one table of shifts for all blocks plus an offset for each); X. Liu et al.,
"Flow Straight and Fast", arXiv:2209.03003 (straight paths from noise to images, drawn by Euler steps). Differs from the
sources: pixels instead of latents, texts of a few token ids, learned positions.

The first token of every text is the same (begin-of-text), so its keys and values are constants: `keep_first_token`
computes them once, and the layers that make keys and values then meet the other tokens only.

Shape letters: B images, C channels, S side, P patches, L tokens of a text, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import DataError, OptionError

#: Id of the token that begins every text.
BEGIN = 0


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a `DiT`.

    Attributes:
        width: D; a multiple of ``num_heads``, even.
        depth: blocks.
        num_heads: H.
        expansion: width of the feed-forward layers / D.
        image_size: S; a multiple of ``patch_size``.
        patch_size: side of a patch.
        channels: C.
        vocabulary: text tokens, the one that begins a text included; a text is a set of them, without positions.
        first_token: whether keys and values of a text's first token are stored; set by `DiT.keep_first_token`.
    """

    width: int = 64
    depth: int = 4
    num_heads: int = 4
    expansion: int = 4
    image_size: int = 8
    patch_size: int = 2
    channels: int = 1
    vocabulary: int = 11
    first_token: bool = False

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.num_heads, self.expansion, self.patch_size, self.channels)
        if min(sizes) < 1 or self.width % self.num_heads or self.width % 2 or self.vocabulary < 2:
            raise OptionError(f"{self}: give sizes of at least 1, an even width that the heads divide, two tokens")
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise OptionError(f"{self}: patches of {self.patch_size} do not tile images of {self.image_size}")


class DiT(nn.Module):
    """Images (B, C, S, S) at times (B,) with texts (B, L) -> velocities (B, C, S, S).

    Time 1 is noise, time 0 an image; the velocity points from the image to the noise.

    Args:
        config: its sizes.
        generator: of the initial weights; None for torch's own.
    """

    frequency: Tensor

    def __init__(self, config: DiTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, width)
        self.position = nn.Parameter(torch.zeros((config.image_size // config.patch_size) ** 2, width))
        self.text_embedding = nn.Embedding(config.vocabulary, width)
        self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final = nn.Linear(width, patch)
        half = width // 2
        frequency = 1000.0 ** (-torch.arange(half) / max(half - 1, 1))
        self.register_buffer("frequency", 2 * torch.pi * frequency * 10, persistent=False)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for name, weight in self.named_parameters():
            if name.endswith("bias") or name.startswith(("final", "time_out")) or name.endswith("offset"):
                weight.zero_()  # every block begins as the identity, and the whole as nothing
            elif name == "position" or name.startswith("text_embedding"):
                weight.normal_(0, 0.5, generator=generator)
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)

    def forward(self, images: Tensor, times: Tensor, texts: Tensor) -> Tensor:
        """The velocity at ``images``.

        Raises:
            DataError: images, times or texts that do not belong together.
        """
        side, wanted = self.config.image_size, (self.config.channels, self.config.image_size, self.config.image_size)
        if tuple(images.shape[1:]) != wanted or texts.ndim != 2 or len({len(images), len(times), len(texts)}) > 1:
            raise DataError(
                f"DiT: images {tuple(images.shape)}, times {tuple(times.shape)}, texts {tuple(texts.shape)}; give "
                f"(B, {', '.join(map(str, wanted))}), (B,) and (B, tokens)"
            )
        patch = self.config.patch_size
        pieces = functional.unfold(images, patch, stride=patch).mT  # (B, P, C * patch * patch)
        x = self.patch_embedding(pieces) + self.position
        angle = times[:, None] * self.frequency
        time = functional.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], -1)))
        shifts = self.time_out(time).unflatten(-1, (6, -1))[:, :, None]  # (B, 6, 1, D)
        text = self.text_embedding(texts)
        for block in self.blocks:
            x = block(x, text, shifts)
        out = self.final(self.norm(x))
        return functional.fold(out.mT, (side, side), patch, stride=patch)

    @torch.no_grad()
    def keep_first_token(self, token: int = BEGIN) -> None:
        """From now on keys and values of a text's first token are those that the model has for ``token`` now.

        They are stored, and saved with the model (``config.first_token`` says so). Weights and inputs may be quantized
        afterwards: the first token, which is the same in every text, is past that. Outputs stay the same for texts that
        begin with ``token``.
        """
        text = self.text_embedding(torch.tensor([token], device=self.position.device))  # (1, D)
        for block in self.blocks:
            crossing = block.cross_attn
            assert isinstance(crossing, _Attention)
            crossing.first = torch.stack([crossing.k_proj(text), crossing.v_proj(text)]).detach()
        self.config = replace(self.config, first_token=True)


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_1, self.norm_2, self.norm_3 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(3)
        )
        self.attn, self.cross_attn = _Attention(config), _Attention(config, first_token=config.first_token)
        self.ffn = _FeedForward(width, config.expansion * width)
        self.offset = nn.Parameter(torch.zeros(6, 1, width))

    def forward(self, x: Tensor, text: Tensor, shifts: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (shifts + self.offset).unbind(1)  # (B, 1, D) each
        seen = self.norm_1(x) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.attn(seen, seen)
        x = x + self.cross_attn(self.norm_2(x), text)
        seen = self.norm_3(x) * (1 + scale_2) + shift_2
        added: Tensor = self.ffn(seen)
        return x + gate_2 * added


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class _Attention(nn.Module):
    """Attention of one stream to another, or to itself; ``first`` (2, 1, D): key and value of the first token."""

    first: Tensor | None

    def __init__(self, config: DiTConfig, *, first_token: bool = False) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(config.width, config.width) for _ in range(4))
        self.register_buffer("first", torch.zeros(2, 1, config.width) if first_token else None)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.first is None:
            key, value = self.k_proj(other), self.v_proj(other)
        else:
            rest = other[:, 1:]
            key, value = (
                torch.cat([kept.to(x.dtype).expand(len(x), 1, -1), layer(rest)], 1)
                for kept, layer in zip(self.first, (self.k_proj, self.v_proj), strict=True)
            )
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.q_proj(x), key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


def flow_loss(module: nn.Module, images: Tensor, texts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean squared error of the velocity at random times between ``images`` (B, C, S, S) and noise."""
    noise = torch.randn(images.shape, generator=generator).to(images)
    times = torch.rand(len(images), generator=generator).to(images)
    at = times[:, None, None, None]
    return functional.mse_loss(module((1 - at) * images + at * noise, times, texts), noise - images)


@torch.no_grad()
def draw(module: nn.Module, texts: Tensor, noise: Tensor, *, steps: int = 4) -> Tensor:
    """Images (B, C, S, S) of ``texts`` (B, L) from ``noise``, by ``steps`` Euler steps from time 1 to 0."""
    if steps < 1:
        raise OptionError(f"draw: steps = {steps}; give at least 1")
    x = noise
    for step in range(steps):
        times = torch.full((len(x),), 1 - step / steps, dtype=x.dtype, device=x.device)
        x = x - module(x, times, texts) / steps
    return x
