"""Painted scenes: each shape's area and place, colours, and the same pixels from numpy and jax."""

import functools
import math

import jax
import numpy as np
import pytest

from sana_jax.data import shapes_render as render
from sana_jax.data import shapes_scene as world
from sana_jax.data.shapes_scene import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing
from tests.lab import lab
from tests.sana_jax.data.test_shapes_scene import generator

SIDE = 96
paint = jax.jit(functools.partial(render.paint, height=SIDE, width=SIDE))


def lens(distance, r):
    """Area that a disc of radius 1 and one of radius r have in common."""
    a = math.acos((distance**2 + 1 - r**2) / (2 * distance))
    b = math.acos((distance**2 + r**2 - 1) / (2 * distance * r))
    return a + r**2 * b - distance * math.sin(a)


HEART = (3 - 2**0.5) / 2
AREAS = {  # of radius 1
    "circle": math.pi,
    "square": 2,
    "triangle": 3**1.5 / 4,
    "star": 2.5 * math.sin(math.pi / 5),
    "heart": HEART**2 * (2 + math.pi / 2),
    "ring": math.pi * (1 - 0.55**2),
    "cross": 2.4 * 0.91**0.5 - 0.36,
    "crescent": math.pi - lens(0.45, 0.75),
}


def one(shape, colour="black", x=0.5, y=0.5, radius=0.35, angle=0.0, background="gray", texture="plain", phase=(0,) * 4):
    return render.pack(Scene((Thing(shape, colour, "large", x, y, radius, angle),), background, texture, 1, 1, phase))


def cover(image, colour="black", background="gray"):
    """How much of each pixel is the thing's, and how far colours are from mixtures of the two."""
    a, b = np.array(BACKGROUNDS[background]) / 255, np.array(COLOURS[colour]) / 255
    share = (image - a) @ (b - a) / ((b - a) @ (b - a))
    return share, np.abs(image - a - share[..., None] * (b - a)).max()


@pytest.mark.parametrize("angle", [0.0, 0.37])
def test_every_shape_has_its_area_place_and_soft_edge(angle):
    images = np.asarray(paint(np.stack([one(shape, x=0.52, y=0.47, angle=angle) for shape in SHAPES])))
    rows, columns = np.indices((SIDE, SIDE)) + 0.5
    for shape, image in zip(SHAPES, images, strict=True):
        share, off = cover(image)
        assert off < 1e-5 and share.min() > -1e-5 and share.max() < 1 + 1e-5
        assert share.sum() / SIDE**2 == pytest.approx(AREAS[shape] * 0.35**2, rel=0.006), shape
        distance = np.hypot(columns / SIDE - 0.52, rows / SIDE - 0.47)
        assert share[distance > 0.35 + 1 / SIDE].max() < 0.02
        reach = distance[share > 0.5].max()
        assert 0.33 < reach < 0.355, "radius is that of the smallest circle around it"
        between = (share > 0.01) & (share < 0.99)
        assert 60 < between.sum() < 600, "an edge of one pixel"
    centres = [cover(image)[0][45, 49] for image in images]
    assert [round(c) for c in centres] == [shape not in ("ring", "crescent") for shape in SHAPES]


def test_up_is_up_and_turns_are_clockwise():
    def mass(shape, angle, part):
        share, _ = cover(np.asarray(paint(one(shape, angle=angle)[None]))[0])
        return share[part].sum() / share.sum()

    upper, left = np.s_[: SIDE // 2], np.s_[:, : SIDE // 2]
    assert mass("triangle", 0, upper) < 0.46 and mass("heart", 0, upper) > 0.5
    assert mass("crescent", 0, left) > 0.6 and mass("crescent", math.pi, left) < 0.4
    assert mass("triangle", math.pi / 2, left) > 0.54, "its top is to the right"
    for shape in SHAPES:
        assert mass(shape, 0, upper if shape == "crescent" else left) == pytest.approx(0.5, abs=1e-4)


def test_numpy_and_jax_paint_the_same():
    scenes = np.stack([render.pack(world.sample(generator(i))) for i in range(24)])
    jaxs, numpys = np.asarray(paint(scenes)), render.paint(scenes, SIDE, SIDE, np)
    assert jaxs.dtype == numpys.dtype == np.float32 and jaxs.shape == (24, SIDE, SIDE, 3)
    assert np.abs(jaxs - numpys).max() < 1 / 255
    assert jaxs.min() >= 0 and jaxs.max() <= 1
    assert np.abs(jaxs[:-1] - numpys[1:]).max(axis=(1, 2, 3)).min() > 0.1, "the comparison can fail"


def test_things_have_their_colours_and_later_ones_lie_on_top():
    for i in range(60):
        scene = world.sample(generator(i))
        image = 255 * render.paint(render.pack(scene)[None], SIDE, SIDE, np)[0]
        for thing in scene.things:
            if thing.shape not in ("ring", "crescent"):
                pixel = image[int(thing.y * SIDE), int(thing.x * SIDE)]
                np.testing.assert_allclose(pixel, COLOURS[thing.colour], atol=1e-3)
    things = [Thing("circle", colour, "large", 0.5, 0.5, 0.2, 0.0) for colour in ("red", "blue")]
    scene = render.pack(Scene(tuple(things), "gray", "plain", 1, 1, (0,) * 4))
    np.testing.assert_allclose(255 * render.paint(scene[None], SIDE, SIDE, np)[0, 48, 48], COLOURS["blue"], atol=1e-3)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_textures_are_faint_and_stay_nearest_to_their_background(background, texture):
    phases = np.random.default_rng(0).random((6, 4)).tolist()
    scenes = [render.pack(Scene((), background, texture, 1, 1, tuple(phase))) for phase in phases]
    tones = np.round(255 * np.asarray(paint(np.stack(scenes))))
    table = np.array([*BACKGROUNDS.values(), *COLOURS.values()])
    seen = lab(tones.reshape(-1, 3))
    nearest = np.linalg.norm(seen[:, None] - lab(table), axis=-1).argmin(axis=1)
    assert (nearest == list(BACKGROUNDS).index(background)).all()
    spread = np.ptp(tones, axis=(1, 2)).max()
    assert spread == 0 if texture == "plain" else 4 < spread < 32
    steps = max(np.abs(np.diff(tones, axis=axis)).max() for axis in (1, 2))
    assert steps <= 6, "smooth: the shortest period is ten pixels of these"


@pytest.mark.parametrize("height, width", [(64, 160), (160, 64), (96, 96)])
def test_a_scene_fits_whatever_the_picture(height, width):
    """Its own shape fills the picture; in another it is whole, in the middle, as large as can be."""
    scenes = [world.sample(generator(i), 2.5, 1.0)._replace(background="gray", texture="plain") for i in range(8)]
    images = render.paint(np.stack([render.pack(scene) for scene in scenes]), height, width, np)
    scale = min(height, width / 2.5)
    for scene, image in zip(scenes, images):
        there = np.abs(image - np.array(BACKGROUNDS["gray"]) / 255).max(-1) > 1e-3
        rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
        for low, high, middle, places in (
            (rows[0], rows[-1], height / 2 - scale * 0.5, [(t.y, t.radius) for t in scene.things]),
            (columns[0], columns[-1], width / 2 - scale * 1.25, [(t.x, t.radius) for t in scene.things]),
        ):
            assert low >= middle + scale * min(at - r for at, r in places) - 1.6
            assert high <= middle + scale * max(at + r for at, r in places) + 0.6
            assert low <= middle + scale * min(at for at, _ in places) + scale * 0.05
            assert high >= middle + scale * max(at for at, _ in places) - scale * 0.05


def test_a_placeholder_can_be_painted():
    image = np.asarray(paint(np.zeros((1, render.LENGTH), np.float32)))
    assert np.isfinite(image).all() and np.ptp(image, axis=(1, 2)).max() == 0
