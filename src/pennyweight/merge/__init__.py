"""Several models as one: formulas that merge weights, files larger than memory, fusion, learned merges, ensembles.

``merge`` runs a recipe, `merge_tensors` merges state dicts, and the formulas are dataclasses: `Linear`, `Slerp`,
`TaskArithmetic`, `Ties`, `Dare`, `OTA`.
"""

from pennyweight.merge.dare import Dare
from pennyweight.merge.engine import Merged, merge_files, merge_tensors
from pennyweight.merge.expert import Learned, importance_chunks, merge_experts
from pennyweight.merge.formula import Formula
from pennyweight.merge.linear import Linear, TaskArithmetic
from pennyweight.merge.moments import compressed, read_moments, save_moments, second_moments
from pennyweight.merge.ota import OTA, ffg
from pennyweight.merge.recipe import FORMULAS, MergeRecipe, merge
from pennyweight.merge.slerp import Slerp
from pennyweight.merge.sources import Adapter, Memory, Shards, Source
from pennyweight.merge.study import METHODS, Study, study
from pennyweight.merge.ties import Ties
from pennyweight.merge.transport import fuse, transport
from pennyweight.merge.whole import Expert, Transport
from pennyweight.train.ensembles import Ensemble, ensemble

__all__ = [
    "FORMULAS",
    "METHODS",
    "OTA",
    "Adapter",
    "Dare",
    "Ensemble",
    "Expert",
    "Formula",
    "Learned",
    "Linear",
    "Memory",
    "MergeRecipe",
    "Merged",
    "Shards",
    "Slerp",
    "Source",
    "Study",
    "TaskArithmetic",
    "Ties",
    "Transport",
    "compressed",
    "ensemble",
    "ffg",
    "fuse",
    "importance_chunks",
    "merge",
    "merge_experts",
    "merge_files",
    "merge_tensors",
    "read_moments",
    "save_moments",
    "second_moments",
    "study",
    "transport",
]
