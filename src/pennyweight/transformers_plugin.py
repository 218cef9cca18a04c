"""Opening compact directories in ``transformers``: ``from_pretrained(dir)`` after ``import pennyweight``.

A quantizer plug-in, registered under the ``quant_method`` that `model.save` writes into ``config.json``. It takes the
tensors that compact layers stand for off the skeleton before ``transformers`` loads the rest, and puts the compact
layers there afterwards. Importing this module imports ``transformers.quantizers.auto``; `pennyweight` itself waits
until somebody else does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from torch import nn

    from pennyweight.model.compact import Overlay

METHOD = "pennyweight"


class PennyweightConfig(QuantizationConfigMixin):
    """What ``config.json`` says: that ``weights.json`` says the rest.

    Args:
        version: of the format.
        directory: where the files lie; found by ``transformers`` when left out, and never written.
    """

    def __init__(self, version: int = 1, directory: str | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.version = version
        self.directory = directory

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "version": self.version}


class PennyweightQuantizer(HfQuantizer):
    """Lays the compact layers of a directory over a ``transformers`` model while it is loaded."""

    quantization_config: PennyweightConfig
    overlay: Overlay
    device_map: dict[str, Any]

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: list[str] | None = None,
        device_map: dict[str, Any] | None = None,
        **_: Any,
    ) -> nn.Module:
        # deferred: this module is imported while transformers itself still is
        from pennyweight.model import compact
        from pennyweight.model.checkpoint import Checkpoint

        directory = self.quantization_config.directory or Path((checkpoint_files or [""])[0]).parent
        self.device_map = device_map or {}
        checkpoint = Checkpoint(directory)
        self.overlay = compact.Overlay(checkpoint, compact.read_layout(checkpoint))
        compact.untie(model, set(self.overlay.layout.paths))
        self.overlay.strip(model)
        # one pattern, not one a name: each is tried on each name
        read_here = "|".join(re.escape(name) for name in checkpoint.names() if self.overlay.owns(name))
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignored = {*known, f"^(?:{read_here})$"} if read_here else {*known}
        setattr(model, "_keys_to_ignore_on_load_unexpected", ignored)  # noqa: B010  unknown to nn.Module
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        from pennyweight.model import compact
        from pennyweight.serve import fused

        self.overlay.attach(model)
        for path in compact.compact_layers(model):
            # the longest entry that holds the layer says where it goes; {"": device} is the whole model
            at = max((k for k in self.device_map if f"{path}.".startswith(f"{k}." if k else "")), key=len, default=None)
            if at is not None:
                model.get_submodule(path).to(self.device_map[at])
        fused.fuse(model)
        return model.eval()

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        return []  # files are written under the names that the modules have

    def is_serializable(self) -> bool:
        return False  # pennyweight.save writes it, save_pretrained cannot

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make the plug-in known to ``transformers``; a second time does nothing."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(PennyweightConfig)
        auto.register_quantizer(METHOD)(PennyweightQuantizer)


register()
