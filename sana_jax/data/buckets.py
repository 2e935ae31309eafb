"""Which size of batch every record belongs to: one square, or the nearest of the published or of some other sizes."""

import numpy as np

from sana_jax.errors import InputError
from sana_jax.resolution import PATCH, bins


def shapes(size, choice):
    """((height, width), ...) in pixels: one square, the published ones by rising height / width, or those that are named.

    Args:
      choice: `Data.buckets`: False, True, or ((height, width), ...).
    Raises:
      InputError: no aspect ratios are published for `size`, or a choice that is none.
    """
    if not isinstance(choice, bool):
        if not isinstance(choice, tuple) or not choice or len(set(choice)) < len(choice):
            raise InputError(f"data.buckets={choice!r}: must be false, true, or different sizes, ((height, width), ...)")
        return choice
    if not choice:
        return ((size, size),)
    table = bins(size // PATCH) if size % PATCH == 0 else None
    if table is None:
        raise InputError(
            f"data.size={size}: aspect ratios are published for 512, 1024, 2048 and 4096 only; "
            "data.buckets=false takes squares of any size, and ((height, width), ...) sizes of your own"
        )
    return tuple(table[ratio] for ratio in sorted(table))


def assign(sizes, size, choice=True):
    """int64 [n], the place in `shapes(size, choice)` for pictures of `sizes` [n 2] (width, height).

    Of the published ones the nearest by height / width to the ratio that the table names, the lower of two
    that are as near: as published, and as `resolution.painted_size` does; unreadable ones (0 0) are squares.
    Of named ones the nearest by the logarithms of height and width, the first of several; unreadable ones are
    as if `size` x `size`.  The time and memory of these go with how many sizes are different.
    """
    if not isinstance(choice, bool):
        different, inverse = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0, return_inverse=True)
        known = np.all(different > 0, axis=1, keepdims=True)
        sides = np.where(known, different, size)[:, ::-1].astype(np.float64)
        apart = np.log(sides)[:, None] - np.log(np.array(choice, np.float64))
        return np.sum(apart**2, axis=-1).argmin(axis=1)[inverse.reshape(-1)]
    width, height = np.asarray(sizes, np.float64).reshape(-1, 2).T
    known = (width > 0) & (height > 0)
    if not choice:
        return np.zeros(len(width), np.int64)
    ratios = np.array(sorted(bins(size // PATCH)))
    ratio = np.divide(height, width, out=np.ones(len(height)), where=known)
    return np.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio, side="left")


def divide(reader, size, choice):
    """(shapes, members, counts) of a reader's records: `members` is None where there is one shape for all.

    Raises InputError: as `shapes`, or as the reader's sizes.
    """
    found = shapes(size, choice)
    if len(found) == 1:
        return found, None, (len(reader),)
    parts = members(assign(reader.sizes, size, choice), len(found))
    return found, parts, tuple(map(len, parts))


def members(places, count):
    """[count] arrays: the records of each bucket, in their own order.

    int32 up to 2^31 records: 4 bytes each are all that a schedule keeps.
    """
    order = np.argsort(places, kind="stable")
    order = order.astype(np.int32 if len(order) < 2**31 else np.int64)
    return np.split(order, np.searchsorted(places[order], np.arange(1, count)))
