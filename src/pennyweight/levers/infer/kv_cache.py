"""Packed keys and values: fewer bits for what a model keeps between tokens, the fewer the older.

Row 122. Source: F. Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in
Generative AI", arXiv:2410.18441 (staircase adaptive quantization), on the layout of Z. Liu et al., "KIVI",
arXiv:2402.02750. Differs from the source: see `pennyweight.model.kv_cache`, which does it.

No weight changes and no byte of the file: what shrinks is the cache (`measure`: cache at full context).
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.lever import ANY, Check, at_least, lever, one_of, option
from pennyweight.model import kv_cache
from pennyweight.model.kv_cache import KVSetting
from pennyweight.model.model import Model
from pennyweight.work import Work


@lever(
    "infer.kv_cache",
    reach="model",
    row=122,
    paper="The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI, "
    "arXiv:2410.18441; KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv:2402.02750",
)
@dataclass(frozen=True, kw_only=True)
class PackedKVCache:
    """Keep keys and values as packed codes, older tokens in fewer bits.

    Use it by ``pennyweight.kv_cache(model)``; measurements of quality, of cache bytes and of speed do.
    """

    bits: int = option(4, Check("between 2 and 8", lambda bits: 2 <= bits <= 8), "bits of a code of the oldest tokens")
    group_size: int = option(32, at_least(1), "tokens that are packed together and share a key's scales")
    residual: int = option(128, at_least(0), "newest tokens kept as they are; a multiple of group_size")
    ladder: tuple[tuple[int, int], ...] = option(
        (), ANY, "[tokens, bits] steps for the tokens next in age, newest first; older ones take bits"
    )
    value_group: int | None = option(None, at_least(1), "numbers of a value that share a scale; none: a whole head")
    nested: bool = option(
        False, one_of(True, False), "cut codes short when a token steps down; false: quantize it again"
    )

    def __post_init__(self) -> None:
        _ = self.setting

    @property
    def setting(self) -> KVSetting:
        """The options as the cache takes them."""
        return KVSetting(**vars(self))

    def change(self, model: Model, work: Work) -> None:
        """Keep the setting with the model.

        Raises:
            ModelError: the model keeps no cache.
        """
        kv_cache.keep(model, self.setting)
