"""EfficientQAT: whole blocks trained through their rounding one after another, then all scales end to end.

Source: M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
arXiv:2407.11062, and its official code. Block-AP trains all matrices of a block, their scales and zeros, and its norms,
to give what the block gave in the unchanged model, on what the quantized blocks before it give now. E2E-QP then keeps
codes and zeros, and trains the scales of all groups on next tokens.

Differs from the source: learning rates are relative, to the spread of a matrix and to the size of its scales, so that
they mean the same in every model (the paper's 2e-5 and 1e-4 are about 1e-3 and 3e-3 of Llama-2's); the defaults are
higher, for a few hundred windows in place of 4096; the range that a grid starts from always holds 0, and can be
searched; scales are trained as float16 stores them; the epoch that is best on windows of its own is kept, the start
among them; end to end the loss may be the divergence from the original; any blocks that the anatomy finds, those of
encoders and of vision models too.

Shape letters: C windows, T tokens, M out features, N in features, G groups of a row; ... what flows between blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.calibrate.passage import attention_mask
from pennyweight.calibrate.walk import inputs_of
from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.forward import device_of, native_dtype
from pennyweight.lever import at_least, between, lever, one_of, option
from pennyweight.model import anatomy
from pennyweight.model.anatomy import Map
from pennyweight.model.model import Model
from pennyweight.solvers.end_to_end import Group, divided, loss_towards, mean_loss, only, train
from pennyweight.solvers.rounding import GridOptions
from pennyweight.solvers.trained import Rescaled, Rounded, rescalable
from pennyweight.solvers.two_streams import Meeting, two_streams
from pennyweight.train.schedules import cosine
from pennyweight.weights import Quantized, Weight
from pennyweight.work import Work

_NAME = "quantize.efficientqat"


@lever(
    _NAME,
    reach="model",
    row=19,
    paper="EfficientQAT: Efficient Quantization-Aware Training for Large Language Models, arXiv:2407.11062",
)
@dataclass(frozen=True, kw_only=True)
class EfficientQAT:
    """Train blocks through their rounding, one by one, then the scales of all groups end to end.

    Quantizes the linear layers of blocks among those that the step selects. Layers that are quantized already keep
    their codes; their scales are trained end to end. With ``epochs = 0`` and ``steps = 0`` it is `quantize.rtn`.
    """

    bits: int = option(2, between(1, 8), "bits of a code")
    group_size: int | None = option(64, at_least(1), "input features that share a scale and a zero; none: the row")
    search: int = option(0, at_least(0), "ranges tried for each group at the start; 0: from minimum to maximum")
    samples: int = option(128, at_least(2), "windows to train on, those to choose by among them")
    validation: int = option(8, at_least(1), "windows to choose by: the best epoch, and whether the end was worth it")
    batch: int = option(2, at_least(1), "windows a step")
    epochs: int = option(2, at_least(0), "passes over the windows for each block; 0: round to nearest")
    weight_rate: float = option(1e-2, at_least(0), "learning rate of a block's weights, as a share of their spread")
    scale_rate: float = option(1e-2, at_least(0), "learning rate of scales and zeros, scales as a share of their mean")
    steps: int = option(100, at_least(0), "steps of training scales end to end; 0 for models of no next tokens")
    steps_rate: float = option(5e-3, at_least(0), "learning rate of scales end to end, as a share of each")
    target: Literal["text", "original"] = option(
        "text", one_of("text", "original"), "what is learned end to end: next tokens, or the original's distribution"
    )

    @property
    def grid_options(self) -> GridOptions:
        return GridOptions(self.bits, self.group_size, search=self.search)

    def change(self, model: Model, work: Work) -> None:
        maps = [found for found in work.maps if found.block is not None and found.kind != "embedding"]
        fresh = [found for found in maps if not rescalable(_held(model, found))]
        if not maps:
            raise OptionError(f"{_NAME}: the step selects no linear layer of a block; select some")
        if self.epochs and not fresh:
            raise OptionError(
                f"{_NAME}: epochs = {self.epochs}, and every layer that the step selects is quantized already; give "
                "epochs = 0 to train their scales alone"
            )
        if self.epochs and not self.weight_rate and not self.scale_rate:
            raise OptionError(f"{_NAME}: with both rates 0 epochs = {self.epochs} has no effect; give epochs = 0")
        loss = loss_towards(self.target, model, _steps_name(model)) if self.steps else None
        if self.epochs:
            windows = _windows(model, work, self.samples)
            block_ap(
                model, windows, fresh, self.grid_options, validation=self.validation, epochs=self.epochs,
                batch=self.batch, weight_rate=self.weight_rate, scale_rate=self.scale_rate, seed=work.seed,
                report=lambda done, all_: work.report("block-ap", done, all_),
            )  # fmt: skip
        else:
            for found in fresh:
                matrix = anatomy.matrix(model.module, found).float()
                grid = self.grid_options.fit(matrix)
                anatomy.replace(model.module, found.path, Quantized.from_codes(grid.codes(matrix), grid))
        if loss is not None:
            windows = work.text(self.samples)
            tune_scales(
                model, windows, maps, loss, validation=self.validation, steps=self.steps, batch=self.batch,
                rate=self.steps_rate, seed=work.seed, report=lambda done, all_: work.report("e2e-qp", done, all_),
            )  # fmt: skip


def _steps_name(model: Model) -> str:
    return _NAME if model.kind == "causal-lm" else f"{_NAME}: steps = 0 trains blocks alone; with steps it"


def _windows(model: Model, work: Work, samples: int) -> Tensor | dict[str, Tensor]:
    given = work.inputs(_NAME)
    if isinstance(given, Mapping):
        return {name: tensor[:samples] for name, tensor in given.items()}
    return given[:samples] if given.is_floating_point() else work.text(samples)


def _held(model: Model, found: Map) -> Weight | Tensor:
    held: Weight | Tensor = getattr(model.module.get_submodule(found.path), found.parameter)
    return held


def block_ap(
    model: Model,
    windows: Tensor | Mapping[str, Tensor],
    maps: Sequence[Map],
    grids: GridOptions,
    *,
    validation: int,
    epochs: int,
    batch: int,
    weight_rate: float,
    scale_rate: float,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Block-wise training of all parameters: the layers of ``maps`` become `Quantized`, the norms of blocks are moved.

    Args:
        model: float32, changed in place.
        windows: as `pennyweight.calibrate.collect` takes them.
        maps: layers of blocks.
        grids: of the weights, with integer zeros.
        validation: how many of the windows, the last ones, are not trained on but choose the best epoch.
        epochs: passes over the others.
        batch: windows a step.
        weight_rate: as a share of the deviation of each matrix.
        scale_rate: of scales as a share of their mean, of zeros in levels.
        seed: of the order of windows.
        dtype: of matrix products; None for bfloat16 where the processor has it.
        report: called with the blocks done and all of them.

    Returns:
        By path of the block, the mean squared error on the windows to choose by: at the start and after each epoch.

    Raises:
        ModelError: weights that are not float32, or a loss that is not finite.
        DataError: too few windows.
    """
    if any(weight.dtype != torch.float32 for path in model.anatomy.norms for weight in _own(model, path)):
        raise ModelError(f"{_NAME}: {model.name} is not in float32, which training needs; load it with dtype float32")
    blocks = [block for block in model.anatomy.blocks if any(found.block == block.index for found in maps)]
    inputs = inputs_of(model, windows)
    ids = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    divided(ids, validation, _NAME)
    mask = attention_mask(inputs)
    history: dict[str, list[float]] = {}

    def change(meeting: Meeting) -> None:
        block, number = meeting.block, len(history)
        layers = {}
        for found in (found for found in maps if found.block == block.index):
            matrix = anatomy.matrix(model.module, found).float()
            layers[found.path] = Rounded(matrix, grids.fit(matrix))
            anatomy.replace(model.module, found.path, layers[found.path])
        norms = [w for path in model.anatomy.norms if path.startswith(f"{block.path}.") for w in _own(model, path)]
        groups = _block_groups(list(layers.values()), norms, weight_rate, scale_rate)
        with only(model.module, [p for group in groups for p in group.parameters]):
            history[block.path] = _aligned(
                meeting, groups, mask, validation=validation, epochs=epochs, batch=batch, seed=seed + number
            )
        for path, layer in layers.items():
            anatomy.replace(model.module, path, layer.frozen())
        if report is not None:
            report(len(history), len(blocks))

    own = native_dtype(device_of(model.module).type) if dtype is None else dtype
    two_streams(model, windows, change, blocks=blocks, dtype=None if own == torch.float32 else own)
    return history


def _own(model: Model, path: str) -> list[nn.Parameter]:
    """The factors of a norm; its shift is a bias, which stays as it is."""
    own = model.module.get_submodule(path).named_parameters(recurse=False)
    return [parameter for name, parameter in own if name == "weight"]


def _block_groups(
    layers: Sequence[Rounded], norms: Sequence[nn.Parameter], weight_rate: float, scale_rate: float
) -> list[Group]:
    groups = []
    for layer in layers:
        groups.append(Group([layer.matrix], weight_rate * float(layer.matrix.detach().std(correction=0))))
        groups.append(Group([layer.scale], scale_rate * float(layer.scale.detach().mean())))
        groups.append(Group([layer.zero], scale_rate))
    groups += [Group([norm], weight_rate * float(norm.detach().square().mean().sqrt())) for norm in norms]
    return [group for group in groups if group.rate > 0]


def _aligned(
    meeting: Meeting, groups: Sequence[Group], mask: Tensor | None, *, validation: int, epochs: int, batch: int,
    seed: int,
) -> list[float]:  # fmt: skip
    """Train a block; its best state is put back. The error on the last windows at the start and after each epoch."""
    trained, chosen_by = torch.arange(meeting.count).tensor_split([meeting.count - validation])
    parameters = [parameter for group in groups for parameter in group.parameters]
    adam = torch.optim.AdamW([{"params": list(g.parameters), "lr": g.rate} for g in groups], weight_decay=0.0)
    total = epochs * math.ceil(len(trained) / batch)
    schedule = cosine(total, floor=0.05)
    g = torch.Generator().manual_seed(seed)
    history = [_validated(meeting, chosen_by, mask, batch)]
    best = [parameter.detach().clone() for parameter in parameters]
    step = 0
    for _ in range(epochs):
        order = trained[torch.randperm(len(trained), generator=g)]
        for start in range(0, len(order), batch):
            at = order[start : start + batch]
            for group, settings in zip(groups, adam.param_groups, strict=True):
                settings["lr"] = group.rate * schedule(step + 1)
            loss = _error(meeting, at, mask)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            step += 1
        history.append(_validated(meeting, chosen_by, mask, batch))
        if history[-1] <= min(history):
            best = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return history


@torch.no_grad()
def _validated(meeting: Meeting, at: Tensor, mask: Tensor | None, batch: int) -> float:
    parts = [at[start : start + batch] for start in range(0, len(at), batch)]
    found = sum(len(part) * float(_error(meeting, part, mask)) for part in parts) / len(at)
    if not math.isfinite(found):
        raise ModelError(f"{_NAME}: the error of {meeting.block.path} is {found}; lower the learning rates")
    return found


def _error(meeting: Meeting, at: Tensor, mask: Tensor | None) -> Tensor:
    """The mean squared error of a block's output, over tokens that count."""
    square = (meeting.run(at).float() - meeting.targets[at].float()).square()
    if mask is None or square.ndim != 3 or square.shape[:2] != mask[at].shape:
        return square.mean()
    return square[mask[at]].mean()


def tune_scales(
    model: Model,
    windows: Tensor,
    maps: Sequence[Map],
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    *,
    validation: int,
    steps: int,
    batch: int,
    rate: float,
    clip: float | None = 0.3,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """End-to-end training of the scales of all groups, codes and zeros as they are; undone where it does not help.

    Args:
        model: whose layers of ``maps`` hold `Quantized` weights; their scales are changed.
        windows: (C, T) token ids.
        maps: at least one.
        loss: from `loss_towards`.
        validation: how many of the windows, the last ones, are not trained on but decide whether it helped.
        steps: of AdamW.
        batch: windows a step.
        rate: as a share of each scale.
        clip: largest norm of the gradient.
        seed: of the order of windows.
        report: called with the steps done and all of them.

    Returns:
        The loss on the last windows before and after.
    """
    trained, chosen_by = divided(windows, validation, _NAME)
    held = {found.path: _held(model, found) for found in maps}
    layers = {path: Rescaled(weight) for path, weight in held.items() if rescalable(weight)}
    assert len(layers) == len(held)
    before = mean_loss(model.module, chosen_by, loss, batch=batch)
    for path, layer in layers.items():
        anatomy.replace(model.module, path, layer)
    factors = [layer.factor for layer in layers.values()]
    train(
        model.module, [Group(factors, rate)], trained, loss, steps=steps, batch=batch, clip=clip, seed=seed,
        report=report,
    )  # fmt: skip
    for path, layer in layers.items():
        anatomy.replace(model.module, path, layer.frozen())
    after = mean_loss(model.module, chosen_by, loss, batch=batch)
    if not after < before:
        for path, weight in held.items():
            assert isinstance(weight, Weight)
            anatomy.replace(model.module, path, weight)
    return before, after
