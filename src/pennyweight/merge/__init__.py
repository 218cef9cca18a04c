"""Several models as one: formulas that merge weights, files larger than memory, fusion, learned merges, ensembles.

``merge`` runs a recipe, `merge_tensors` merges state dicts, and the formulas are dataclasses: `Linear`, `Slerp`,
`TaskArithmetic`, `Ties`, `Dare`, `OTA`.
"""

from pennyweight.merge.dare import Dare
from pennyweight.merge.engine import Merged, merge_files, merge_tensors
from pennyweight.merge.formula import Formula
from pennyweight.merge.linear import Linear, TaskArithmetic
from pennyweight.merge.moments import compressed, read_moments, save_moments, second_moments
from pennyweight.merge.ota import OTA, ffg
from pennyweight.merge.recipe import FORMULAS, MergeRecipe, merge
from pennyweight.merge.slerp import Slerp
from pennyweight.merge.sources import Adapter, Memory, Shards, Source
from pennyweight.merge.ties import Ties
from pennyweight.train.ensembles import Ensemble, ensemble

__all__ = [
    "FORMULAS",
    "OTA",
    "Adapter",
    "Dare",
    "Ensemble",
    "Formula",
    "Linear",
    "Memory",
    "MergeRecipe",
    "Merged",
    "Shards",
    "Slerp",
    "Source",
    "TaskArithmetic",
    "Ties",
    "compressed",
    "ensemble",
    "ffg",
    "merge",
    "merge_files",
    "merge_tensors",
    "read_moments",
    "save_moments",
    "second_moments",
]
