"""What a fit may do to a model that is to run in another engine, and the file it then writes beside its own.

A target is a filter of offers: for every map the settings whose grids the format holds bit for bit. So a plan for it
spends the bytes of the very file that the engine loads, and the export rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pennyweight.errors import OptionError
from pennyweight.export.compressed_tensors_out import GROUPS, check_compressed_tensors, to_compressed_tensors
from pennyweight.export.gguf_out import check_gguf, gguf_bytes, to_gguf
from pennyweight.export.openvino_out import check_openvino, to_openvino
from pennyweight.export.result import Exported
from pennyweight.lever import candidates_of, find, make
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model

__all__ = ["TARGETS", "Target", "target"]


@dataclass(frozen=True)
class Target:
    """A format that a fit can plan for.

    Attributes:
        name: as `pennyweight.export.export` calls it.
        file: what is written beside the fit's own files: a file, or a directory.
        lever: the lever whose settings are offered.
        settings: those that hold for a map; none leaves it as it is.
        check: refuses, before any work, a model that the format cannot say.
        bytes: exactly what the files of a model will take.
        write: writes them.
        weighs: endings of the files that count, of a directory.
        fused: maps that read the same inputs take the same setting, since the engine runs them as one.
    """

    name: str
    file: str
    lever: str
    settings: Callable[[Map], Iterator[Any]]
    check: Callable[[Model], None]
    bytes: Callable[[Model], int]
    write: Callable[..., Exported]
    weighs: tuple[str, ...] = ()
    fused: bool = False

    def export(self, model: Model, directory: Path) -> Exported:
        """Write ``model`` into ``directory``."""
        return self.write(model, directory / self.file, dtype=None, overwrite=False)

    def size(self, directory: Path) -> int:
        """Bytes of what lies in ``directory``, as a budget counts them."""
        return _weight(directory / self.file, self.weighs)


def _weight(there: Path, endings: tuple[str, ...]) -> int:
    if there.is_file():
        return there.stat().st_size
    return sum(file.stat().st_size for file in there.iterdir() if file.suffix in endings)


def _weighed(write: Callable[..., Exported], endings: tuple[str, ...], model: Model) -> int:
    """By writing it: what a graph takes is the engine's to say."""
    with TemporaryDirectory() as folder:
        write(model, Path(folder) / "out", dtype=None, overwrite=False)
        return _weight(Path(folder) / "out", endings)


def _blocks(found: Map) -> Iterator[Any]:
    return candidates_of(find("quantize.blocks"), found.shape)


def _whole_numbers(found: Map, *, zeros: tuple[str, ...], embeddings: bool) -> Iterator[Any]:
    """Codes of 4 and 8 bits in groups that divide the inputs."""
    if found.kind != "linear" and not (embeddings and found.kind == "embedding"):
        return
    if found.block is None and not embeddings:
        return
    for bits, zero in (*((4, zero) for zero in zeros), (8, "none")):
        for size in GROUPS:
            if size is None or found.shape[1] % size == 0:
                options = {"bits": bits, "group_size": size, "zero": zero}
                searched = {"search": 16, "importance": "inputs"} if bits < 8 else {}
                yield make("quantize.gptq", options | searched)


_TENSORS, _GRAPH = (".safetensors",), (".xml", ".bin")
TARGETS = {
    "gguf": Target("gguf", "model.gguf", "quantize.blocks", _blocks, check_gguf, gguf_bytes, to_gguf),
    "compressed-tensors": Target(
        "compressed-tensors", "compressed-tensors", "quantize.gptq",
        partial(_whole_numbers, zeros=("none",), embeddings=False),
        check_compressed_tensors, partial(_weighed, to_compressed_tensors, _TENSORS), to_compressed_tensors, _TENSORS,
        fused=True,
    ),
    "openvino": Target(
        "openvino", "openvino", "quantize.gptq",
        partial(_whole_numbers, zeros=("none", "integer"), embeddings=True), check_openvino,
        partial(_weighed, to_openvino, _GRAPH), to_openvino, _GRAPH,
    ),
}  # fmt: skip


def target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in TARGETS:
        raise OptionError(f"fit: target {name!r}; give one of {', '.join(TARGETS)}")
    return TARGETS[name]
