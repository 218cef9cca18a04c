"""Several models as one."""

from pennyweight.train.ensembles import Ensemble, ensemble

__all__ = ["Ensemble", "ensemble"]
