"""Energy: the processor's own counters where they can be read, else a stated model.

Counters: the running average power limit (RAPL) interface of Linux, ``/sys/class/powercap``: the processor packages
and, where it is counted apart, the memory. Reading them needs permission on most systems. The energy of other programs
is counted along, so measure on a quiet machine.

Model: an energy for each FLOP and each byte moved. Source of the constants: M. Horowitz, "Computing's energy problem
(and what we can do about it)", ISSCC 2014, 45 nm: a 32-bit multiplication 3.7 pJ and addition 0.9 pJ, a 32-bit word
from DRAM 640 pJ. They leave out all control and idle power: good to compare, far too low for a bill. `dot_product` goes
by his table of single operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from pennyweight.errors import OptionError

POWERCAP = Path("/sys/class/powercap")


#: Picojoules of one operation at 45 nm, 0.9 V: (multiplication, addition). Source: Horowitz, as above, figure 1.1.9.
OPERATIONS = {"int8": (0.2, 0.03), "int32": (3.1, 0.1), "fp16": (1.1, 0.4), "fp32": (3.7, 0.9)}


@dataclass(frozen=True)
class Assumptions:
    """The constants of the model.

    Attributes:
        joules_per_flop: half a multiplication and half an addition of 32 bits.
        joules_per_byte: a quarter of a 32-bit word from memory.
        idle_watts: drawn whatever is computed.
    """

    joules_per_flop: float = (3.7e-12 + 0.9e-12) / 2
    joules_per_byte: float = 640e-12 / 4
    idle_watts: float = 0.0


@dataclass(frozen=True)
class Energy:
    """Energy, and where the figure comes from.

    Attributes:
        joules: used.
        seconds: it took; None where nothing was run.
        source: "RAPL: package-0 + dram", or the model with its constants.
    """

    joules: float
    seconds: float | None
    source: str


@dataclass(frozen=True)
class Counter:
    """One energy counter.

    Attributes:
        name: "package-0", "dram", ...
        path: the file that counts microjoules.
        range: at which it starts over.
    """

    name: str
    path: Path
    range: int

    def read(self) -> int:
        """Microjoules so far."""
        return int(self.path.read_text())


def counters(root: Path = POWERCAP) -> tuple[Counter, ...]:
    """The counters that can be read and do not contain each other; empty where there are none."""
    return tuple(sorted(_readable(root), key=lambda counter: counter.name))


def _readable(root: Path) -> Iterator[Counter]:
    for folder in root.glob("intel-rapl:*") if root.is_dir() else ():
        try:
            name = (folder / "name").read_text().strip()
            # cores lie inside a package, "psys" is all of the machine, "intel-rapl-mmio" counts packages again
            if name.startswith("package") or name == "dram":
                found = Counter(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
                found.read()
                yield found
        except (OSError, ValueError):  # only root may read it, or it went away
            continue


def measure(fn: Callable[[], Any], *, root: Path = POWERCAP) -> Energy | None:
    """The energy of the processor while ``fn()`` runs; None where no counter can be read.

    A counter that starts over once is understood; at 100 W that happens every 45 minutes, so keep runs shorter.
    """
    found = counters(root)
    if not found:
        return None
    before, start = [counter.read() for counter in found], perf_counter()
    fn()
    seconds, after = perf_counter() - start, [counter.read() for counter in found]
    used = sum(
        late - early if late >= early else late - early + counter.range
        for counter, early, late in zip(found, before, after, strict=True)
    )
    return Energy(1e-6 * used, seconds, "RAPL: " + " + ".join(counter.name for counter in found))


def dot_product(multiplications: float, *, product: str = "fp32", sums: str = "fp32") -> Energy:
    """The energy of so many multiplications, each added to a sum, by `OPERATIONS`; nothing is moved.

    Args:
        multiplications: of a matrix product half its FLOPs.
        product: "int8", "int32", "fp16", "fp32", or "l_mul" (`pennyweight.weights.l_mul`): an addition of 32-bit whole
            numbers in place of the multiplication.
        sums: what they are added in; "none" leaves the additions out, for products entry by entry.

    Raises:
        OptionError: an operation that the table does not have.
    """
    if product not in (*OPERATIONS, "l_mul") or sums not in (*OPERATIONS, "none"):
        raise OptionError(f"energy: product {product!r}, sums {sums!r}; the table has {', '.join(OPERATIONS)}")
    times = OPERATIONS["int32"][1] if product == "l_mul" else OPERATIONS[product][0]
    plus = 0.0 if sums == "none" else OPERATIONS[sums][1]
    source = f"model: {times:g} pJ a product ({product}), {plus:g} pJ a sum ({sums})"
    return Energy(multiplications * (times + plus) * 1e-12, None, source)


def model(
    flops: float, moved_bytes: float, *, seconds: float | None = None, assumptions: Assumptions | None = None
) -> Energy:
    """The energy that ``flops`` and ``moved_bytes`` take under ``assumptions``.

    Args:
        flops: computed.
        moved_bytes: from and to memory.
        seconds: it takes; needed where idle power is assumed.
        assumptions: the constants; those of the module's source by default.
    """
    constants = assumptions or Assumptions()
    if constants.idle_watts and seconds is None:
        raise OptionError("energy: idle power counts by the second; give seconds=...")
    joules = flops * constants.joules_per_flop + moved_bytes * constants.joules_per_byte
    source = f"model: {constants.joules_per_flop * 1e12:g} pJ a FLOP, {constants.joules_per_byte * 1e12:g} pJ a byte"
    if constants.idle_watts:
        source += f", {constants.idle_watts:g} W idle"
    return Energy(joules + constants.idle_watts * (seconds or 0.0), seconds, source)
