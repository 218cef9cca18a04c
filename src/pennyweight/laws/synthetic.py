"""Where generated data stops helping.

Row 59 (the form is ``rectified`` in `pennyweight.laws.curves`). Source: Z. Qin et al., "Scaling Laws of Synthetic Data
for Language Models", arXiv:2503.19551: error = B/(D_l + D^beta) + E, with D_l in tokens^beta.
"""

from __future__ import annotations

from pennyweight.elementwise import elementwise
from pennyweight.errors import OptionError
from pennyweight.laws.law import Law


@elementwise
def tokens_to_plateau(law: Law, eps: float) -> float:
    """Tokens at which the law lies ``eps`` (in the unit of its target) above its floor; 0 when it starts closer.

    Args:
        law: a ``rectified`` or ``power_const`` law.
        eps: distance to the floor, above 0; arrays, too.
    """
    if law.form.name not in ("rectified", "power_const"):
        raise OptionError(
            f"tokens_to_plateau: {law.form.name} has no plateau in one variable; give rectified or power_const"
        )
    if not eps > 0:
        raise OptionError(
            f"tokens_to_plateau: eps = {eps!r}; give a distance above 0 (the floor itself is never reached)"
        )
    if law.form.name == "power_const":
        return float(law.x0 * eps ** (-1 / law.alpha))
    room = law.B / eps - law.D_l
    return float(room ** (1 / law.beta)) if room > 0 else 0.0
