"""What an export wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pennyweight.units import show_bytes


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        path: the file or directory.
        format: as `pennyweight.export.export` calls it.
        bytes: of all its files.
        kinds: what each tensor is stored as, by its name in the file (ONNX: constants among them): "Q4_0", "F32",
            "bfloat16", ...
        loss: of each tensor that was rounded on the way, the relative Frobenius error; empty when nothing was.
    """

    path: Path
    format: str
    bytes: int
    kinds: Mapping[str, str]
    loss: Mapping[str, float] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Where it is, how large, of what, and what was lost."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self.kinds.values()).most_common())
        said = f"{self.path}: {self.format}, {show_bytes(self.bytes)}; tensors: {kinds}; "
        if not self.loss:
            return said + "every value as it was"
        worst = max(self.loss, key=lambda name: self.loss[name])
        return f"{said}{len(self.loss)} rounded, relative error {self.loss[worst]:.2g} at most ({worst})"
