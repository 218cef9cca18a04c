"""The report of a fit: one self-contained page.

`write` makes it from a `ReportData` of plain numbers and strings: no network, no script, one file that reads the same
in ten years. Light and dark, wide and narrow, on paper, and by a screen reader.
"""

from pennyweight.report.data import Cell, Figure, Measure, Point, Prediction, ReportData, Sample, Step
from pennyweight.report.page import page, write

__all__ = [
    "Cell",
    "Figure",
    "Measure",
    "Point",
    "Prediction",
    "ReportData",
    "Sample",
    "Step",
    "page",
    "write",
]
