"""Merges as small YAML files, and the verb that runs them.

    pennyweight: 1
    merge: ties
    options: {density: 0.2}
    base: models/base
    models:
    - models/polite
    - {model: models/coder, weight: 0.7}
    - {model: models/base, adapter: adapters/italian}
    dtype: bfloat16
    skip: ['lm_head.*']
    shard: 4GB

A path is meant from where the recipe lies. ``ota`` takes second moments, too: ``{model: a, moments: a/moments}``.
``transport`` and ``expert`` load whole models and run them on texts; see `whole`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from pennyweight.errors import OptionError, RecipeError, UserError
from pennyweight.merge.dare import Dare
from pennyweight.merge.engine import DTYPES, Merged, merge_files
from pennyweight.merge.formula import Formula
from pennyweight.merge.linear import Linear, TaskArithmetic
from pennyweight.merge.moments import read_moments
from pennyweight.merge.ota import OTA
from pennyweight.merge.slerp import Slerp
from pennyweight.merge.sources import Adapter, Shards, Source
from pennyweight.merge.ties import Ties
from pennyweight.merge.whole import Expert, Transport
from pennyweight.model.loading import load
from pennyweight.model.saving import save
from pennyweight.recipe import load_yaml
from pennyweight.safe_write import check_free
from pennyweight.units import Quantity

#: What recipes can name: formulas of elements, which stream, and merges of whole models in memory.
FORMULAS: dict[str, type[Formula] | type[Transport] | type[Expert]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "ota": OTA,
    "transport": Transport,
    "expert": Expert,
}
_KEYS = ("pennyweight", "merge", "options", "base", "models", "dtype", "skip", "shard")
_MODEL_KEYS = ("model", "weight", "adapter", "moments")


@dataclass(frozen=True)
class MergeRecipe:
    """A merge, read and checked as far as can be without the files it names.

    Attributes:
        formula: with its options and weights, but without second moments.
        models: one mapping each: model, adapter, moments; absolute paths.
        base: directory, or None.
        dtype: of the result, or None.
        skip: patterns of tensors that are copied.
        shard_bytes: most bytes of a file, or None.
    """

    formula: Formula | Transport | Expert
    models: tuple[Mapping[str, Path], ...]
    base: Path | None
    dtype: torch.dtype | None
    skip: tuple[str, ...]
    shard_bytes: int | None

    @classmethod
    def read(cls, path: str | Path) -> MergeRecipe:
        """Read a file.

        Raises:
            RecipeError: a file that cannot be read, or that is not a merge.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}); give the path of a merge recipe") from None
        return cls.parse(text, home=path.parent, source=path.name)

    @classmethod
    def parse(cls, text: str, *, home: Path = Path(), source: str = "recipe") -> MergeRecipe:
        """Read YAML.

        Args:
            text: see the module.
            home: where its paths begin.
            source: what errors call it.

        Raises:
            RecipeError: not a merge, or options that its formula has not.
        """
        found = load_yaml(text, source)
        begun = isinstance(found, dict) and found.get("pennyweight")
        if begun != 1 or isinstance(begun, bool) or "merge" not in found:
            raise RecipeError(f"{source}: not a merge; it begins with `pennyweight: 1`, and has merge: and models:")
        _known(found, _KEYS, source)
        name = str(found["merge"])
        if name not in FORMULAS:
            near = get_close_matches(name, FORMULAS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMULAS)}"
            raise RecipeError(f"{source}: no merge is called {name!r}; {hint}")
        given = found.get("models") or []
        listed = given if isinstance(given, list) else []
        models = [one if isinstance(one, dict) else {"model": one} for one in listed]
        for one in models:
            _known(one, _MODEL_KEYS, f"{source}, models")
        if not models or not all(isinstance(one.get("model"), str) for one in models):
            raise RecipeError(f"{source}: models names none, or one without a model: key; give a list of directories")
        places = [("base", found.get("base")), *((k, one.get(k)) for one in models for k in ("adapter", "moments"))]
        for key, place in places:
            if place is not None and not isinstance(place, str):
                raise RecipeError(f"{source}: {key} is {place!r}; give a directory")
        options = found.get("options") or {}
        names = [f.name for f in dataclasses.fields(FORMULAS[name]) if f.metadata and f.name != "weights"]
        if not isinstance(options, dict):
            raise RecipeError(f"{source}: options is {options!r}; give a mapping, {{density: 0.2}}")
        _known(options, names, f"{source}, {name}")
        weights = [one.get("weight") for one in models]
        extra = [key for one in models for key in one if key != "model"]
        if extra and not issubclass(FORMULAS[name], Formula):
            raise RecipeError(f"{source}: {name} takes models only, and no {extra[0]} of them")
        if isinstance(options.get("texts"), list):
            options = options | {"texts": tuple(options["texts"])}
        if any(weight is not None for weight in weights):
            options = options | {"weights": tuple(1.0 if weight is None else weight for weight in weights)}
        dtype, skip, shard = found.get("dtype"), found.get("skip") or [], found.get("shard")
        if dtype is not None and str(dtype) not in DTYPES:
            raise RecipeError(f"{source}: dtype {dtype!r}; give one of {', '.join(DTYPES)}")
        if not isinstance(skip, list) or not all(isinstance(pattern, str) for pattern in skip):
            raise RecipeError(f"{source}: skip is {skip!r}; give a list of patterns")
        try:
            formula = FORMULAS[name](**options)
            shard_bytes = None if shard is None else int(Quantity.parse(str(shard), expect=("bytes",)).number)
        except UserError as error:
            raise RecipeError(f"{source}: {error}") from None
        return cls(
            formula=formula,
            models=tuple(
                {key: home / value for key, value in one.items() if key != "weight" and value is not None}
                for one in models
            ),
            base=None if found.get("base") is None else home / found["base"],
            dtype=None if dtype is None else DTYPES[str(dtype)],
            skip=tuple(skip),
            shard_bytes=shard_bytes,
        )

    def sources(self) -> tuple[list[Source], Source | None, Formula | Transport | Expert]:
        """The models, the base, and the formula with its second moments.

        Raises:
            ModelError: a directory that holds no such thing.
        """
        base = None if self.base is None else Shards(self.base)
        models: list[Source] = []
        for one in self.models:
            model: Source = Shards(one["model"])
            models.append(Adapter(model, one["adapter"]) if "adapter" in one else model)
        formula = self.formula
        given = [one["moments"] for one in self.models if "moments" in one]
        if isinstance(formula, OTA):
            formula = dataclasses.replace(formula, moments=tuple(read_moments(place) for place in given))
        elif given:
            raise OptionError(f"merge {type(formula).__name__.lower()}: takes no moments; merge: ota does")
        return models, base, formula


def merge(
    recipe: str | Path | MergeRecipe, *, out: str | Path, overwrite: bool = False, workers: int | None = None
) -> Merged:
    """Merge models as a recipe says; they may be larger than memory.

    Args:
        recipe: a file, or what `MergeRecipe.parse` made of a text.
        out: where the result goes; new or empty.
        overwrite: replace results that are there.
        workers: threads; None for one a core.

    Raises:
        RecipeError: not a merge.
        ModelError: models that cannot be read or do not fit each other.
        OptionError: options or a base that do not fit the formula.
        OutputError: ``out`` holds something, or cannot be written.
    """
    found = recipe if isinstance(recipe, MergeRecipe) else MergeRecipe.read(recipe)
    if not isinstance(found.formula, Formula):
        return _whole(found, found.formula, out, overwrite)
    models, base, formula = found.sources()
    assert isinstance(formula, Formula)
    return merge_files(
        formula,
        models,
        out,
        base=base,
        dtype=found.dtype,
        skip=found.skip,
        shard_bytes=found.shard_bytes,
        overwrite=overwrite,
        workers=workers,
    )


def _whole(found: MergeRecipe, formula: Transport | Expert, out: str | Path, overwrite: bool) -> Merged:
    if found.skip or found.shard_bytes:
        raise OptionError("merge: skip and shard are of merges that stream; leave them out")
    formula.check(len(found.models), base=found.base is not None)
    check_free(out, overwrite=overwrite)
    base = None if found.base is None else load(found.base)
    done = formula.into([load(one["model"]) for one in found.models], base)
    saved = save(done, out, dtype=found.dtype, overwrite=overwrite)
    return Merged(Path(out), len(list(done.module.named_parameters())), 0, saved.bytes)


def _known(found: Mapping[Any, Any], names: Any, where: str) -> None:
    for key in found:
        if key not in names:
            raise RecipeError(f"{where}: unknown key {key!r}; there are {', '.join(names)}")
