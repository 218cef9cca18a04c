"""Short for `pennyweight.evaluate`."""

from pennyweight.evaluate import Memorisation as Memorisation
from pennyweight.evaluate import memorisation as memorisation
from pennyweight.evaluate import memorization as memorization
