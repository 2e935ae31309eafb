"""The detector on pictures whose scenes are known, and on what is no scene."""

import numpy as np
import pytest
from scipy import ndimage

from sana_jax.data import shapes_render
from sana_jax.data import shapes_scene as world
from sana_jax.data.shapes import Shapes
from sana_jax.errors import InputError
from sana_jax.evals.shapes import painters, palette
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.prompts import SPLITS, line, prompts
from sana_jax.evals.shapes.verdict import judge
from tests import lab

SIZE, BATCH = 256, 24


def paint(scenes):
    """Always one batch of BATCH, one program for all tests."""
    return painters.painted([scenes[i % len(scenes)] for i in range(BATCH)], (SIZE, SIZE))[: len(scenes)]


def scene(*things, background="beige", texture="plain"):
    """A Scene of (shape, colour, x, y, radius)."""
    things = tuple(world.Thing(s, c, "medium", x, y, r, 0.2) for s, c, x, y, r in things)
    return world.Scene(things, background, texture, 1.0, 1.0, (0.2, 0.4, 0.6, 0.8))


def named(found):
    return sorted((thing.shape, thing.colour) for thing in found)


@pytest.fixture(scope="module")
def scenes():
    training, held_out = Shapes(seed=5).open(), Shapes(seed=5, held_out=True).open()
    return [(training if i % 3 else held_out).scene(i) for i in range(BATCH)]


@pytest.mark.parametrize("blur, noise", [(0, 0), (2, 4)])
def test_every_thing_is_found_where_it_is(scenes, blur, noise):
    rng = np.random.default_rng(0)
    for truth, picture in zip(scenes, paint(scenes)):
        soft = ndimage.gaussian_filter(picture.astype(np.float32), (blur, blur, 0)) + noise * rng.normal(size=picture.shape)
        found = detect(np.clip(np.rint(soft), 0, 255).astype(np.uint8))
        assert named(found) == sorted((thing.shape, thing.colour) for thing in truth.things)
        for thing in found:
            left, top, right, bottom = (side / SIZE for side in thing.box)
            middle = (left + right) / 2, (top + bottom) / 2
            same = (t for t in truth.things if (t.shape, t.colour) == (thing.shape, thing.colour))
            nearest = min(same, key=lambda t: np.hypot(t.x - middle[0], t.y - middle[1]))
            assert np.hypot(nearest.x - middle[0], nearest.y - middle[1]) < 0.3 * nearest.radius
            assert max(right - left, bottom - top) == pytest.approx(2 * nearest.radius, rel=0.35)


@pytest.mark.parametrize("split", SPLITS)
def test_truth_is_judged_right_and_a_neighbours_prompt_is_not(split):
    lines = prompts(split, BATCH // len(SPLITS[split]))
    pictures = paint([painters.scene(asked, i, (SIZE, SIZE), seed=3) for i, asked in enumerate(lines)])
    found = [detect(picture) for picture in pictures]
    assert all(judge(things, asked).exact for things, asked in zip(found, lines))
    assert sum(judge(things, asked).correct for things, asked in zip(found, lines[1:] + lines[:1])) <= 2


def test_things_that_keep_their_pixels():
    """A small triangle of 256 pixels is too small a share of 512; with the unit said it is there."""
    lines = prompts("seen", 8)
    pictures = painters.truth((512, 512), 3, unit=256)(lines, range(len(lines)))
    found = [detect(picture, 256) for picture in pictures]
    assert all(judge(things, asked).exact for things, asked in zip(found, lines))
    sizes = [max(right - left, bottom - top) for things in found for left, top, right, bottom in (one.box for one in things)]
    assert 2 * 256 * min(world.SIZES.values()) * 0.6 < min(sizes) and max(sizes) < 2 * 256 * max(world.SIZES.values()) * 1.1
    corner = world.Thing("triangle", "red", "small", 1.7, 1.6, world.SIZES["small"], 0.0)
    small = world.Scene((corner,), "beige", "plain", 2.0, 2.0, (0.2, 0.4, 0.6, 0.8))
    (picture,) = painters.painted([small], (512, 512))
    assert named(detect(picture, 256)) == [("triangle", "red")] and detect(picture) == []
    with pytest.raises(InputError, match=r"unit=1024: must be an int in \[128, 512\]"):
        detect(picture, 1024)


def test_a_wrong_picture_is_told():
    asked = next(asked for asked in prompts("seen", 1) if asked["tag"] == "color_attr")
    (a, one), (b, other) = ((item["class"], item["color"]) for item in asked["include"])
    left, right = (0.3, 0.5, 0.15), (0.7, 0.5, 0.15)
    pictures = paint(
        [
            scene((a, one, *left), (b, other, *right)),
            scene((a, other, *left), (b, one, *right)),  # colours swapped
            scene((a, one, *left)),  # one is missing
            scene((a, one, *left), (a, other, *right)),  # a shape twice
            scene(),
        ]
    )
    assert [judge(detect(picture), asked).correct for picture in pictures] == [True, False, False, False, False]


def test_counts():
    three = [("star", "green", 0.2 + 0.3 * i, 0.5, 0.12) for i in range(3)]
    asked = line("counting", ((("star", None, None, 3),), None), "three stars")
    for count, right in ((2, False), (3, True), (4, False)):
        things = (three + [("star", "green", 0.5, 0.2, 0.12)])[:count]
        assert judge(detect(paint([scene(*things)])[0]), asked).correct == right


def test_what_is_nothing():
    rng = np.random.default_rng(0)
    for level in (0, 127, 255):
        assert detect(np.full((SIZE, SIZE, 3), level, np.uint8)) == []
    assert detect(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) == []
    smooth = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE, 3)), (12, 12, 0))
    found = detect(np.clip(128 + 3000 * smooth, 0, 255).astype(np.uint8))
    assert found and sum(bool(thing.shape) for thing in found) <= len(found) / 3  # few blobs have a name


def test_a_rim_is_no_ring_and_a_ring_is_no_disc():
    red_on_white = np.full((SIZE, SIZE, 3), 252, np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    far = np.hypot(x, y)
    red_on_white[far < 60] = (255, 130, 190)  # a wide rim, pink as a blend of both would be
    red_on_white[far < 50] = world.COLOURS["red"]
    assert ("circle", "red") in named(detect(red_on_white))
    assert ("ring", "pink") not in named(detect(red_on_white))
    assert named(detect(paint([scene(("ring", "pink", 0.5, 0.5, 0.2))])[0])) == [("ring", "pink")]


def test_things_that_ran_together_are_none():
    picture = paint([scene(("circle", "blue", 0.4, 0.5, 0.15), ("circle", "blue", 0.6, 0.5, 0.15))])[0]
    assert [thing.shape for thing in detect(picture)] == [""]


def test_background_of_a_things_colour_hides_only_that():
    picture = paint([scene(("heart", "red", 0.5, 0.5, 0.2))])[0].copy()
    picture[np.abs(picture.astype(int) - world.BACKGROUNDS["beige"]).max(axis=2) < 30] = world.COLOURS["yellow"]
    assert named(detect(picture)) == [("heart", "red")]


def test_any_shape_of_picture():
    tall = world.compose(np.random.default_rng(0), [("cross", "blue", "small", 3)], 1.0, 1.5)
    picture = shapes_render.paint(shapes_render.pack(tall)[None], 384, 256, xp=np)[0]
    assert named(detect(np.rint(255 * picture).astype(np.uint8))) == [("cross", "blue")] * 3


def test_lab_is_that_of_the_tests():
    rgb = np.random.default_rng(0).integers(0, 256, (100, 3))
    np.testing.assert_allclose(palette.lab(rgb), lab.lab(rgb), atol=0.02)


@pytest.mark.parametrize("picture", [np.zeros((SIZE, SIZE, 3)), np.zeros((SIZE, SIZE), np.uint8), np.zeros((32, SIZE, 3), np.uint8)])
def test_bad_pictures_are_named(picture):
    with pytest.raises(InputError, match="image: .*must be uint8"):
        detect(picture)
