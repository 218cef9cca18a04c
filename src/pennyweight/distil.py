"""Students taught by larger models or by several."""

from pennyweight.train.ensembles import from_ensemble

__all__ = ["from_ensemble"]
