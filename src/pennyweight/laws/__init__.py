"""Scaling laws: forms, one robust fitter, optima, accounting, and the published laws, each with its receipt.

``registry()`` lists the forms, ``fit`` and ``fit_csv`` fit one, ``law`` makes one from known constants, and
``predict_receipt`` is one prediction with everything said about it. Imports NumPy and SciPy, never torch.
"""

from pennyweight.laws import (
    average,
    bench,
    cod,
    curves,
    datastore,
    dcpt,
    density,
    flops,
    forms,
    henighan,
    hparams,
    infinite,
    lr,
    minicpm,
    optimal,
    published,
    qat,
    slopes,
    synthetic,
    trajectory,
    vocab,
)
from pennyweight.laws.average import average_params, fit_sparse
from pennyweight.laws.bit_level import fit_bit_level
from pennyweight.laws.catalog import Card, predict_receipt, registry, show
from pennyweight.laws.fitter import fit, fit_csv
from pennyweight.laws.henighan import entropy_estimate, nopt, size_for_kl
from pennyweight.laws.infinite import asymptote, data_efficiency
from pennyweight.laws.jumps import discontinuity
from pennyweight.laws.law import Law, LawReceipt, Prediction, law
from pennyweight.laws.minicpm import batch_by_loss, fit_from_wsd
from pennyweight.laws.qat import fit_qat, qat_fraction
from pennyweight.laws.slopes import compare_slopes
from pennyweight.laws.synthetic import tokens_to_plateau
from pennyweight.measure.kernel_theory import width_is_free

__all__ = [
    "Card",
    "Law",
    "LawReceipt",
    "Prediction",
    "asymptote",
    "average",
    "average_params",
    "batch_by_loss",
    "bench",
    "bit_level",
    "cod",
    "compare_slopes",
    "curves",
    "data_efficiency",
    "datastore",
    "dcpt",
    "density",
    "discontinuity",
    "entropy_estimate",
    "fit",
    "fit_bit_level",
    "fit_csv",
    "fit_from_wsd",
    "fit_qat",
    "fit_sparse",
    "flops",
    "forms",
    "henighan",
    "hparams",
    "infinite",
    "law",
    "lr",
    "minicpm",
    "nopt",
    "optimal",
    "predict_receipt",
    "published",
    "qat",
    "qat_fraction",
    "registry",
    "show",
    "size_for_kl",
    "slopes",
    "synthetic",
    "tokens_to_plateau",
    "trajectory",
    "vocab",
    "width_is_free",
]
