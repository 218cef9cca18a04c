"""A training loop: accumulation, clipping, bfloat16, schedules, several processes, and resuming to the last bit.

Plain PyTorch underneath: any `torch.optim.Optimizer`, ``DistributedDataParallel`` under ``torchrun``, or FSDP2 for a
module that was dealt out (`pennyweight.train.sharded`). What to do between steps is the caller's: ``run`` to a step,
look, and ``run`` on.

Shape letters: B samples in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pennyweight.errors import ModelError, OptionError, ShapeError
from pennyweight.evaluate.forward import native_dtype
from pennyweight.train import checkpoint
from pennyweight.train.distributed import at_parting, is_sharded, rank, world
from pennyweight.train.samples import Batch, Stream
from pennyweight.train.schedules import Schedule

#: The mean loss over samples of a batch: called with the model and some of the batch, on the model's device.
Loss = Callable[[nn.Module, Batch], Tensor]


class Callback(Protocol):
    """Called once after each step of the optimizer, such as `levers.prune.gradual.GradualPruning`.

    One with a ``state_dict`` and ``load_state_dict`` of plain numbers and texts is saved and resumed with the rest.
    """

    def step(self) -> object:
        """What to do after a step."""
        ...


class Trainer:
    """Trains ``module`` in place, one batch a step.

        rate = wsd(total=1000, warmup=50, peak=3e-3)
        trainer = Trainer(model, AdamW(model.parameters()), Samples(windows), batch=32, schedule=rate)
        trainer.run(500)
        trainer.save("half-way")
        trainer.run(1000)

    Args:
        module: to train; its parameters stay the objects they are. One that processes are to share is dealt out before
            its optimizer is made: ``sharded(module)``.
        optimizer: of its parameters.
        stream: of samples; see `Samples`, `two_stage`.
        batch: samples a step, over all processes.
        micro_batch: samples run at once in a process, to bound memory; None for all of its share. The step is the same
            but for rounding, if the loss is a mean over samples.
        loss: of the model and some samples; it has to call the module it is given, not a part of it.
        schedule: rate of each group, times the group's ``lr_scale`` (1 where there is none); it is asked with the steps
            or tokens done, those of the step itself included. None leaves rates as they are.
        clip: largest norm of the gradient.
        dtype: bfloat16 for autocast, "auto" for that where the device is made for it, None for the weights' own.
        callbacks: called after each step, in order.

    Attributes:
        steps: done.
        samples: seen by all processes; where the stream goes on.
        tokens: seen: numbers in the first tensor of the samples.

    Raises:
        OptionError: a batch that processes do not divide, or options outside their ranges.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        stream: Stream,
        *,
        batch: int,
        micro_batch: int | None = None,
        loss: Loss | None = None,
        schedule: Schedule | None = None,
        clip: float | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if batch < 1 or batch % world():
            raise OptionError(f"train: a batch of {batch} over {world()} processes; give a multiple of {world()}")
        if (micro_batch is not None and micro_batch < 1) or (clip is not None and not clip > 0):
            raise OptionError(f"train: micro_batch = {micro_batch}, clip = {clip}; give positive numbers")
        if dtype not in (None, "auto", torch.bfloat16):
            raise OptionError(f"train: dtype {dtype}; give bfloat16, 'auto' or None (float16 needs its loss scaled)")
        self.module, self.optimizer, self.stream, self.batch = module, optimizer, stream, batch
        self.micro_batch = min(micro_batch or batch, batch // world())
        self.loss, self.schedule, self.clip, self.callbacks = loss or next_token_loss, schedule, clip, tuple(callbacks)
        self.device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        lower = dtype == torch.bfloat16 or (dtype == "auto" and native_dtype(self.device.type) == torch.bfloat16)
        self.dtype = torch.bfloat16 if lower else None
        self.steps = self.samples = self.tokens = 0
        self._called: nn.Module = module
        self._sharded = is_sharded(module)
        if world() > 1 and not self._sharded:
            self._called = DistributedDataParallel(module)
            at_parting(self._alone)
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        optimizer.zero_grad(set_to_none=True)

    def run(
        self,
        until: int,
        *,
        save_to: str | Path | None = None,
        every: int | None = None,
        report: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train until ``until`` steps are done in all; the loss of each step taken.

        Args:
            until: steps, counted from the very first.
            save_to: directory of the checkpoint, written anew each time.
            every: steps between two checkpoints; None for one at the end.
            report: called with the steps done and the loss.

        Raises:
            ModelError: a loss that is not finite; weights are those before it.
            OutputError: the checkpoint cannot be written.
        """
        losses = []
        while self.steps < until:
            losses.append(self.step())
            if report is not None:
                report(self.steps, losses[-1])
            if save_to is not None and (self.steps == until or (every is not None and self.steps % every == 0)):
                self.save(save_to)
        return losses

    def step(self) -> float:
        """Take one step; the loss of its batch before it, over all processes."""
        if not self.module.training:
            self.module.train()
        share = self.batch // world()
        batch = self.stream.take(self.samples + rank() * share, share)
        parts = []
        for start in range(0, share, self.micro_batch):
            part = tuple(tensor[start : start + self.micro_batch].to(self.device) for tensor in batch)
            with self._waiting(start + self.micro_batch < share):
                with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
                    found = self.loss(self._called, part)
                if found.ndim:
                    raise ShapeError(f"train: the loss has shape {tuple(found.shape)}; return its mean, one number")
                found = found * (len(part[0]) / share)
                found.backward()  # type: ignore[no-untyped-call]
            parts.append(found.detach())
        loss = torch.stack(parts).sum()
        if world() > 1:
            dist.all_reduce(loss)
            loss /= world()
        if not math.isfinite(value := float(loss)):
            self.optimizer.zero_grad(set_to_none=True)
            raise ModelError(
                f"train: the loss of step {self.steps + 1} is {value}; lower the learning rate, clip gradients, or "
                "look for broken samples"
            )
        self._update(tokens=batch[0].numel() * world())
        return value

    def _update(self, tokens: int) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self._weights, self.clip)
        self.steps, self.samples, self.tokens = self.steps + 1, self.samples + self.batch, self.tokens + tokens
        if self.schedule is not None:
            rate = self.schedule(self.tokens if self.schedule.unit == "tokens" else self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for callback in self.callbacks:
            callback.step()

    def _alone(self) -> None:
        self._called = self.module

    def _waiting(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over processes once a step, with those of the last part."""
        if self._sharded:
            self.module.set_requires_gradient_sync(not more)  # type: ignore[operator]  # of FSDPModule
            return nullcontext()
        return self._called.no_sync() if more and isinstance(self._called, DistributedDataParallel) else nullcontext()

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint in one step: safetensors and JSON. All processes call it; the first one writes.

        Raises:
            OutputError: a place that cannot be written, or that holds other files.
            OptionError: a state of the optimizer or a callback that is neither tensors nor plain values.
        """
        place = {"steps": self.steps, "samples": self.samples, "tokens": self.tokens}
        checkpoint.save(Path(directory), self.module, self.optimizer, self.callbacks, place)

    def resume(self, directory: str | Path, *, exact: bool = True) -> None:
        """Go on from a checkpoint: the same numbers to the last bit as a run that never stopped.

        Module, optimizer and callbacks are to be made as they were; the schedule may be another one, which is how a
        decay branches off a stable run.

        Args:
            directory: what `save` wrote.
            exact: False goes on with another number of processes too, dropout then drawing new numbers.

        Raises:
            ModelError: no checkpoint, a damaged one, or one of another model, optimizer or number of processes.
        """
        place = checkpoint.load(Path(directory), self.module, self.optimizer, self.callbacks, exact=exact)
        self.steps, self.samples, self.tokens = place["steps"], place["samples"], place["tokens"]


def next_token_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The mean loss in nats of each token after the first of its window: of a causal language model on (B, T) ids."""
    ids = batch[0]
    output = module(ids[:, :-1])
    logits = output if isinstance(output, Tensor) else output.logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
