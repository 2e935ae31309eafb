"""Decoding: every kind of good picture, two dozen bad ones, and what hostile ones may cost."""

import io
import time
import timeit
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import images
from sana_jax.data.records import BadRecord
from tests.sana_jax.data.pictures import bad_pictures, bomb, encoded, png, scene

BAD = bad_pictures()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_a_bad_record(name):
    data, reason = BAD[name]
    with pytest.raises(BadRecord) as caught:
        images.decode(data, 32, 32)
    assert caught.value.reason == reason, caught.value


def test_there_are_two_dozen():
    assert len(BAD) >= 24


@pytest.mark.parametrize("data", [bomb(), png(100_000, 100_000, bytes(100)), BAD["webp header of 16k x 16k"][0]])
def test_a_bomb_costs_neither_time_nor_memory(data):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(BadRecord, match="too_large"):
        images.decode(data, 512, 512)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.05 and peak < 1 << 20


def near(found, expected, most):
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() < most


@pytest.mark.parametrize("kind, most", [("PNG", 1e-9), ("JPEG", 2), ("WEBP", 3)])
def test_the_three_formats(kind, most):
    image = scene(96, 64)
    data = encoded(image, kind)
    assert images.header(data).shown == (96, 64)
    near(images.decode(data, 64, 96), image, most)


@pytest.mark.parametrize(
    "options", [dict(progressive=True), dict(subsampling=0), dict(comment=b"x" * 60_000), dict(quality=30)]
)
def test_jpegs_of_all_kinds(options):
    image = scene(96, 64)
    data = encoded(image, "JPEG", **options)
    assert images.header(data).shown == (96, 64)
    near(images.decode(data, 64, 96), image, 6)


@pytest.mark.parametrize(
    "options, kind",
    [(dict(lossless=True), b"VP8L"), (dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), b"VP8X"), ({}, b"VP8 ")],
)
def test_webps_of_all_kinds(options, kind):
    data = encoded(scene(96, 64), "WEBP", **options)
    assert data[12:16] == kind and images.header(data).shown == (96, 64)


def test_modes_become_rgb():
    image = Image.fromarray(scene(96, 64))
    whole = np.asarray(image)
    grey = np.asarray(image.convert("L"))
    near(images.decode(encoded(image.convert("CMYK"), "JPEG", quality=95), 64, 96), whole, 4)
    near(images.decode(encoded(image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)), 64, 96), whole, 8)
    near(images.decode(encoded(image.convert("L")), 64, 96), np.stack([grey] * 3, -1), 1e-9)
    near(
        images.decode(encoded(image.convert("1")), 64, 96),
        np.stack([np.asarray(image.convert("1")) * 255] * 3, -1),
        1e-9,
    )
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    near(images.decode(encoded(sixteen), 64, 96), np.stack([grey] * 3, -1), 1e-9)


def test_what_is_transparent_is_white():
    pixels = np.dstack([scene(96, 64), np.full((64, 96), 255, np.uint8)])
    pixels[:32, :, 3], pixels[32:, :48, 3] = 0, 128
    found = images.decode(encoded(pixels), 64, 96)
    assert (found[:32] == 255).all()
    np.testing.assert_array_equal(found[32:, 48:], pixels[32:, 48:, :3])
    np.testing.assert_allclose(found[32:, :48], (pixels[32:, :48, :3].astype(float) + 255) / 2, atol=1.5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns(orientation, kind):
    """The header tells the size as it is shown, and the pixels follow the tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(96, 64), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    steps = {1: [], 2: ["h"], 3: ["r2"], 4: ["v"], 5: ["r1", "v"], 6: ["r3"], 7: ["r3", "v"], 8: ["r1"]}[orientation]
    expected = scene(96, 64)
    for step in steps:
        expected = {"h": lambda a: a[:, ::-1], "v": lambda a: a[::-1]}.get(step, lambda a: np.rot90(a, int(step[-1])))(
            expected
        )
    height, width = expected.shape[:2]
    assert images.header(data).shown == (width, height)
    near(images.decode(data, height, width), expected, 2.5)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's, which looks for a resolution there
def test_broken_exif_is_decoration():
    data = encoded(scene(96, 64), "JPEG")
    broken = data[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff\xff\xff" + data[2:]
    assert images.header(broken).shown == (96, 64)
    near(images.decode(broken, 64, 96), scene(96, 64), 2)


@pytest.mark.parametrize("width, height", [(100, 50), (50, 100), (64, 64), (33, 65), (400, 300)])
def test_the_middle_that_covers_the_size(width, height):
    """Against Pillow by another way: cut first, then resize."""
    scale = min(width, height) / 32
    left, top = (width - 32 * scale) / 2, (height - 32 * scale) / 2
    image = scene(width, height)
    expected = Image.fromarray(image).resize(
        (32, 32), Image.Resampling.BICUBIC, (left, top, left + 32 * scale, top + 32 * scale)
    )
    np.testing.assert_array_equal(images.decode(encoded(image), 32, 32), np.asarray(expected))


def test_small_pictures_grow():
    near(
        images.decode(encoded(scene(16, 16)), 64, 64),
        np.asarray(Image.fromarray(scene(16, 16)).resize((64, 64), Image.Resampling.BICUBIC)),
        1e-9,
    )


@pytest.mark.parametrize("side, expected", [(1024, "BICUBIC"), (2048, "LANCZOS")])
def test_the_filter_of_2k(side, expected):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("BICUBIC", "LANCZOS"):
        same = np.array_equal(
            images.decode(encoded(image), side, side),
            np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling[name])),
        )
        assert same == (name == expected)


def test_large_jpegs_are_decoded_small_and_look_the_same():
    image = scene(1200, 1600)
    data = encoded(image, "JPEG", quality=95)
    exact = Image.open(io.BytesIO(data)).resize((128, 128), Image.Resampling.BICUBIC, (0, 200, 1200, 1400))
    near(images.decode(data, 128, 128), np.asarray(exact), 0.6)


def test_decoding_small_is_what_saves_the_time():
    data = encoded(scene(1200, 1600), "JPEG")

    def best(side):
        return min(timeit.repeat(lambda: images.decode(data, side, side), number=1, repeat=5))

    assert best(128) < best(700)  # which is more than half: decoded whole


def test_headers_are_read_a_little_at_a_time():
    asked = []

    def read(data):
        def some(most):
            asked.append(most)
            return data[:most]

        return images.read_header(some).shown

    assert read(encoded(scene(96, 64))) == (96, 64) and asked == [4096]
    asked.clear()
    thick = encoded(scene(96, 64), "JPEG")
    thick = thick[:2] + (b"\xff\xe2\xff\xff" + bytes(65_533)) * 3 + thick[2:]
    assert read(thick) == (96, 64) and asked == [4096, 65536, 1 << 20]
    with pytest.raises(BadRecord, match="within its header"):
        read(thick[:70_000])
