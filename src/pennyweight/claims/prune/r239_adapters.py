"""Row 239, structured pruning adapters: channels of a frozen source model go, and few learned numbers make up for it.

Not shown to the margin set before the run: with 7 % of the numbers they stand 6 points behind tuning all that stays.
A residual network that reads digits is taken to digits on their side with dark and light exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pennyweight.claims import Outcome, claim
from pennyweight.claims.assets import Assets
from pennyweight.claims.tiny import one_thread
from pennyweight.claims.vision import correct, digits, label_loss, train
from pennyweight.levers.prune.spa import Narrowing
from pennyweight.measure import stats
from pennyweight.solvers.structured_adapters import Kind, Shape, StructuredAdapters
from pennyweight.surgery import trace
from pennyweight.train import Samples, Trainer
from pennyweight.train.schedules import cosine
from pennyweight.train.sparsity_schedules import between_plateaus
from pennyweight.zoo.resnet import ResNet, ResNetConfig

_STEPS, _RATE, _SPARSITY, _RANK, _SEEDS = 300, 5e-3, 0.75, 4, (0, 1)


def _turned(images: Tensor) -> Tensor:
    return 1 - images.mT


def _adapted(source: nn.Module, kind: Kind, seed: int, *, gradual: bool = True) -> tuple[Tensor, int, float]:
    """Held-out digits right (597,), numbers learned, and the difference that surgery made."""
    images, labels, held, wanted = digits()
    module = copy.deepcopy(source)
    probe = [_turned(images[:4])]
    graph = trace(module, probe)
    convolutions = [path for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and path != "stem"]
    shape = Shape(kind=kind, rank=_RANK)
    adapters = StructuredAdapters(module, convolutions, graph, graph.of("channels"), shape, seed=seed)
    rest = [one for name, one in module.named_parameters() if one.ndim == 1 or name.startswith("head")]
    ramp = between_plateaus(_STEPS, _SPARSITY, before=0.1, after=0.4, intervals=10)
    Trainer(
        module, torch.optim.AdamW([*adapters.parameters, *rest], weight_decay=0.0),
        Samples(_turned(images), labels, seed=seed), batch=64, loss=label_loss,
        schedule=cosine(_STEPS, _STEPS // 10, peak=_RATE, floor=0.0), clip=1.0,
        callbacks=[Narrowing(adapters, ramp)] if gradual else [],
    ).run(_STEPS)  # fmt: skip
    module.eval()
    adapters.keep(1 - _SPARSITY)
    learned = adapters.learned()
    difference = adapters.finish(probe)
    return correct(module, _turned(held), wanted), learned, difference


@claim(row=239, pace="slow", headline="higher accuracy at 90 % pruned weights with few learned weights (abstract)")
@one_thread()
def adapters_that_are_pruned_with_their_channels_need_few_learned_numbers(assets: Assets) -> Outcome:
    """Three quarters of the channels inside blocks go; batch norms and the head are trained by all rivals."""
    source = train(ResNet(ResNetConfig(width=16), generator=torch.Generator().manual_seed(0)), steps=300)
    before = float(correct(source, _turned(digits()[2]), digits()[3]).mean())

    def runs(kind: Kind, seeds: Sequence[int] = _SEEDS, *, gradual: bool = True) -> tuple[Tensor, int, float]:
        found = [_adapted(source, kind, seed, gradual=gradual) for seed in seeds]
        return torch.stack([one[0] for one in found]).mean(0), found[0][1], max(one[2] for one in found)

    splora, learned, exact = runs("splora")
    tuned, whole, _ = runs("none")
    late, _, _ = runs("splora", gradual=False)
    splopa, blocks, _ = runs("splopa", _SEEDS[:1])
    behind = stats.paired_difference(tuned, splora)
    method, baseline, control = (float(one.mean()) for one in (splora, tuned, late))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="share of held-out digits right, three quarters of the channels gone",
        lower_is_better=False,
        holds=learned <= 0.1 * whole and behind.low > -0.05 and method > control + 0.02 and method > before + 0.2,
        control=("the same adapters, channels cut at once after training", control),
        interval=(baseline + behind.low, baseline + behind.high),
        notes=(
            f"learned in convolutions: {learned} numbers, {whole} by tuning what stays; shrunk and masked outputs "
            f"differ by {exact:.1e}; prototypes in blocks: {float(splopa.mean()):.3f} with {blocks}; "
            f"the source itself: {before:.3f}"
        ),
    )
