"""Receipts: what a fit was asked, what it did, and what came out, so that anyone can check it again.

``receipt.json`` names the model, the data and the recipe by hash; it holds every figure before and after with its
interval, what was predicted beside what was measured, the certificate of the solver, the verdict of the floor, and each
written file with its bytes and hash. What differs from run to run without changing the result (times, memory, the
machine) lies in ``run``; `evidence_sha256` is the hash of everything else.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pennyweight.errors import UserError
from pennyweight.safe_write import write_text

FORMAT: Final = 1
NAME = "receipt.json"
_LARGEST_BYTES = 100_000_000
_PACKAGES = ("pennyweight", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


class _Part(BaseModel):
    # infinities are figures too (a perplexity that overflows): JSON has no word for them, so they are written as text
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Source(_Part):
    """The model that was fitted."""

    name: str
    sha256: str = Field(description="over names and bytes of all tensors: `Model.fingerprint`")
    kind: str
    params: int = Field(ge=0, description="distinct parameters, tied ones once")
    bf16_bytes: int = Field(ge=0, description="what a budget in percent is a share of")


class Data(_Part):
    """The data that a fit calibrated and judged on."""

    name: str
    sha256: str = Field(description="over the token windows, calibration before held-out")
    calibration_tokens: int = Field(ge=0)
    heldout_tokens: int = Field(ge=0)
    window: int = Field(ge=0, description="tokens of a window; what intervals resample")


class Request(_Part):
    """What was asked, in the words it was asked in."""

    budgets: tuple[str, ...] = ()
    floor: str | None = None
    levers: str | None = None
    time: str | None = None
    repair: bool = False
    target: str | None = None


class Estimate(_Part):
    """A figure and its confidence interval; ``low`` and ``high`` are None where the figure is exact."""

    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    n: int | None = Field(default=None, description="independent samples behind it")

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.5g}"
        return f"{self.value:.5g} [{self.low:.5g}, {self.high:.5g}]"


class Figure(_Part):
    """One measurement, before and after, on the same data."""

    name: str
    unit: str
    before: Estimate | None
    after: Estimate
    ratio: Estimate | None = Field(default=None, description="after over before, paired")
    predicted: float | None = Field(default=None, description="what the plan said `after` would be")
    lower_is_better: bool = True


class BudgetLine(_Part):
    """A budget, what was allowed, and what was spent; in bytes these are exact integers."""

    asked: str
    resource: str
    allowed: int | float
    spent: int | float
    predicted: int | float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is kept: one byte over is a failure."""
        return self.spent <= self.allowed


class FloorLine(_Part):
    """The floor, and the verdict of the one-sided non-inferiority test on it."""

    asked: str
    holds: bool
    value: float = Field(description="the figure, or its ratio to the original")
    upper: float = Field(description="its one-sided 95 % limit on the bad side")
    limit: float
    p_value: float = Field(ge=0, le=1)
    n: int = Field(ge=0, description="windows")
    detectable: float = Field(description="smallest distance to the limit this many windows show with 80 % power")


class Certificate(_Part):
    """What the solver proved of the plan."""

    solver: str
    status: str
    objective: float = Field(description="predicted damage in nats a token")
    bound: float = Field(description="no plan over the same candidates has less")
    gap: float = Field(description="(objective - bound) / objective; 0 is proved optimal")
    binds: tuple[str, ...] = Field(default=(), description="the budgets that keep the plan from being better")
    relaxing: dict[str, float] = Field(default={}, description="nats bought by 1 % more of each budget that binds")
    choices: int = Field(ge=0, description="candidates offered, over all maps")
    rounds: int = Field(default=1, ge=0, description="plans solved, measured and rescaled")


class FileLine(_Part):
    """A written file."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> FileLine:
        """The line of the file at ``path``."""
        path, digest = Path(path), hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return cls(name=path.name, bytes=path.stat().st_size, sha256=digest.hexdigest())


class StageLine(_Part):
    """What one stage of the run took."""

    name: str
    seconds: float = Field(ge=0)
    peak_bytes: int | None = Field(default=None, ge=0, description="peak resident memory of the process by its end")
    predicted_seconds: float | None = None
    resumed: bool = Field(default=False, description="whether its work came out of the journal")


class Machine(_Part):
    """Where it ran."""

    processor: str
    threads: int
    memory_bytes: int
    system: str

    @classmethod
    def here(cls, *, threads: int) -> Machine:
        """This machine, computing with ``threads`` threads."""
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not a POSIX system
            memory = 0
        return cls(processor=_processor(), threads=threads, memory_bytes=memory, system=platform.platform())


class Run(_Part):
    """What differs from run to run without changing the result."""

    finished: str = Field(description="UTC, ISO 8601")
    machine: Machine
    stages: tuple[StageLine, ...] = ()

    @classmethod
    def now(cls, machine: Machine, stages: Iterable[StageLine] = ()) -> Run:
        """A run that ends now."""
        return cls(finished=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine, stages=tuple(stages))


class Receipt(_Part):
    """The receipt of one fit; see the module's text."""

    pennyweight: Literal[1] = FORMAT
    model: Source
    data: Data | None
    recipe_sha256: str
    request: Request
    seeds: dict[str, int]
    versions: dict[str, str]
    figures: tuple[Figure, ...]
    budgets: tuple[BudgetLine, ...] = ()
    floor: FloorLine | None = None
    certificate: Certificate | None = None
    files: tuple[FileLine, ...]
    notes: tuple[str, ...] = Field(default=(), description="what a reader must know: fallbacks taken, ties, limits")
    run: Run

    @property
    def holds(self) -> bool:
        """Whether every budget and the floor hold."""
        return all(line.holds for line in self.budgets) and (self.floor is None or self.floor.holds)

    @property
    def evidence_sha256(self) -> str:
        """Hash of everything but ``run``: equal for an uninterrupted run and one that was killed and resumed."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"run"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def figure(self, name: str) -> Figure | None:
        """The figure called ``name``, or None."""
        return next((figure for figure in self.figures if figure.name == name), None)

    def text(self) -> str:
        """The receipt as JSON, indented."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, directory: str | Path) -> None:
        """Write ``receipt.json`` into ``directory``, atomically.

        Raises:
            OutputError: a place that cannot be written.
        """
        write_text(Path(directory) / NAME, self.text())

    @classmethod
    def parse(cls, text: str | bytes, *, source: str = NAME) -> Receipt:
        """Read JSON.

        Raises:
            UserError: text that is not a receipt; the message names the first part that is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = " ".join(f"{place}: {first['msg']}".split()) if place else " ".join(first["msg"].split())
            raise UserError(
                f"{source}: not a receipt of format {FORMAT} ({_printable(reason)[:200]}); give the directory of a "
                "fit, or fit again"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Receipt:
        """Read a file, or the ``receipt.json`` of a directory.

        Raises:
            UserError: nothing there, or not a receipt.
        """
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a receipt")
            return cls.parse(path.read_bytes(), source=str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give the directory of a fit") from None

    def differences(self, directory: str | Path) -> list[str]:
        """What in ``directory`` is not as the receipt says, a line each; empty when every file is byte-identical."""
        found = []
        for line in self.files:
            path = Path(directory) / line.name
            if path.name != line.name or not path.is_file():
                found.append(f"{line.name}: missing")
            elif (size := path.stat().st_size) != line.bytes:
                found.append(f"{line.name}: {size} bytes where the receipt says {line.bytes}")
            elif FileLine.of(path).sha256 != line.sha256:
                found.append(f"{line.name}: other content than the receipt's (SHA-256 differs)")
        return found


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
