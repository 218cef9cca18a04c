"""Fitting a checkpoint that is larger than memory.

The model is built without its weights; one block at a time is read, walked over, solved and written to a shard of the
result. In memory are at any time the block under way, the tables outside of blocks, the hidden states of all windows
and the second moments of one input.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pennyweight import resident
from pennyweight.calibrate.passage import Passage, Settled, Stage
from pennyweight.calibrate.shadow import Shadow
from pennyweight.calibrate.walk import (
    Report,
    Solve,
    SolveGroup,
    Windows,
    cast,
    checked,
    chosen,
    inputs_of,
    lacks_gradient,
    settle_with,
    stages_of,
)
from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.forward import native_dtype
from pennyweight.model import anatomy, compact, safetensors_file
from pennyweight.model.anatomy import Anatomy, Map
from pennyweight.model.checkpoint import INDEX, Checkpoint
from pennyweight.model.experts import split_experts
from pennyweight.model.loading import read_config
from pennyweight.model.model import Model, kind_of
from pennyweight.model.saving import Saved, saved_bytes
from pennyweight.safe_write import check_free, staged
from pennyweight.statistics import Statistics
from pennyweight.transformers_plugin import METHOD
from pennyweight.weights import Dense, Weight, structure

#: What may be alive in a block at a time: a quarter of what `calibrate.walk` takes, since memory is what is short here.
ACTIVATION_BYTES = 1 << 28
# how Mixtral and those after it spell the parts of an expert
_EXPERT, _EXPERT_PARTS = (
    re.compile(r"(\.experts\.\d+\.)(w[123])(?=\.)"),
    {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
)
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("*.jinja", "generation_config.json"),
)


def stream(
    checkpoint: str | Path,
    out: str | Path,
    windows: Windows | None,
    solve: Solve | None = None,
    *,
    solve_group: SolveGroup | None = None,
    needs: Collection[str] = frozenset({"second_moment"}),
    sequential: bool = True,
    only: Collection[str] | None = None,
    known: Mapping[str, Statistics] | None = None,
    done: Mapping[str, Mapping[str, Weight]] | None = None,
    finished: Callable[[Settled], None] | None = None,
    batch: int | None = None,
    activation_bytes: int = ACTIVATION_BYTES,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Saved:
    """`walk` over a checkpoint on disk, the result written block by block: `model.load` opens it.

    Gradients need the whole model in memory and are handed over only when ``known`` holds them.

    Args:
        checkpoint: a directory with ``config.json`` and safetensors, as ``transformers`` writes it.
        out: where the result goes; new or empty.
        windows: calibration windows; their hidden states stay in memory.
        solve: as in `walk`, like all that follows but ``overwrite``.
        solve_group: instead of ``solve``.
        needs: statistics to hand over.
        sequential: solve on the outputs of what was fitted before.
        only: names of the layers to visit.
        known: statistics that are there already.
        done: the weights of finished stages, by stage name.
        finished: called after each stage, when its shard is written.
        batch: windows a block is run on at a time.
        activation_bytes: what may be alive in a block at a time, where ``batch`` is not given.
        dtype: to compute in.
        overwrite: replace the results that are in ``out``.
        report: called with (stage, done, total).

    Raises:
        ModelError: not such a checkpoint, tensors are missing or of another shape, or a model that runs a block twice.
        OutputError: ``out`` holds something, or cannot be written; what stood there is untouched.
        DataError: as `calibrate.walk`, or gradients that ``known`` lacks.
    """
    needs = checked(needs)
    directory = Path(checkpoint)
    check_free(out, overwrite=overwrite)
    disk = Checkpoint(directory)
    config = read_config(directory)
    hollow, split = _built(config, directory, disk)
    found = anatomy.of(hollow)
    source = Disk(disk, hollow, found)
    source.check()
    for name, buffer in hollow.named_buffers():
        if name in source.shapes:
            buffer.copy_(source.tensor(name))
    layers = chosen(found, only)
    if "gradient" in needs and any(lacks_gradient(layer, known or {}) for layer in layers):
        raise DataError(
            f"{directory}: gradients need the whole model in memory; give them (known=collect(...)), or choose levers "
            "that do without"
        )
    if windows is None and needs:
        raise DataError(f"{directory}: {', '.join(sorted(needs))} cannot be found without calibration windows")
    model = Model(hollow, None, directory.name, kind_of(type(hollow).__name__), copy.deepcopy(config))
    inputs = inputs_of(model, windows) if windows is not None else ()
    shadow = Shadow(hollow, source, dtype or native_dtype("cpu"))
    stages = stages_of(found, layers)
    with staged(out, overwrite=overwrite) as aside:
        writer = _Writer(aside, source, stages)

        def keep(settled: Settled) -> None:
            writer.write(settled.name, settled.weights)
            resident.give_back()
            if finished is not None:
                finished(settled)

        settle = settle_with(shadow, solve, solve_group, known or {})

        def settle_and_trim(maps: Sequence[Map], statistics: Sequence[Statistics]) -> Sequence[Weight | None]:
            weights = settle(maps, statistics)
            resident.give_back()
            return weights

        passage = Passage(
            shadow, stages, settle_and_trim,
            needs=needs - {"gradient"}, sequential=sequential, done=done, finished=keep, keep=False,
            batch=batch, activation_bytes=activation_bytes, report=report,
        )  # fmt: skip
        passage.run(cast(inputs, shadow.dtype))
        writer.close(config.to_dict() | {"architectures": [type(hollow).__name__]}, split)
        _copy_rest(directory, aside)
        files = tuple(sorted(file.name for file in aside.iterdir()))
    return Saved(Path(out), files, saved_bytes(out))


class Disk:
    """The weights of a checkpoint, read when they are asked for.

    Args:
        checkpoint: the files.
        module: the model they are of, on the meta device.
        found: its anatomy.
    """

    def __init__(self, checkpoint: Checkpoint, module: PreTrainedModel, found: Anatomy) -> None:
        self.checkpoint, self.anatomy = checkpoint, found
        renamings = [t for t in get_model_conversion_mapping(module) if isinstance(t, WeightRenaming)]
        held = {_renamed(name, renamings): name for name in checkpoint.names()}
        prefix = f"{module.base_model_prefix}."
        #: by name in the model: what it is called on disk, and the name in the model that owns it when it is tied
        self.names: dict[str, str] = {}
        self.owner: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        first: dict[int, list[str]] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), []).append(name)
            self.shapes[name] = tuple(tensor.shape)
        for names in first.values():
            spelled = [held[s] for n in names for s in (n, n.removeprefix(prefix), prefix + n) if s in held]
            for name in names:
                self.owner[name] = names[0]
                if spelled:
                    self.names[name] = spelled[0]

    def check(self) -> None:
        """Raises a ModelError when tensors are missing or of another shape, before any work is done."""
        where = self.checkpoint.directory
        missing = [name for name in self.shapes if name not in self.names]
        if missing:
            raise ModelError(
                f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; the copy is incomplete, or "
                "it names them in a way that only transformers knows: load it whole"
            )
        for name, shape in self.shapes.items():
            if (there := self.checkpoint.shape(self.names[name])) != shape:
                raise ModelError(f"{where}: {name} is {there} where config.json asks for {shape}")

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.read(self.names[name])

    def weight(self, found: Map) -> Weight:
        tensor = self.tensor(f"{found.path}.{found.parameter}")
        return Dense(tensor.T if found.kind == "conv1d-transposed" else tensor.flatten(1))


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    """What the model calls the tensor that is ``name`` on disk."""
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return _EXPERT.sub(lambda found: found[1] + _EXPERT_PARTS[found[2]], name)


class _Writer:
    """Writes blocks as they are finished, a shard each, and at the end one with everything else."""

    def __init__(self, directory: Path, source: Disk, stages: Sequence[Stage]) -> None:
        self.directory, self.source = directory, source
        self.blocks = [stage.name for stage in stages if stage.is_block]
        self.left = dict.fromkeys(self.blocks)
        self.paths = {found.name: found.path for found in source.anatomy.whole}
        self.outside: dict[str, Weight] = {}
        self.structures: dict[str, dict[str, Any]] = {}
        self.headers: dict[str, str] = {}
        self.where: dict[str, str] = {}
        self.bytes = 0

    def write(self, stage: str, weights: Mapping[str, Weight]) -> None:
        """Take a finished stage; a block goes to disk now."""
        if stage in self.left:
            del self.left[stage]
            begin = f"{stage}."
            self._shard(self.blocks.index(stage), [n for n in self.source.shapes if n.startswith(begin)], weights)
        else:
            self.outside.update(weights)

    def close(self, config: Mapping[str, Any], split: tuple[str, ...]) -> None:
        """Write what is left, and the files that say what the shards hold."""
        for block in list(self.left):
            self.write(block, {})
        inside = tuple(f"{block}." for block in self.blocks)
        outside = [name for name in self.source.shapes if not name.startswith(inside)]
        self._shard(len(self.blocks), outside, self.outside)
        layout = self._layout(split)
        text = compact.dump(layout, self.headers)
        (self.directory / compact.WEIGHTS).write_text(text, encoding="utf-8")
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.where.items()))}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        found = dict(config)
        if layout.structures:
            found["quantization_config"] = {"quant_method": METHOD, "version": compact.VERSION}
        text = json.dumps(found, indent=2, sort_keys=True) + "\n"
        (self.directory / "config.json").write_text(text, encoding="utf-8")

    def _shard(self, index: int, names: Sequence[str], weights: Mapping[str, Weight]) -> None:
        fitted = {self.paths[name]: weight for name, weight in weights.items()}
        self.structures |= {path: structure(weight) for path, weight in fitted.items()}
        gone = {f"{path}.weight" for path in fitted}
        tensors = {n: self.source.tensor(n) for n in names if self.source.owner[n] == n and n not in gone}
        for path, weight in fitted.items():
            tensors |= {f"{path}.weight.{key}": tensor for key, tensor in weight.state_dict().items()}
        if index == len(self.blocks) and self.structures:
            # a dense tensor that plain transformers trips over, rather than fill in random numbers
            tensors[f"{next(iter(self.structures))}.weight"] = torch.empty(0, dtype=torch.uint8)
        file = f"model-{index + 1:05d}-of-{len(self.blocks) + 1:05d}.safetensors"
        self.headers[file] = safetensors_file.write(self.directory / file, tensors).sha256
        self.where |= dict.fromkeys(tensors, file)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _layout(self, split: tuple[str, ...]) -> compact.Layout:
        tied, shared = {}, {}
        for name, owner in self.source.owner.items():
            path, of = name.removesuffix(".weight"), owner.removesuffix(".weight")
            if name != owner and of in self.structures:
                tied[path] = of
            elif name != owner:
                shared[name] = owner
        return compact.Layout(self.structures, tied, shared, split)


def _built(
    config: PreTrainedConfig, directory: Path, checkpoint: Checkpoint
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model of ``config`` without its weights, and the stacked experts that were taken apart in it."""
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ModelError(f"{directory}: config.json names no architecture that transformers knows; add architectures")
    config = copy.deepcopy(config)
    with _parameters_on_meta():
        module: PreTrainedModel = cls(config).eval()
    module.tie_weights()
    held = module.state_dict()
    # experts are stored one by one, whatever the model makes of them
    stacked = any(name not in checkpoint.names() and tensor.ndim == 3 for name, tensor in held.items())
    return module, split_experts(module) if stacked else ()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, and real buffers: those are computed, not read."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _copy_rest(directory: Path, aside: Path) -> None:
    for file in sorted(directory.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _COPIED):
            shutil.copyfile(file, aside / file.name)
