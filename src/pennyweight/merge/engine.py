"""The engine: walks models tensor by tensor, a stretch at a time, and writes the result as it goes.

Each worker takes whole tensors, the largest first, and holds one stretch of every model, so that memory is bounded by
the number of models and workers, not by any size of theirs. Files are laid out first and filled by offset; the result
is the same bits for any number of workers and any layout of shards.

Shape letters: E models, n elements of a stretch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.errors import ModelError, OptionError
from pennyweight.merge.formula import STRETCH, Formula, Span
from pennyweight.merge.sources import Adapter, Memory, Shards, Source
from pennyweight.model.checkpoint import INDEX, SINGLE
from pennyweight.model.safetensors_file import METADATA, file_order, header_bytes
from pennyweight.recipe import compiled
from pennyweight.safe_write import staged

Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Write = Callable[[str, int, Tensor], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "spiece.model", "*.jinja"),
)


@dataclass(frozen=True)
class Merged:
    """A written merge.

    Attributes:
        directory: where it lies.
        tensors: merged, and copied from the first model because they are no floats or were to be skipped.
        bytes: of all tensors written.
    """

    directory: Path
    tensors: int
    copied: int
    bytes: int

    @property
    def words(self) -> str:
        """One line for people."""
        return f"{self.tensors} tensors merged, {self.copied} copied, {self.bytes:,} bytes; written to {self.directory}"


class _Walked:
    """One tensor of all models, read into the buffers of a worker; see `formula.Stretched`."""

    def __init__(
        self, name: str, shape: tuple[int, ...], models: Sequence[Source], base: Source | None, buffer: Tensor
    ) -> None:
        self.name, self.shape = name, shape
        self._models, self._base, self._buffer = models, base, buffer

    def spans(self) -> Iterator[Span]:
        count = prod(self.shape)
        for start in range(0, count, STRETCH):
            part = self._buffer[:, : min(STRETCH, count - start)]
            for source, row in zip(self._models, part[1:], strict=True):
                source.read(self.name, start, row)
            if self._base is not None:
                self._base.read(self.name, start, part[0])
            yield Span(start, part[1:], None if self._base is None else part[0])


def run(
    formula: Formula,
    models: Sequence[Source],
    base: Source | None,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    write: Write,
    *,
    workers: int | None = None,
) -> None:
    """Merge the tensors of ``kinds``, and hand each stretch, in the dtype of ``kinds``, to ``write``.

    Args:
        formula: see `formula`.
        models: to merge.
        base: what they came from, if the formula wants it.
        kinds: dtype and shape of each result.
        write: called with name, first element and (n,) elements, by several threads; the tensor is scratch.
        workers: threads; None for one a core that this process may use.

    Raises:
        ModelError: NaN or infinite results, in float32 or in their own dtype, or a file that was cut.
    """
    # the largest first, so that no worker is left alone with it in the end
    names = iter(sorted((n for n in kinds if prod(kinds[n][1])), key=lambda name: (-prod(kinds[name][1]), name)))
    workers = workers or _cores()

    def most(dtype: torch.dtype) -> float:
        # what is less than half a step above the largest number is rounded to it; torch would cut the rest off in
        # 8 bits, and make it infinite in 16
        return torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)

    def work() -> None:
        buffer = torch.empty(len(models) + 1, STRETCH)
        for name in names:  # a plain list iterator: taking the next one is atomic
            dtype, shape = kinds[name]
            walked = _Walked(name, shape, models, base, buffer)
            rule = formula.prepare(walked)
            for span in walked.spans():
                found = rule(span)
                largest = found.abs().max()
                if not torch.isfinite(largest):
                    raise ModelError(f"{formula.title}: {name} comes out with NaN or infinite elements; look at inputs")
                if float(largest) > most(dtype):
                    raise ModelError(
                        f"{formula.title}: {name} reaches {float(largest):.4g}, more than {str(dtype)[6:]} holds; "
                        "give smaller weights, or dtype: bfloat16"
                    )
                found = found.to(dtype)
                write(name, span.start, found)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a stretch is too short to share; the workers are what runs side by side
    try:
        with ThreadPoolExecutor(workers) as pool, torch.inference_mode():
            for done in [pool.submit(torch.inference_mode()(work)) for _ in range(workers)]:
                done.result()
    finally:
        torch.set_num_threads(before)


def merge_tensors(
    formula: Formula, models: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Merge state dicts in memory: the tensors of the base, or else of the first model, merged, in their dtypes.

    Raises:
        ModelError: tensors that differ in name or shape, or are floats in one and whole numbers in another.
        OptionError: a base or weights that the formula misses.
    """
    sources = [Memory(model, f"model {place}") for place, model in enumerate(models)]
    under = None if base is None else Memory(base, "the base")
    formula.check(len(sources), base=under is not None)
    kinds, rest = _common(sources, under, (), None)
    found = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in kinds.items()}

    def write(name: str, start: int, part: Tensor) -> None:
        found[name].view(-1)[start : start + len(part)] = part

    run(formula, sources, under if formula.needs_base else None, kinds, write)
    lead = under or sources[0]
    return found | {name: lead.tensors[name].clone() for name in rest}


def merge_files(
    formula: Formula,
    models: Sequence[Source],
    out: str | Path,
    *,
    base: Source | None = None,
    dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
    shard_bytes: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Merged:
    """Merge models on disk into a new directory; models may be larger than memory.

    Args:
        formula: see `formula`.
        models: `Shards` or `Adapter`.
        out: new or empty; gets the configuration and tokenizer of the base, or else of the first model, too.
        base: what the models came from, if the formula wants it.
        dtype: of the result; None for that of the base or else the first model.
        skip: patterns of tensors that are copied from the base or else the first model, and not merged; others may
            lack them or have them in another shape.
        shard_bytes: most bytes of a file, unless one tensor alone has more; None for a single file.
        overwrite: replace results that are in ``out``.
        workers: threads; None for one a core.

    Raises:
        ModelError: tensors that differ in name or shape, or are floats in one and whole numbers in another; NaN or
            infinite results; a damaged configuration.
        OptionError: a base or weights that the formula misses, or a pattern that selects nothing.
        OutputError: ``out`` holds something, or cannot be written.
    """
    formula.check(len(models), base=base is not None)
    lead = _files(base or models[0])
    kinds, rest = _common(models, base, skip, dtype)
    copied = {name: lead.kinds()[name] for name in rest}
    every: Kinds = kinds | copied
    values = {one.name: getattr(formula, one.name) for one in fields(formula)}
    options = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
    metadata = METADATA | {"merge": json.dumps({formula.name: options}, sort_keys=True)}
    config = None if dtype is None else _config(lead.directory / "config.json", dtype)
    try:
        with staged(out, overwrite=overwrite) as aside, _Files(aside, every, shard_bytes, metadata) as files:
            run(formula, models, base if formula.needs_base else None, kinds, files.write, workers=workers)
            for name in rest:
                _copy(lead, name, copied[name], files)
            for pattern in _COPIED:
                for file in lead.directory.glob(pattern):
                    if file.is_file():
                        shutil.copyfile(file, aside / file.name)
            if config is not None:
                (aside / "config.json").write_text(config, "utf-8")
    finally:
        for source in (*models, *([base] if base else []), lead):
            source.close()
    size = sum(prod(shape) * one.itemsize for one, shape in every.values())
    return Merged(Path(out), len(kinds), len(rest), size)


def _common(
    models: Sequence[Source], base: Source | None, skip: Sequence[str], dtype: torch.dtype | None
) -> tuple[Kinds, list[str]]:
    """What is merged, in which dtype and shape; and the names of what is copied."""
    lead = base or models[0]
    kinds = lead.kinds()
    every = set(kinds).union(*(other.kinds() for other in models))
    for pattern in skip:
        if not any(compiled(pattern).fullmatch(name) for name in every):
            raise OptionError(f"merge: skip {pattern!r} selects none of the {len(every)} tensors of these models")

    def skipped(name: str) -> bool:
        return any(compiled(pattern).fullmatch(name) for pattern in skip)

    merged = {n: (dtype or k, s) for n, (k, s) in kinds.items() if k.is_floating_point and not skipped(n)}
    for other in (*models, *([base] if base else [])):
        theirs = other.kinds()
        for name in merged.keys() | theirs.keys():
            if skipped(name):
                continue
            mine, their = kinds.get(name), theirs.get(name)
            if mine and their and mine[0].is_floating_point != their[0].is_floating_point:
                raise ModelError(
                    f"merge: {name} is {str(mine[0])[6:]} in {lead.label} and {str(their[0])[6:]} in {other.label}; "
                    "merge models of one kind, or skip it"
                )
            if mine and name not in merged:
                continue
            one, two = (kind and kind[1] for kind in (mine, their))
            if one != two:
                raise ModelError(
                    f"merge: {name} is {_words(one)} in {lead.label} and {_words(two)} in {other.label}; "
                    "merge models of one shape, or skip it"
                )
    return merged, [name for name in kinds if name not in merged]


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(shape)


def _config(file: Path, dtype: torch.dtype) -> str | None:
    """The configuration in ``file`` with another dtype; None where there is none."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
        found[next((key for key in ("dtype", "torch_dtype") if key in found), "dtype")] = str(dtype)[6:]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: damaged configuration ({error}); copy or download it again") from None
    return json.dumps(found, indent=2) + "\n"


def _files(source: Source) -> Shards:
    while isinstance(source, Adapter):
        source = source.base
    assert isinstance(source, Shards), "a merge of files begins with one"
    return source


def _copy(lead: Shards, name: str, kind: tuple[torch.dtype, tuple[int, ...]], files: _Files) -> None:
    size, step = prod(kind[1]) * kind[0].itemsize, 8 * STRETCH
    buffer = torch.empty(min(size, step), dtype=torch.uint8)
    for start in range(0, size, step):
        part = buffer[: min(step, size - start)]
        lead.raw(name, start, part)
        files.write_bytes(name, start, part)


class _Files:
    """Safetensors files laid out in ``directory``, filled by offset by several threads."""

    def __init__(self, directory: Path, kinds: Kinds, shard_bytes: int | None, metadata: Mapping[str, str]) -> None:
        shards: list[list[str]] = [[]]
        size = 0
        for name in sorted(kinds):
            own = prod(kinds[name][1]) * kinds[name][0].itemsize
            if shard_bytes is not None and shards[-1] and size + own > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += own
        self._at: dict[str, tuple[int, int]] = {}  # descriptor and first byte
        self._descriptors: list[int] = []
        where = {}
        for place, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{place:05}-of-{len(shards):05}.safetensors"
            inside = {name: kinds[name] for name in names}
            head = header_bytes(inside, metadata)
            descriptor = os.open(directory / file, os.O_WRONLY | os.O_CREAT, 0o666)
            self._descriptors.append(descriptor)
            os.pwrite(descriptor, head, 0)
            at = len(head)
            for name in file_order(inside):
                kind, shape = kinds[name]
                self._at[name] = (descriptor, at)
                at += prod(shape) * kind.itemsize
                where[name] = file
            os.truncate(descriptor, at)
        if len(shards) > 1:
            total = sum(prod(shape) * kind.itemsize for kind, shape in kinds.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Put elements ``start`` on of tensor ``name`` in their place."""
        self.write_bytes(name, start * part.dtype.itemsize, part.contiguous().view(torch.uint8))

    def write_bytes(self, name: str, start: int, part: Tensor) -> None:
        descriptor, at = self._at[name]
        view, done = part.numpy().data, 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], at + start + done)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
