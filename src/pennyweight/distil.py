"""Students taught by larger models, by several, or by what they were before they were shrunk."""

from pennyweight.solvers.recovery import recover, states_of
from pennyweight.train.ensembles import from_ensemble

__all__ = ["from_ensemble", "recover", "states_of"]
