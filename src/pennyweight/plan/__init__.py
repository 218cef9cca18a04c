"""From budget to recipe; bits for every layer; budgets of inference, augmentation, memory at a training length."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.plan.allocation import Allocation, Layers, bits, pareto
    from pennyweight.plan.augmentation_arms import Augmentation, augmentation
    from pennyweight.plan.cem import Choice, Search, Span, cross_entropy
    from pennyweight.plan.decoupled import metric_decoupled
    from pennyweight.plan.inference_budget import Stage, test_time
    from pennyweight.plan.memory_bits import bits_for_memory
    from pennyweight.plan.pretraining import TrainingPlan, training

_WHERE = {
    "Allocation": "allocation",
    "Augmentation": "augmentation_arms",
    "Choice": "cem",
    "Layers": "allocation",
    "Search": "cem",
    "Span": "cem",
    "Stage": "inference_budget",
    "TrainingPlan": "pretraining",
    "augmentation": "augmentation_arms",
    "bits": "allocation",
    "bits_for_memory": "memory_bits",
    "cross_entropy": "cem",
    "metric_decoupled": "decoupled",
    "pareto": "allocation",
    "test_time": "inference_budget",
    "training": "pretraining",
}

__all__ = [
    "Allocation",
    "Augmentation",
    "Choice",
    "Layers",
    "Search",
    "Span",
    "Stage",
    "TrainingPlan",
    "augmentation",
    "bits",
    "bits_for_memory",
    "cross_entropy",
    "metric_decoupled",
    "pareto",
    "plan",
    "test_time",
    "training",
]


def plan(model: Any = None, **options: Any) -> Any:
    """With a model: what a fit of it would do, cost and give. Without one: a plan for training, see `training`."""
    if model is None:
        from pennyweight.plan.pretraining import training

        return training(**options)
    from pennyweight.fit import fit

    return fit(model, dry_run=True, **options)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
