"""Calibration: statistics of a model on data, and the walks that fit it."""

from pennyweight.calibrate.passage import Settled
from pennyweight.calibrate.stream import stream
from pennyweight.calibrate.walk import collect, walk

__all__ = ["Settled", "collect", "stream", "walk"]
