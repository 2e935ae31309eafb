"""Finds the things in a picture from its pixels and the palette: numpy and scipy, no network, no chance.

    nearest palette colour in Lab -> which colours are there at all, and of what shade
    -> nearest shade -> connected components of a colour -> rims back to their things -> class of the outline

Rims are the difficulty: where red meets white there is pink.  So a colour counts as present only where
it is thick and does not go round something else, all pixels are then shared among what is present, and
what is still too thin to be a thing belongs to the thing beside it or to the background.

Lengths are shares of the picture's shorter side, so that one rule holds at every size; or of a length that
is said, where things keep their pixels whatever the size (`Shapes.grow`).
"""

import numpy as np
from scipy import ndimage, spatial

from sana_jax.errors import InputError, require_range
from sana_jax.evals.shapes import outlines, palette
from sana_jax.evals.shapes.verdict import Found

VERSION = 1  # of what it finds in a picture, and of the verdict on that
SMALLEST = 128  # pixels a side; a small ring is 7 thick there, and at 96 one verdict in 300 is wrong
BORDER = 1 / 32  # width of the frame that tells the background
THICK = 1 / 64  # of what is no rim: the thinnest thing, a small ring, has 0.03
LEAST = 0.004  # area of a thing, in squares of that length: the smallest, a ring, has 0.01
NESTED = 0.5  # of a hole: more of another colour within it makes it a rim


def detect(image, unit=None):
    """The things in a picture, the largest first.

    Args:
      image: uint8 [H W 3], SMALLEST pixels or more a side.
      unit: pixels of which lengths are shares, SMALLEST or more; the shorter side if left out.
    Returns:
      A list of `Found`; `shape` is "" for what has none of the outlines.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SMALLEST:
        raise InputError(f"image: {image.dtype} {image.shape}, must be uint8 [H, W, 3] of {SMALLEST} pixels or more a side")
    if unit is None:
        unit = min(image.shape[:2])
    require_range("unit", unit, SMALLEST, min(image.shape[:2]))
    names, labels, pixels, centres = _shared(image, unit)
    owner, things = np.zeros(labels.shape, np.int32), []  # 0: nobody's; thing k is number k + 1
    for label in range(1, len(names)):
        for where, part in _components(labels == label, unit):
            things.append(label)
            owner[where][part] = len(things)
    _return_rims(owner, labels, pixels, centres[[0, *things]], unit)
    found = []
    for label, where, number in zip(things, ndimage.find_objects(owner), range(1, len(things) + 1)):
        if where is None:  # it lay in what was taken for a hole of another
            continue
        mask = owner[where] == number
        shape, fit = outlines.classify(mask)
        box = where[1].start, where[0].start, where[1].stop, where[0].stop
        found.append(Found(shape, names[label], box, int(mask.sum()), round(fit, 3)))
    return sorted(found, key=lambda thing: (-thing.area, thing.box))


def _shared(image, unit):
    """(names of what is present, label [H W] of each pixel, Lab [H W 3], Lab of each label); 0 is background."""
    colours, nearest = palette.tables()
    cells = palette.cells(image)
    first = nearest[cells]
    edge = max(1, round(BORDER * unit))
    frame = np.concatenate([part.ravel() for part in (first[:edge], first[-edge:], first[:, :edge], first[:, -edge:])])
    ground = np.argmax(np.bincount(frame))  # a thing's colour where a model painted so; then those are not seen
    behind = (first >= len(palette.THINGS)) | (first == ground)
    first = np.where(behind, -1, first)
    names, centres = [None], [colours[cells[behind]].mean(axis=0)]
    for label, name in enumerate(palette.THINGS):
        core = np.zeros(first.shape, bool)
        for where, part in _components(first == label, unit):
            if not _is_rim(first[where], part, label):
                core[where] |= part
        if core.any():
            names.append(name)
            centres.append(colours[cells[ndimage.binary_erosion(core, iterations=_rim_width(unit))]].mean(axis=0))
    pixels, centres = colours[cells], np.array(centres)
    return names, palette.nearest(pixels, centres), pixels, centres


def _return_rims(owner, labels, pixels, centres, unit):
    """Gives pixels of a thing's colour that are nobody's to the nearest owner, or leaves them to the background.

    centres: Lab of the background and of each owner.  `owner` is changed.
    """
    rims = np.argwhere((labels > 0) & (owner == 0))
    inside = owner > 0
    edges = np.argwhere(inside & ~ndimage.binary_erosion(inside))
    if not len(rims) or not len(edges):
        return
    distance, place = spatial.cKDTree(edges).query(rims, distance_upper_bound=2 * THICK * unit)
    rims, place = rims[np.isfinite(distance)], place[np.isfinite(distance)]
    nearest, seen = owner[tuple(edges[place].T)], pixels[tuple(rims.T)]
    own = np.sum((seen - centres[nearest]) ** 2, axis=1) < np.sum((seen - centres[0]) ** 2, axis=1)
    owner[tuple(rims[own].T)] = nearest[own]


def _components(mask, unit):
    """(slices, mask within them) of each connected part that is thick and large enough, small holes closed."""
    if mask.sum() < LEAST * unit**2:
        return
    numbered, _ = ndimage.label(_opened(mask, unit))
    for number, where in enumerate(ndimage.find_objects(numbered), 1):
        part = numbered[where] == number
        if part.sum() >= LEAST * unit**2:
            yield where, _without_small_holes(part)


def _rim_width(unit):
    return max(1, round(THICK * unit / 2))


def _opened(mask, unit):
    """Without what is thinner than THICK.  Diamond-shaped steps: corners lose a pixel or two."""
    steps = _rim_width(unit)
    kept = ndimage.binary_erosion(mask, iterations=steps)
    return ndimage.binary_dilation(kept, iterations=steps + 1, mask=mask)


def _without_small_holes(part):
    holes, count = ndimage.label(~np.pad(part, 1))
    if count < 2:
        return part
    sizes = np.bincount(holes.ravel())
    small = sizes < 0.05 * part.sum()
    small[0] = False
    return part | small[holes][1:-1, 1:-1]


def _is_rim(labels, part, label):
    """Whether most of what the part goes round is of one thing's colour, another than its own."""
    inside = labels[ndimage.binary_fill_holes(part) & ~part]
    if inside.size < 0.1 * part.sum():
        return False
    return np.mean((inside >= 0) & (inside != label)) > NESTED
