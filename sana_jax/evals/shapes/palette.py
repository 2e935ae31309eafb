"""Colours as people tell them apart: CIE Lab (D65), and tables from 6 bits a channel."""

import functools

import numpy as np

from sana_jax.data import shapes_scene as world

BITS = 6
THINGS = tuple(world.COLOURS)  # label k is THINGS[k]; what comes behind is background
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(rgb):
    """sRGB in [0, 255], [... 3] -> Lab, float32 (IEC 61966-2-1; CIE 15)."""
    share = np.asarray(rgb, np.float32) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ (RGB_TO_XYZ / RGB_TO_XYZ.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


@functools.lru_cache(maxsize=1)
def tables():
    """(Lab [64^3, 3], label [64^3] int8 of the nearest colour) for `cells`."""
    levels = (np.arange(2**BITS) + 0.5) * 2 ** (8 - BITS) - 0.5
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colours = lab(rgb)
    return colours, nearest(colours, lab([*world.COLOURS.values(), *world.BACKGROUNDS.values()]))


def cells(image):
    """uint8 [H W 3] -> [H W] index into the `tables`."""
    r, g, b = np.moveaxis(image >> (8 - BITS), -1, 0).astype(np.int32)
    return (r << 2 * BITS) + (g << BITS) + b


def nearest(colours, centres):
    """[... 3], [k 3] -> index [...] int8 of the nearest centre."""
    scores = colours @ centres.T - np.sum(centres**2, axis=1) / 2
    return np.argmax(scores, axis=-1).astype(np.int8)
