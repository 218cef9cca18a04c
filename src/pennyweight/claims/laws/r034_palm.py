"""Row 34, PaLM: the accounting formulae give what a built model has and does, where the usual 12 L d^2 does not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.laws import flops

_VOCABULARY, _LENGTH = 512, 64


class _Block(nn.Module):
    """y = x + attention(norm x) + ffn(norm x): one shared key and value head, SwiGLU of three d x 4d maps."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key, self.value = (nn.Linear(width, head_dim, bias=False) for _ in range(2))
        self.output = nn.Linear(heads * head_dim, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        normed = functional.layer_norm(x, (width,))
        query = self.query(normed).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        key, value = self.key(normed)[:, None], self.value(normed)[:, None]
        shape = (batch, self.heads, length, self.head_dim)
        scores = query @ key.expand(shape).transpose(2, 3) / self.head_dim**0.5
        mixed = scores.softmax(-1) @ value.expand(shape)
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        fed: Tensor = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return x + attended + fed


class _Model(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, head_dim) for _ in range(layers)))

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.blocks(self.embedding(ids)), self.embedding.weight)


@claim(row=34, pace="quick", headline="8.63B, 62.50B and 540.35B parameters (table 1)")
def counted_parameters_and_flops_are_those_of_the_module(assets: Assets) -> Outcome:
    """Three shapes in the paper's proportions, built in PyTorch and counted."""
    misses, naive, usual, flop_misses = [], [], [], []
    for width, layers, heads, head_dim in ((128, 3, 2, 64), (192, 4, 4, 48), (256, 6, 3, 80)):
        model = _Model(width, layers, heads, head_dim)
        config = flops.TransformerConfig(
            width, layers, heads, kv_heads=1, head_dim=head_dim, d_ff=4 * width, vocab_size=_VOCABULARY, norms=0,
            final_norm=False,
        )  # fmt: skip
        every = replace(config, kv_heads=heads)
        cost, real = flops.transformer(config), sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, _LENGTH, dtype=torch.long))
        misses.append(abs(cost.params - real) / real)
        naive.append(abs(12 * layers * width**2 + _VOCABULARY * width - real) / real)
        usual.append(abs(flops.transformer(every).params - real) / real)
        flop_misses.append(abs(cost.forward_matmul_flops(_LENGTH) * _LENGTH / counter.get_total_flops() - 1))
    shapes = (4096, 32, 16), (8192, 64, 32), (18432, 118, 48)
    totals = [flops.transformer(flops.palm(*shape)).params for shape in shapes]
    printed = totals[::2] == [8_631_877_632, 540_354_281_472] and f"{totals[1] / 1e9:.2f}" == "62.50"
    return Outcome(
        method=max(misses),
        baseline=max(naive),
        unit="relative error of the parameter count, worst of three shapes",
        holds=max(misses) == 0 and max(flop_misses) < 0.01 and printed,
        control=("keys and values counted for every head, as is usual", max(usual)),
        notes=f"FLOPs of a forward pass off by {max(flop_misses):.2g} at most; the published totals: "
        + ", ".join(f"{total:,}" for total in totals),
    )
