"""Pennyweight: fit any model to a budget, and prove it.

The verbs (`fit`, `measure`, `plan`, ...) and the rooms of the house are looked up on first use, so that importing the
package loads neither torch nor transformers. A verb that shares its name with a room is both:
``pw.measure(model, data)`` runs it, ``pw.measure.cost`` looks inside.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.model.kv_cache import kv_cache as kv_cache
    from pennyweight.model.loading import load as load
    from pennyweight.model.saving import save as save

__version__ = "0.1.0"

#: Each verb: the module and the function that does it.
VERBS = {
    "apply": ("pennyweight.apply", "apply"),
    "compare": ("pennyweight.compare", "compare"),
    "essential": ("pennyweight.essential", "essential"),
    "export": ("pennyweight.export", "export"),
    "fit": ("pennyweight.fit", "fit"),
    "frontier": ("pennyweight.frontier", "frontier"),
    "kv_cache": ("pennyweight.model.kv_cache", "kv_cache"),
    "levers": ("pennyweight.lever", "levers"),
    "load": ("pennyweight.model.loading", "load"),
    "measure": ("pennyweight.measure", "measure"),
    "merge": ("pennyweight.merge", "merge"),
    "plan": ("pennyweight.plan", "plan"),
    "save": ("pennyweight.model.saving", "save"),
    "study": ("pennyweight.study", "study"),
    "verify": ("pennyweight.verify", "verify"),
}
_ROOMS = (
    "adapt", "arch", "claims", "data", "distil", "embeddings", "errors", "eval", "evaluate", "laws", "model",
    "retrieval", "select", "train", "weights",
)  # fmt: skip

__all__ = [*VERBS, *_ROOMS]


class _Verb(ModuleType):
    """A room that is called like the verb it is named after."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    """Makes a room callable at the moment it is imported, by whomever."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


def _function(verb: str) -> Any:
    module, function = VERBS[verb]
    return getattr(importlib.import_module(module), function)


def __getattr__(name: str) -> Any:
    if name in VERBS and importlib.util.find_spec(f"{__name__}.{name}") is None:
        return _function(name)
    if name in VERBS or name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTransformers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the plug-in for compact directories once ``transformers`` has its own quantizers ready."""

    target = "transformers.quantizers.auto"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is None or found.loader is None:
            return None
        self._loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("pennyweight.transformers_plugin")


def _register_plugin() -> None:
    if hasattr(sys.modules.get(_AfterTransformers.target), "register_quantizer"):
        importlib.import_module("pennyweight.transformers_plugin")
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


sys.modules[__name__].__class__ = _Package
_register_plugin()
