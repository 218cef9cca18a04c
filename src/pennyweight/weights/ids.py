"""Row numbers that are looked up in weights whose rules would answer any number.

A table in memory fails where there is no such row. A remainder, a hash or a sum of places gives some row instead, and
whoever took the wrong tokenizer would never know.
"""

from __future__ import annotations

from torch import Tensor


def known_ids(index: Tensor, rows: int, where: str) -> Tensor:
    """``index`` as int64, so that hashes of narrower whole numbers are the same.

    On a device nothing is checked: the answer would have to be waited for.

    Args:
        index: whole numbers of any shape.
        rows: M, how many rows there are.
        where: what errors call the weight.

    Raises:
        IndexError: a number below 0 or from ``rows`` on; what ``nn.Embedding`` raises.
    """
    index = index.long()
    if index.device.type == "cpu" and index.numel():
        least, most = index.aminmax()
        if least < 0 or most >= rows:
            raise IndexError(f"{where}: rows {int(least)} to {int(most)} of {rows}; give 0 to {rows - 1}")
    return index
