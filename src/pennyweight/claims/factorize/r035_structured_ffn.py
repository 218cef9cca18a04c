"""Row 35, structured FFNs: a dense guide that fades out trains them better; merged, they answer one token faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import gpt, held_out_losses, one_thread, trainer
from pennyweight.levers.factorize.structured_ffn import Kind, StructuredFFN
from pennyweight.model import anatomy
from pennyweight.train.guided import SelfGuided
from pennyweight.train.schedules import cosine

_HEADLINE = "2.5x as fast FFNs at 32 % of their parameters, 0.4 perplexity worse at equal training FLOPs (repository)"
_STEPS, _BATCH, _WIDTH = 240, 16, 64
_KINDS: tuple[tuple[Kind, int | None, int], ...] = (
    ("low_rank", 16, 1),  # all 31 % of the matrices
    ("block_shuffle", None, 4),
    ("block_dense", 20, 2),
)


def _structured(kind: Kind, rank: int | None, blocks: int, seed: int) -> tuple[nn.Module, list[str]]:
    """A GPT of bytes with random structured FFNs in all blocks but the first, and the paths of these layers."""
    module = gpt(width=_WIDTH, depth=3, seed=seed)
    return module, list(_put_in(module, StructuredFFN(kind=kind, rank=rank, blocks=blocks, start="random"), seed))


def _put_in(module: nn.Module, lever: StructuredFFN, seed: int) -> dict[str, Tensor]:
    """Structured FFNs in all blocks but the first; the matrices that were there, by path."""
    generator = torch.Generator().manual_seed(seed)
    layers = [one for one in anatomy.of(module).layers() if one.role.startswith("ffn.") and one.block]
    matrices = {one.path: anatomy.matrix(module, one).clone() for one in layers}
    for path, matrix in matrices.items():
        anatomy.replace(module, path, lever.structured(matrix, generator, path))
    return matrices


def _loss(module: nn.Module, guided: SelfGuided | None, steps: int = _STEPS) -> float:
    """Nats a byte after training."""
    callbacks = [] if guided is None else [guided]
    trainer(module, cosine(steps, 20, peak=5e-3), batch=_BATCH, callbacks=callbacks).run(steps)
    if guided is not None:
        guided.finish()
    return float(held_out_losses(module).mean())


@claim(row=35, pace="slow", headline=_HEADLINE)
def a_fading_dense_guide_trains_structured_layers_better(assets: Assets) -> Outcome:
    """A GPT of bytes, three kinds of layers at 31 %, two seeds, 240 steps; control: an eighth more steps, no guide."""
    guided_, plain, longer, dense = [], [], [], []
    notes = []
    with one_thread():
        for seed in (0, 1):
            dense.append(_loss(gpt(width=_WIDTH, depth=3, seed=seed), None))
        for kind, rank, blocks in _KINDS:
            for seed in (0, 1):
                module, paths = _structured(kind, rank, blocks, seed)
                guided_.append(_loss(module, SelfGuided(module, paths, steps=_STEPS)))
                plain.append(_loss(_structured(kind, rank, blocks, seed)[0], None))
                # what guides cost: half the FFN's FLOPs, at most, in half the steps
                longer.append(_loss(_structured(kind, rank, blocks, seed)[0], None, _STEPS * 9 // 8))
            notes.append(f"{kind} {sum(guided_[-2:]) / 2:.4g}, unguided {sum(plain[-2:]) / 2:.4g}")
    method, baseline, control, whole = (sum(found) / len(found) for found in (guided_, plain, longer, dense))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="nats a byte after 240 steps, held out, mean over kinds and seeds",
        holds=method < baseline - 0.005 and whole < method,
        control=("no guide, an eighth more steps", control),
        notes=f"dense {whole:.4g}; " + "; ".join(notes),
    )


@claim(row=35, pace="slow", headline=_HEADLINE)
def a_trained_model_fades_into_its_structured_one(assets: Assets) -> Outcome:
    """A trained GPT of bytes, 120 steps, two seeds, guides its own matrices; control: no training."""
    guided_, plain, untrained, whole = [], [], [], []
    with one_thread():
        for seed in (0, 1):
            module = gpt(width=_WIDTH, depth=3, seed=seed)
            whole.append(_loss(module, None))
            for kind, rank, blocks in _KINDS:
                student = copy.deepcopy(module)
                guides = _put_in(student, StructuredFFN(kind=kind, rank=rank, blocks=blocks), seed)
                untrained.append(float(held_out_losses(student).mean()))
                other = copy.deepcopy(student)
                guided = SelfGuided(student, list(guides), steps=_STEPS // 2, guides=guides)
                guided_.append(_loss(student, guided, _STEPS // 2))
                plain.append(_loss(other, None, _STEPS // 2))
    method, baseline, control, before = (sum(found) / len(found) for found in (guided_, plain, untrained, whole))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="nats a byte after 120 steps of recovery, held out, mean over kinds and seeds",
        holds=method < baseline - 0.01,
        control=("nearest factors, no training", control),
        notes=f"the original {before:.4g}, which these steps train further; baseline: no guides",
    )
