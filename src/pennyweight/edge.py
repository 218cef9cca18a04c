"""Fit an image classifier to a device: enough frames a second, and every class recalled often enough.

Row 203. Source: A. Briley and F. Afghah, "Hardware Acceleration for Real-Time Wildfire Detection Onboard Drone
Networks", arXiv:2401.08105: a classifier and a segmenter of fire on an edge board, as they are, in half precision
(AMP), with 8-bit integers after training and in training, compared in frames a second and accuracy. Here
the same four formats are made, judged and timed in turns on this machine; the fastest that holds every floor is handed
out, or none. Differs from the source: ONNX Runtime on this processor where TensorRT ran on a Jetson; bfloat16 for half
precision; batch norms are folded first; recall is held to by an exact one-sided test at 95 %.

Shape letters: B images, K classes, V formats, R rounds.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.errors import BudgetError, DataError, MissingExtraError, ModelError, OptionError
from pennyweight.evaluate.forward import first_tensor, looking
from pennyweight.export.onnx_out import hushed
from pennyweight.lever import make
from pennyweight.measure import latency
from pennyweight.measure.stats import Interval
from pennyweight.model import anatomy
from pennyweight.model.fold_norms import fold_norms
from pennyweight.model.model import Model
from pennyweight.safe_write import write_bytes, write_text
from pennyweight.statistics import NO_STATISTICS
from pennyweight.train.aqt import AQT
from pennyweight.train.loop import Loss, Trainer
from pennyweight.train.samples import Batch, Samples
from pennyweight.train.schedules import cosine
from pennyweight.weights import stored_bytes
from pennyweight.work import Work

Format = Literal["fp32", "bf16", "int8-ptq", "int8-qat"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8-ptq", "int8-qat")
Backend = Literal["auto", "onnxruntime", "torch"]
_LEVEL = 0.95
_FLOOR = re.compile(r"\s*(accuracy|recall\[([^\]]+)\])\s*>=\s*([0-9.]+)\s*(%?)\s*")
_BUDGET = re.compile(r"\s*fps\s*>=\s*([0-9.]+)\s*")


@dataclass(frozen=True)
class Floor:
    """The least share of images, or of those of one class, that are to be classified rightly."""

    text: str
    label: int | None
    bound: float


@dataclass(frozen=True)
class Measured:
    """One format, as it was judged and timed.

    Attributes:
        format: "fp32", "bf16", "int8-ptq" or "int8-qat".
        backend: "onnxruntime" or "torch". Integers are only simulated in torch: their speed there means nothing.
        accuracy: share of held-out images.
        recall: the same by class.
        lower: by floor, the one-sided 95 % lower limit of its share.
        p50_ms: median time of a frame.
        p95_ms: time that 95 of 100 frames stay within.
        fps: frames a second that 95 of 100 frames keep up with.
        ratio: of the median to that of fp32, with its interval; below 1 is faster.
        bytes: of the file, or of the tensors in torch.
        missed: what it falls short of, in words; empty when it holds everything.
    """

    format: Format
    backend: str
    accuracy: float
    recall: Mapping[str, float]
    lower: Mapping[str, float]
    p50_ms: float
    p95_ms: float
    fps: float
    ratio: Interval
    bytes: int
    missed: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """The format that was chosen, all that were tried, and what runs it.

    Attributes:
        chosen: the fastest that holds every floor.
        tried: all formats, the original first.
        run: pixels (B, C, H, W) -> logits (B, K).
        module: the network of the chosen format, batch norms folded.
        onnx: the file for ONNX Runtime; None where torch ran it.
    """

    chosen: Measured
    tried: tuple[Measured, ...]
    run: Callable[[Tensor], Tensor]
    module: nn.Module
    onnx: bytes | None

    def save(self, directory: str | Path) -> None:
        """Write ``model.onnx`` and ``edge.json``, the measurements.

        Raises:
            ModelError: torch ran it, so that there is no file to write.
        """
        if self.onnx is None:
            raise ModelError(
                "edge: torch ran this model; install onnxruntime and onnx to export it, or save the module"
            )
        write_bytes(Path(directory) / "model.onnx", self.onnx)
        write_text(Path(directory) / "edge.json", json.dumps([_plain(one) for one in self.tried], indent=2))


def fit(
    module: nn.Module,
    train: Batch,
    heldout: tuple[Tensor, Tensor],
    *,
    classes: Sequence[str],
    budget: str | None = None,
    floors: Sequence[str] = (),
    formats: Sequence[Format] = FORMATS,
    backend: Backend = "auto",
    loss: Loss | None = None,
    steps: int = 100,
    learning_rate: float = 3e-4,
    batch: int = 1,
    repeats: int = 60,
    seed: int = 0,
) -> Fitted:
    """The fastest of four formats of ``module`` that holds every floor and the budget.

    Args:
        module: pixels (B, C, H, W) -> logits (B, K), or a tuple that begins with them. It is not changed.
        train: images, labels and whatever else ``loss`` reads: for calibration, and for training in integers.
        heldout: images and labels to judge by.
        classes: their names, in the order of the logits.
        budget: "fps>=15": what 95 of 100 frames keep up with.
        floors: "accuracy>=0.9", "recall[fire]>=95%": shown to hold at 95 % on ``heldout``.
        formats: which to try; "fp32" is always timed, for the others to be compared with.
        backend: "onnxruntime" (the extra ``export``), "torch", or "auto": the first where it is installed.
        loss: of the module and a batch of ``train``; None for cross-entropy.
        steps: of training with 8-bit integers.
        learning_rate: peak of AdamW there.
        batch: images a frame that is timed.
        repeats: rounds of timings.
        seed: of the order of samples.

    Raises:
        BudgetError: no format holds what is asked; it names the nearest and what that misses.
        MissingExtraError: ``backend`` is "onnxruntime" and it is not installed.
        OptionError: a budget, a floor or a format that cannot be read.
        DataError: no image of a class with a floor.
    """
    fps, wanted = _fps(budget), [_floor(text, classes) for text in floors]
    if unknown := [name for name in formats if name not in FORMATS]:
        raise OptionError(f"edge: unknown format {unknown[0]!r}; give some of {', '.join(FORMATS)}")
    if not formats or batch < 1 or steps < 2:
        raise OptionError(f"edge: {len(formats)} formats, batch = {batch}, steps = {steps}; give at least 1, 1 and 2")
    engine = _engine(backend)
    order = ("fp32", *(name for name in FORMATS if name in formats and name != "fp32"))
    made = dict(_made(module, train, order, loss, steps, learning_rate, seed))  # type: ignore[arg-type]
    runners: dict[str, _Runner] = {
        name: engine(name, one, train[0]) if name != "bf16" else _Torch(name, one) for name, one in made.items()
    }
    frame = heldout[0][:batch]
    fns = [_bind(runner, frame) for runner in runners.values()]
    seconds = np.array(list(latency.in_turns(fns, repeats=repeats, warmup=5)))  # (R, V)
    tried = []
    for index, (name, runner) in enumerate(runners.items()):
        right = _right(runner, heldout)
        tried.append(_measured(name, runner, right, heldout[1], classes, wanted, seconds, index, batch, fps))
    allowed = [one for one in tried if one.format in formats]
    holding = [one for one in allowed if not one.missed]
    if not holding:
        raise BudgetError(_refusal(allowed))
    chosen = max(holding, key=lambda one: one.fps)
    winner = runners[chosen.format]
    return Fitted(chosen, tuple(tried), winner, made[chosen.format], winner.file)


# -- formats -----------------------------------------------------------------------------------------------------------


def _made(
    module: nn.Module, train: Batch, formats: Sequence[Format], loss: Loss | None, steps: int, rate: float, seed: int
) -> Iterator[tuple[Format, nn.Module]]:
    """Every format as a module; integers are simulated in it, on the grids that the device will use."""
    plain = copy.deepcopy(module).eval()
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in plain.modules()):
        fold_norms(plain, train[0][:8])
    for name in formats:
        made = copy.deepcopy(plain)
        if name == "int8-ptq":
            _round(made, train[0])
        elif name == "int8-qat":
            _tune(made, train, loss or _cross_entropy, steps, rate, seed)
        yield name, made.eval()


def _round(module: nn.Module, images: Tensor) -> None:
    model = Model(module, None, "edge", "module")
    maps = model.anatomy.layers()
    make("quantize.activations", {"bits": 8, "static": True, "granularity": "tensor"}).change(
        model, Work(model=model, windows=images[:128], maps=maps)
    )
    rtn = make("quantize.rtn", {"bits": 8, "group_size": None, "zero": "none"})
    for one in maps:
        layer: Any = module.get_submodule(one.path)
        anatomy.replace(module, one.path, rtn.solve(layer.weight, NO_STATISTICS))


def _tune(module: nn.Module, train: Batch, loss: Loss, steps: int, rate: float, seed: int) -> None:
    maps = anatomy.of(module).layers()
    aqt = AQT(module, maps, bits=8, activation_bits=8, edge_bits=None, start=max(1, steps // 10), granularity="tensor")
    trainer = Trainer(
        module,
        torch.optim.AdamW(module.parameters(), weight_decay=0.0),
        Samples(*train, seed=seed),
        batch=min(32, len(train[0])),
        loss=loss,
        schedule=cosine(steps, max(1, steps // 10), peak=rate, floor=0.0),
        clip=1.0,
        callbacks=[aqt],
    )
    trainer.run(steps)
    aqt.finish()


def _cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(first_tensor(module(batch[0])), batch[1])


# -- engines -----------------------------------------------------------------------------------------------------------


class _Runner(ABC):
    """Runs one format: pixels (B, C, H, W) -> logits (B, K)."""

    backend: str
    file: bytes | None = None
    bytes: int

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor: ...


class _Torch(_Runner):
    backend = "torch"

    def __init__(self, name: str, module: nn.Module, images: Tensor | None = None) -> None:
        self.module, self.dtype = module, torch.bfloat16 if name == "bf16" else None
        self.bytes = stored_bytes(module) // (2 if name == "bf16" else 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        with looking(self.module, self.dtype):
            return first_tensor(self.module(pixels)).float()


class _Onnx(_Runner):
    backend = "onnxruntime"

    def __init__(self, name: str, module: nn.Module, images: Tensor) -> None:
        import onnxruntime

        with TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            _export(_dense(module), images[:1], path)
            if name.startswith("int8"):
                path = _integers(path, images)
            self.file = path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
        self.bytes = len(self.file)

    def __call__(self, pixels: Tensor) -> Tensor:
        (logits, *_) = self.session.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(logits)


def _engine(backend: Backend) -> Callable[[str, nn.Module, Tensor], _Runner]:
    if backend not in ("auto", "onnxruntime", "torch"):
        raise OptionError(f"edge: backend = {backend!r}; give auto, onnxruntime or torch")
    there = all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))
    if backend == "onnxruntime" and not there:
        raise MissingExtraError(
            "edge: backend = 'onnxruntime' needs the packages onnxruntime and onnx; install pennyweight[export], or "
            "give backend = 'torch'"
        )
    return _Onnx if there and backend != "torch" else _Torch


def _dense(module: nn.Module) -> nn.Module:
    """A copy with plain layers of the values that compact ones stand for, and inputs as they come."""
    plain = copy.deepcopy(module)
    for one in anatomy.of(plain).layers():
        layer: Any = plain.get_submodule(one.path)
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            continue
        matrix, bias = layer.weight.dense().detach(), layer.bias
        made: Any
        if one.kind == "linear":
            made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
        else:
            made = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, bias is not None, layer.padding_mode,
            )  # fmt: skip
        made.weight = nn.Parameter(matrix.reshape(made.weight.shape))
        made.bias = bias
        plain.set_submodule(one.path, made)
    return plain.eval()


def _export(module: nn.Module, pixels: Tensor, path: Path) -> None:
    names = [f"output{index}" for index in range(_outputs(module, pixels))]
    with hushed():  # the exporter that torch now prefers needs a further package
        torch.onnx.export(
            module, (pixels,), str(path), input_names=["pixels"], output_names=names, dynamo=False, opset_version=17,
            dynamic_axes={"pixels": {0: "batch"}, **{name: {0: "batch"} for name in names}},
        )  # fmt: skip


def _outputs(module: nn.Module, pixels: Tensor) -> int:
    with looking(module):
        found = module(pixels)
    return len(found) if isinstance(found, (tuple, list)) else 1


def _integers(path: Path, images: Tensor) -> Path:
    """The network in 8-bit integers: weights of each channel, one range for an input, found on ``images``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(torch.split(images[:128], 1))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {"pixels": part.numpy()}

    made = path.with_name("int8.onnx")
    with hushed():
        quantize_static(
            str(path), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
    return made


# -- judging -----------------------------------------------------------------------------------------------------------


def _bind(runner: _Runner, frame: Tensor) -> Callable[[], Tensor]:
    return lambda: runner(frame)


def _right(runner: _Runner, heldout: tuple[Tensor, Tensor]) -> Tensor:
    """(B,) whether each image got its class."""
    found = torch.cat([runner(part) for part in torch.split(heldout[0], 64)])
    return found.argmax(1) == heldout[1]


def _measured(
    name: str, runner: _Runner, right: Tensor, labels: Tensor, classes: Sequence[str], floors: Sequence[Floor],
    seconds: Any, index: int, batch: int, fps: float | None,
) -> Measured:  # fmt: skip
    recall, lower, missed = {}, {}, []
    for label, title in enumerate(classes):
        mine = right[labels == label]
        recall[title] = float(mine.float().mean()) if len(mine) else float("nan")
    for floor in floors:
        mine = right if floor.label is None else right[labels == floor.label]
        if not len(mine):
            raise DataError(f"edge: no held-out image is of the class of {floor.text}; give some")
        lower[floor.text] = _lower(int(mine.sum()), len(mine))
        if lower[floor.text] < floor.bound:
            share = float(mine.float().mean())
            missed.append(f"{floor.text}: {share:.4g} of {len(mine)}, at least {lower[floor.text]:.4g} at 95 %")
    times = seconds[:, index]
    p50, p95 = (float(np.quantile(times, share)) for share in (0.5, 0.95))
    if fps is not None and batch / p95 < fps:
        missed.append(f"fps>={fps:g}: {batch / p95:.4g} (p95 {1e3 * p95:.3g} ms)")
    ratio = latency.comparison(seconds[:, [0, index]]).ratio
    return Measured(
        format=name, backend=runner.backend, accuracy=float(right.float().mean()), recall=recall, lower=lower,  # type: ignore[arg-type]
        p50_ms=1e3 * p50, p95_ms=1e3 * p95, fps=batch / p95, ratio=ratio, bytes=runner.bytes, missed=tuple(missed),
    )  # fmt: skip


def _lower(right: int, count: int) -> float:
    """The exact one-sided lower limit of a share (Clopper and Pearson)."""
    return float(beta.ppf(1 - _LEVEL, right, count - right + 1)) if right else 0.0


def _refusal(tried: Sequence[Measured]) -> str:
    nearest = min(tried, key=lambda one: (len(one.missed), -one.accuracy))
    return (
        f"edge: none of {', '.join(one.format for one in tried)} holds what is asked; the nearest, {nearest.format}, "
        f"misses {'; '.join(nearest.missed)}; relax that, give a smaller network, or more held-out images"
    )


def _fps(text: str | None) -> float | None:
    if text is None:
        return None
    found = _BUDGET.fullmatch(text)
    if found is None:
        raise OptionError(f"edge: budget {text!r} is none; give frames a second, as in 'fps>=15'")
    return float(found[1])


def _floor(text: str, classes: Sequence[str]) -> Floor:
    found = _FLOOR.fullmatch(text)
    if found is None:
        raise OptionError(f"edge: floor {text!r} is none; give 'accuracy>=0.9' or 'recall[{classes[0]}]>=95%'")
    title, number = found[2], float(found[3]) / (100 if found[4] else 1)
    if title is not None and title not in classes:
        raise OptionError(f"edge: floor {text!r}: no class is called {title!r}; there are {', '.join(classes)}")
    if not 0 < number < 1:
        raise OptionError(f"edge: floor {text!r}: a share lies between 0 and 1; give one such as 0.95 or 95%")
    return Floor(text, None if title is None else list(classes).index(title), number)


def _plain(one: Measured) -> dict[str, Any]:
    found = {key: value for key, value in vars(one).items() if key != "ratio"}
    return found | {"ratio": [one.ratio.value, one.ratio.low, one.ratio.high], "missed": list(one.missed)}
