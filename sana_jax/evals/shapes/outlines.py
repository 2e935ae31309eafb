"""Which of the eight shapes an outline is, however it is turned.

A mask is read on rings around its centre, out to a radius that its area gives, so that place and size are
gone and a turn is a shift along the ring.  The overlap with a shape at every turn is then one circular
correlation, and the class is the shape with the largest intersection over union.
"""

import functools

import numpy as np
from scipy import ndimage

from sana_jax.data import shapes_render
from sana_jax.data import shapes_scene as world

RINGS, TURNS = 32, 96
REACH = 2.2  # of the outermost ring, in radii of the circle of the same area
LEAST_FIT = 0.85  # below it an outline is none of the eight


def classify(mask):
    """(shape, intersection over union with it) of a [h w] bool mask; the shape is "" below LEAST_FIT."""
    fits = _fits(rings(mask))
    best = int(np.argmax(fits))
    return (world.SHAPES[best] if fits[best] >= LEAST_FIT else ""), float(fits[best])


def rings(mask):
    """The mask on RINGS x TURNS points around its centre, [RINGS TURNS] of 0 and 1."""
    rows, columns = np.nonzero(mask)
    reach = REACH * np.sqrt(len(rows) / np.pi)
    y, x = _points()
    at = rows.mean() + reach * y, columns.mean() + reach * x
    return (ndimage.map_coordinates(mask.astype(np.float32), at, order=1) > 0.5).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _points():
    radius = (np.arange(RINGS)[:, None] + 0.5) / RINGS
    angle = 2 * np.pi * np.arange(TURNS) / TURNS
    return radius * np.sin(angle), radius * np.cos(angle)


def _fits(ringed):
    """[8] intersection over union with each shape at its best turn; a ring counts as its circumference."""
    templates, areas = _templates()
    weight = (np.arange(RINGS) + 0.5)[:, None]
    spectrum = np.fft.rfft(ringed * weight, axis=1)
    common = np.fft.irfft((spectrum * templates).sum(axis=1), TURNS, axis=1).max(axis=1)
    return common / (areas + (ringed * weight).sum() - common)


@functools.lru_cache(maxsize=1)
def _templates():
    """(conjugate spectra [8 RINGS TURNS/2+1], areas [8]) of the shapes, painted by the world's own painter."""
    spectra, areas = [], []
    weight = (np.arange(RINGS) + 0.5)[:, None]
    for shape in world.SHAPES:
        thing = world.Thing(shape, "black", "large", 0.5, 0.5, 0.4, 0.0)
        scene = world.Scene((thing,), "beige", "plain", 1.0, 1.0, (0.0, 0.0, 0.0, 0.0))
        picture = shapes_render.paint(shapes_render.pack(scene)[None], 192, 192, xp=np)[0]
        ringed = rings(picture[..., 0] < 0.4)
        spectra.append(np.conj(np.fft.rfft(ringed, axis=1)))
        areas.append((ringed * weight).sum())
    return np.array(spectra), np.array(areas)
