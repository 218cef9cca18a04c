"""The setting of the cache under a budget on its bytes.

What the cache takes is no matter of the weights, and what it costs in quality is measured as it is, so it is chosen
apart from the knapsack: the mildest settings that meet the budget are tried on the check windows, and the best is kept
while the weights are planned beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pennyweight.errors import BudgetError, ModelError
from pennyweight.measure.cost import cost
from pennyweight.model.kv_cache import KVSetting, keeping
from pennyweight.model.model import Model
from pennyweight.units import show_bytes

#: From mild to harsh. The newest tokens stay as they are: 128 of them, and none where the budget leaves no room.
SETTINGS = tuple(KVSetting(bits=bits, residual=residual) for bits in (8, 6, 5, 4, 3, 2) for residual in (128, 32, 0))
_TRIED = 2


def context_of(model: Model) -> int:
    """The longest text the model has positions for, in tokens.

    Raises:
        ModelError: it does not say.
    """
    found = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ModelError(f"{model.name}: its configuration names no longest text, which a kv budget needs")
    return found


def bytes_of(model: Model, setting: KVSetting | None = None) -> int:
    """Bytes of cache at full context, in the dtype the model is held in.

    Raises:
        ModelError: the model keeps no cache, or its context is not known.
    """
    with keeping(model.module, setting):
        found = cost(model)
    if not found.cache:
        raise ModelError(f"{model.name}: it keeps no keys and values, so there is nothing a kv budget could limit")
    return found.kv_bytes(context_of(model))


def setting_for(
    model: Model, limit: int, harm: Callable[[nn.Module, KVSetting], float]
) -> tuple[KVSetting | None, int, float]:
    """The setting of least harm within ``limit`` bytes: itself, its bytes, its harm; None where none is needed.

    Args:
        model: the original.
        limit: bytes at full context.
        harm: of the module with a setting kept, on the check windows.

    Raises:
        BudgetError: even the harshest setting takes more.
    """
    whole = bytes_of(model)
    if whole <= limit:
        return None, whole, 0.0
    sizes = {setting: bytes_of(model, setting) for setting in SETTINGS}
    fitting = [setting for setting in SETTINGS if sizes[setting] <= limit]
    if not fitting:
        raise BudgetError(
            f"kv: {limit:,} bytes of cache at {context_of(model):,} tokens cannot be met: the harshest setting takes "
            f"{min(sizes.values()):,} ({show_bytes(whole)} as it is); raise the budget"
        )
    tried = []
    for setting in fitting[:_TRIED]:
        with keeping(model.module, setting):
            tried.append((harm(model.module, setting), setting))
    least, best = min(tried, key=lambda each: each[0])
    return best, sizes[best], least
