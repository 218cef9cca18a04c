"""What the processes of `test_train_loop.py` run under ``torchrun``: `python train_processes.py OUT` trains and saves.

Not a test: each process trains its share of the joined batch, and the first writes the weights. With ``sharded`` as a
second word each holds its share of the weights, too.
"""

import gc
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pennyweight.levers.prune.gradual import GradualPruning
from pennyweight.model import safetensors_file
from pennyweight.train import Samples, Trainer, processes, sharded, whole
from pennyweight.train.schedules import wsd
from pennyweight.train.sparsity_schedules import CubicSchedule


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=generator)
    return module


def trainer(module: nn.Module, *, pruned: bool = True) -> Trainer:
    generator = torch.Generator().manual_seed(4)
    rows, labels = torch.randn(50, 6, generator=generator).double(), torch.randint(3, (50,), generator=generator)
    ramp = CubicSchedule(final=0.5, start=2, end=6, every=2)
    return Trainer(
        module,
        torch.optim.AdamW(module.parameters(), lr=0.0),
        Samples(rows, labels),
        batch=12,
        micro_batch=4,
        loss=lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
        schedule=wsd(8, 2, 0.25, "linear", peak=0.05),
        clip=0.5,
        callbacks=[GradualPruning([module[0]], ramp)] if pruned else [],
    )


def main(out: Path) -> None:
    with processes("gloo") as rank:
        module = network()
        run = trainer(module)
        losses = run.run(5)
        run.save(out / "checkpoint")
        losses += run.run(8)
        if rank == 0:
            weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
            safetensors_file.write(
                out / "final.safetensors", weights | {"losses": torch.tensor(losses, dtype=torch.float64)}
            )
        fresh = trainer(network())
        fresh.resume(out / "checkpoint")
        fresh.run(8)
        for name, tensor in fresh.module.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name]), name
        if rank == 0:
            (out / "resumed").touch()
        assert any(type(one) is DistributedDataParallel for one in gc.get_objects())
    # what holds the group is gone with it, though the trainers live on
    assert not any(type(one) is DistributedDataParallel for one in gc.get_objects())
    assert run.steps == fresh.steps == 8


def main_sharded(out: Path) -> None:
    with processes("gloo") as rank:
        module = sharded(network())
        run = trainer(module, pruned=False)
        losses = run.run(5)
        run.save(out / "checkpoint")
        losses += run.run(8)
        # a process holds half of every weight and of its moments
        for weight in module.parameters():
            assert 2 * weight.to_local().numel() <= weight.numel() + weight.numel() // weight.shape[0]
            assert run.optimizer.state[weight]["exp_avg"].to_local().shape == weight.to_local().shape
        ended = whole(module.state_dict())
        if rank == 0:
            safetensors_file.write(
                out / "final.safetensors", ended | {"losses": torch.tensor(losses, dtype=torch.float64)}
            )
        fresh = trainer(sharded(network()), pruned=False)
        fresh.resume(out / "checkpoint")
        fresh.run(8)
        for name, tensor in whole(fresh.module.state_dict()).items():
            assert torch.equal(tensor, ended[name]), name
        if rank == 0:
            (out / "resumed").touch()


if __name__ == "__main__":
    (main_sharded if sys.argv[2:] == ["sharded"] else main)(Path(sys.argv[1]))
