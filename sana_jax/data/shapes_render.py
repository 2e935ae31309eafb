"""Scenes as pixels, by formulas: the same in numpy and in jax.numpy, where a whole batch is one program.

A thing is the set where a signed distance is below 0.  All shapes are one formula with the numbers of
`FORMS`: reflections, which keep distances, bring a point (u, v) into one sector of the shape, and there

    distance = max(min(max(plane 1, plane 2), disc - joined), disc at 0 - outer, cut - disc).

Scenes are for an autoencoder of 32 x 32 pixels a token: no part is thin, textures are faint and smooth.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sana_jax.data.shapes_scene import BACKGROUNDS, COLOURS, MAX_THINGS, SHAPES, TEXTURES

OF_SCENE, OF_THING = 8, 6  # numbers of a packed scene: its own, and of each thing
LENGTH = OF_SCENE + OF_THING * MAX_THINGS
FAR = 9.0  # a distance that decides nothing
PERIOD = 0.11, 0.2  # of stripes and dots, the least and the most
# Of each texture: how far values go to either side of the background's, as a part of them, along a
# ramp, a wave and the product of two waves.
CONTRAST = {"plain": (0, 0, 0), "gradient": (0.06, 0, 0), "stripes": (0, 0.04, 0), "dots": (0, 0, 0.04)}


class Form(NamedTuple):
    """A shape of radius 1 around 0, the same on both sides of its axis: u along it and v >= 0 across.

    folds: degrees; points beyond the first and then the second are reflected there.
    planes: of each the direction of its outward normal, degrees from u, and the distance from 0.
    disc: the middle of a disc, which is joined with one radius and cut away with another.
    outer: radius of a disc around 0 that holds all.  turn: degrees from "up" to the axis.
    """

    folds: tuple = (180.0, 180.0)
    planes: tuple = ((0.0, FAR), (0.0, FAR))
    disc: tuple = (0.0, 0.0)
    joined: float = -FAR
    cut: float = -FAR
    outer: float = FAR
    turn: float = 0.0


ARM = 0.3  # half the width of the cross's
EDGE = math.atan2(1 - 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5))  # of the star, inner corners at 0.5
HEART = (3 - 2**0.5) / 2  # half the diagonal of its square, whose lobes then reach as far as its tip
FORMS = {
    "circle": Form(outer=1.0),
    "square": Form(folds=(90.0, 180.0), planes=((0.0, 0.5**0.5), (90.0, 0.5**0.5))),
    "triangle": Form(planes=((60.0, 0.5), (180.0, 0.5))),
    "star": Form(folds=(108.0, 36.0), planes=((math.degrees(EDGE), math.cos(EDGE)), (0.0, FAR))),
    "heart": Form(
        planes=((135.0, 0.5**0.5), (45.0, (2 * HEART - 1) * 0.5**0.5)),
        disc=(1.5 * HEART - 1, HEART / 2),
        joined=HEART * 0.5**0.5,
    ),
    "ring": Form(outer=1.0, cut=0.55),
    "cross": Form(folds=(90.0, 45.0), planes=((0.0, (1 - ARM**2) ** 0.5), (90.0, ARM))),
    "crescent": Form(outer=1.0, disc=(0.45, 0.0), cut=0.75, turn=90.0),
}


def _row(form):
    """The numbers of a form: cosine and sine of 2 folds; 2 planes of 3; disc, joined, cut, outer; turn."""
    radians = np.radians
    folds = [f(radians(angle)) for angle in form.folds for f in (np.cos, np.sin)]
    planes = [n for angle, d in form.planes for n in (np.cos(radians(angle)), np.sin(radians(angle)), d)]
    return [*folds, *planes, *form.disc, form.joined, form.cut, form.outer, radians(form.turn)]


TABLE = np.array([_row(FORMS[shape]) for shape in SHAPES], np.float32)
PALETTE = np.array(list(COLOURS.values()), np.float32) / 255
GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32) / 255
CONTRASTS = np.array([CONTRAST[texture] for texture in TEXTURES], np.float32)


def pack(scene):
    """A Scene as float32 [LENGTH]: background, texture, width, height, phase; then of each thing
    1 + shape (0: there is none), colour, x, y, radius, angle."""
    row = np.zeros(LENGTH, np.float32)
    place = [list(BACKGROUNDS).index(scene.background), TEXTURES.index(scene.texture)]
    numbers = [*place, scene.width, scene.height, *scene.phase]
    for thing in scene.things:
        place = [1 + SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)]
        numbers += [*place, thing.x, thing.y, thing.radius, thing.angle]
    row[: len(numbers)] = numbers
    return row


def paint(scenes, height, width, xp=jnp):
    """Packed scenes [b LENGTH] -> sRGB [b height width 3] in [0, 1], float32.

    A scene is as large as fits, in the middle; its background goes on where the picture is wider or
    higher.  Edges are one pixel soft.
    Args:
      xp: jax.numpy, or numpy.
    """
    index = scenes.astype(xp.int32)
    of_scene = scenes[:, :OF_SCENE, None, None]  # each number [b 1 1]
    extent = xp.maximum(of_scene[:, 2:4], 1.0)  # 0 in a placeholder
    scale = xp.minimum(width / extent[:, 0], height / extent[:, 1])  # pixels in a unit
    x = (xp.arange(width, dtype=xp.float32) + 0.5 - width / 2)[None, None] / scale
    y = (xp.arange(height, dtype=xp.float32) + 0.5 - height / 2)[None, :, None] / scale
    tone = _tone(x, y, xp.asarray(CONTRASTS)[index[:, 1]], of_scene[:, 4:], xp)
    image = tone[..., None] * xp.asarray(GROUNDS)[index[:, 0]][:, None, None]
    x, y = x + extent[:, 0] / 2, y + extent[:, 1] / 2
    for first in range(OF_SCENE, LENGTH, OF_THING):
        thing = scenes[:, first : first + OF_THING]
        there = xp.minimum(thing[:, :1, None], 1.0)
        form = xp.asarray(TABLE)[xp.maximum(index[:, first] - 1, 0)]
        colour = xp.asarray(PALETTE)[index[:, first + 1]][:, None, None]
        cover = xp.clip(0.5 - scale * _distance(x, y, thing, form, xp), 0.0, there)
        image = image + cover[..., None] * (colour - image)
    return image


def _tone(x, y, contrast, phase, xp):
    """Of a texture, [b h w] around 1; x [b 1 w] and y [b h 1] from the middle, in units."""
    turn = 2 * math.pi * phase[:, 0]
    along, across = x * xp.cos(turn) + y * xp.sin(turn), y * xp.cos(turn) - x * xp.sin(turn)
    often = 2 * math.pi / (PERIOD[0] + (PERIOD[1] - PERIOD[0]) * phase[:, 1])
    wave = xp.sin(often * along + 2 * math.pi * phase[:, 2])
    other = xp.sin(often * across + 2 * math.pi * phase[:, 3])
    ramp, waves, product = (contrast[:, n, None, None] for n in range(3))
    return 1 + ramp * xp.clip(1.5 * along, -1, 1) + (waves + product * other) * wave


def _distance(x, y, thing, form, xp):
    """[b h w] signed distances in units, exact near the edge, from a thing [b 6] of a form [b F]."""
    _, _, x0, y0, radius, angle = (thing[:, n, None, None] for n in range(OF_THING))
    c1, s1, c2, s2, nu1, nv1, d1, nu2, nv2, d2, u0, v0, joined, cut, outer, turn = (
        form[:, n, None, None] for n in range(form.shape[1])
    )
    x, y, angle = x - x0, y - y0, angle + turn
    u, v = x * xp.sin(angle) - y * xp.cos(angle), xp.abs(x * xp.cos(angle) + y * xp.sin(angle))
    u, v = _folded(*_folded(u, v, c1, s1, xp), c2, s2, xp)
    v = xp.abs(v)
    planes = xp.maximum(nu1 * u + nv1 * v - d1 * radius, nu2 * u + nv2 * v - d2 * radius)
    disc = xp.sqrt((u - u0 * radius) ** 2 + (v - v0 * radius) ** 2)
    whole = xp.minimum(planes, disc - joined * radius)
    return xp.maximum(xp.maximum(whole, xp.sqrt(x**2 + y**2) - outer * radius), cut * radius - disc)


def _folded(u, v, cosine, sine, xp):
    """Points beyond an angle, reflected there."""
    beyond = 2 * xp.maximum(v * cosine - u * sine, 0.0)
    return u + beyond * sine, v - beyond * cosine
