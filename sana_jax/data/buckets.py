"""Which size of batch every record belongs to: one square, or the nearest published aspect ratio."""

import numpy as np

from sana_jax.errors import InputError
from sana_jax.resolution import PATCH, bins


def shapes(size, aspect):
    """((height, width), ...) in pixels, by rising height / width; one square without `aspect`.

    Raises InputError: no aspect ratios are published for `size`.
    """
    if not aspect:
        return ((size, size),)
    table = bins(size // PATCH) if size % PATCH == 0 else None
    if table is None:
        raise InputError(
            f"data.size={size}: aspect ratios are published for 512, 1024, 2048 and 4096 only; "
            "data.buckets=false takes squares of any size"
        )
    return tuple(table[ratio] for ratio in sorted(table))


def assign(sizes, size):
    """int64 [n], the place in `shapes(size, aspect=True)` for pictures of `sizes` [n 2] (width, height).

    The nearest by height / width to the ratio that the table names, the lower of two that are as
    near: as published, and as `resolution.painted_size` does.  Unreadable ones (0 0) are squares.
    """
    ratios = np.array(sorted(bins(size // PATCH)))
    width, height = np.asarray(sizes, np.float64).reshape(-1, 2).T
    ratio = np.divide(height, width, out=np.ones(len(height)), where=(width > 0) & (height > 0))
    return np.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio, side="left")


def members(places, count):
    """[count] arrays: the records of each bucket, in their own order.

    int32 up to 2^31 records: 4 bytes each are all that a schedule keeps.
    """
    order = np.argsort(places, kind="stable")
    order = order.astype(np.int32 if len(order) < 2**31 else np.int64)
    return np.split(order, np.searchsorted(places[order], np.arange(1, count)))
