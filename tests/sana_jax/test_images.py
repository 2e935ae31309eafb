"""PNG files: whole or absent, with text that is read without trust; contact sheets."""

import hashlib
import os
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sana_jax import images
from sana_jax.errors import InputError

TEXTS = {"parameters": "ein Häuschen\nim 雪 \"q\" \\", "sana_jax": '{"a": 1}'}


def picture(value=0):
    return np.full((2, 3, 3), value, np.uint8)


def test_what_is_written_is_read(tmp_path):
    path, image = tmp_path / "new" / "folder" / "a.png", np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    images.save_png(path, image, TEXTS)
    pixels, sha256 = images.read_picture(path)
    np.testing.assert_array_equal(pixels, image)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert images.read_texts(path, ("sana_jax", "parameters", "absent")) == TEXTS
    assert images.is_whole(path) and [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_number_that_is_taken(tmp_path, monkeypatch, links):
    """Nothing is written over, also where the file system has no links, and nothing else stays."""
    if not links:
        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "0.png").write_bytes(b"theirs")
    (tmp_path / "1.png").write_bytes(b"theirs")

    def other(path):
        return path.with_name(f"{int(path.stem) + 1}.png")

    assert images.save_png(tmp_path / "0.png", picture(7), TEXTS, other) == tmp_path / "2.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
    assert [(tmp_path / name).read_bytes() for name in ("0.png", "1.png")] == [b"theirs"] * 2
    np.testing.assert_array_equal(images.read_picture(tmp_path / "2.png")[0], picture(7))
    assert images.save_png(tmp_path / "0.png", picture(8), TEXTS) == tmp_path / "0.png", "an explicit name is written over"


def test_sixteen_bits(tmp_path):
    grey = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    pixels, _ = images.read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, np.array([[0, 0, 1, 1], [128, 254, 255, 255]])[..., None].repeat(3, -1))


def test_sixteen_bits_of_each_colour(tmp_path):
    """Written by hand, since Pillow does not: one pixel of RGB, one of grey with alpha."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for colour_type, values, expected in ((2, [0, 32768, 65535], [0, 128, 255]), (4, [0, 32768], [127] * 3)):
        header = (1).to_bytes(4, "big") * 2 + bytes([16, colour_type, 0, 0, 0])
        row = zlib.compress(b"\0" + np.array(values, ">u2").tobytes())
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + images.END
        (tmp_path / "a.png").write_bytes(data)
        pixels, _ = images.read_picture(tmp_path / "a.png")
        np.testing.assert_allclose(pixels[0, 0].astype(int), expected, atol=1)


def test_what_is_transparent_is_white(tmp_path):
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0, :, 3] = 0, 51, 255  # black, more and more of it
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    Image.fromarray(colours[..., 2:]).save(tmp_path / "la.png")
    Image.fromarray(colours).save(tmp_path / "rgba.webp", lossless=True)
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0] * 3)
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 51, 255]))
    for name in ("rgba.png", "la.png", "rgba.webp", "palette.png"):
        np.testing.assert_array_equal(images.read_picture(tmp_path / name)[0], np.repeat([[[255], [204], [0]]], 3, -1), name)
    # One colour of a picture without alpha stands for transparent.
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "key.png", transparency=9)
    np.testing.assert_array_equal(images.read_picture(tmp_path / "key.png")[0][0, :, 0], [0, 255])
    Image.fromarray(np.array([[0, 0xFFF]], np.uint16)).save(tmp_path / "key16.png", transparency=0xFFF)
    np.testing.assert_array_equal(images.read_picture(tmp_path / "key16.png")[0][0, :, 0], [0, 255])


def test_a_cut_file_is_not_whole(tmp_path):
    path = tmp_path / "a.png"
    images.save_png(path, picture(), TEXTS)
    data = path.read_bytes()
    for cut in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert not images.is_whole(path)


def test_text_behind_the_pixels(tmp_path):
    """Where some tools put it: between the pixels and the end."""
    path = tmp_path / "a.png"
    images.save_png(path, picture(), {})
    data = path.read_bytes().removesuffix(images.END)
    chunk = b"tEXtparameters\0a cat"
    data += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + images.END
    path.write_bytes(data)
    assert images.read_texts(path, ("parameters",)) == {"parameters": "a cat"}


def test_files_that_are_no_png(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name in ("jpeg.png", "empty.png", "text.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}: cannot be read") as caught:
            images.read_texts(tmp_path / name, ("sana_jax",))
        assert "\n" not in str(caught.value)


def test_texts_without_measure(tmp_path):
    """A long text, one that unpacks to more than memory should give, and a picture of a billion pixels."""
    path = tmp_path / "a.png"
    images.save_png(path, picture(), {"sana_jax": "x" * (images.LONGEST_TEXT + 1)})
    with pytest.raises(InputError, match="its text 'sana_jax' has 1048577 characters, must have at most 1048576"):
        images.read_texts(path, ("sana_jax",))
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("sana_jax", "x" * 30_000_000, zip=True)
    Image.fromarray(picture()).save(path, pnginfo=bomb)
    with pytest.raises(InputError, match="a.png: cannot be read"):
        images.read_texts(path, ("sana_jax",))
    images.save_png(path, picture(), TEXTS)
    data = bytearray(path.read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    for read in (images.read_picture, lambda p: images.read_texts(p, ("sana_jax",))):
        with pytest.raises(InputError, match="cannot be read .DecompressionBomb"):
            read(path)


def test_pictures_to_begin_with(tmp_path):
    """JPEG and WebP too, turned as a camera says, in three colours."""
    turned = Image.fromarray(np.zeros((2, 4), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera lay on its side
    turned.save(tmp_path / "a.jpg", exif=exif)
    pixels, _ = images.read_picture(tmp_path / "a.jpg")
    assert pixels.shape == (4, 2, 3) and pixels.dtype == np.uint8
    Image.fromarray(picture(9)).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(images.read_picture(tmp_path / "a.webp")[0], picture(9))
    Image.fromarray(picture()).save(tmp_path / "a.gif")
    with pytest.raises(InputError, match="a.gif'?: cannot be read .not one of PNG, JPEG, WEBP"):
        images.read_picture(tmp_path / "a.gif")
    cut = (tmp_path / "a.jpg").read_bytes()[:-60]
    (tmp_path / "cut.jpg").write_bytes(cut)
    with pytest.raises(InputError, match="cut.jpg'?: (broken|cannot be read)"):
        images.read_picture(tmp_path / "cut.jpg")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    images.save_png(path, picture(1), TEXTS)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        images.save_png(path, picture(2), TEXTS)
    if isinstance(error, OSError):
        assert str(caught.value) == f"output={str(path)!r}: cannot be written (No space left on device)"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == before


def find(sheet, colour):
    """(top, left, height, width) of the pixels of a colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=-1))
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def test_a_contact_sheet():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    cells = [(np.full((40, 60, 3), colour, np.uint8), f"steps={i}") for i, colour in enumerate(colours)]
    sheet = images.contact_sheet(cells, 2, "a title")
    places = [find(sheet, colour) for colour in colours]
    assert [place[2:] for place in places] == [(40, 60)] * 4, "whole, and in their size"
    tops, lefts = zip(*(place[:2] for place in places))
    assert tops[0] == tops[1] < tops[2] == tops[3] and lefts[0] == lefts[2] < lefts[1] == lefts[3]
    for top, left, _, width in places:
        strip = sheet[top - 16 : top, left : left + width]
        assert (strip < 128).any(), "a label stands above each picture"
    assert (sheet[:18] < 128).any(), "and the title above all"
    np.testing.assert_array_equal(sheet, images.contact_sheet(cells, 2, "a title"))
    other = images.contact_sheet([(cells[0][0], "steps=9"), *cells[1:]], 2, "a title")
    assert (other != sheet).any(), "labels can be told apart"


def test_a_contact_sheet_of_large_and_absent_pictures():
    large = np.full((1000, 2000, 3), (250, 0, 0), np.uint8)
    sheet = images.contact_sheet([(large, "a"), (None, "b: failed")], 2, "x" * 5000)
    assert find(sheet, (250, 0, 0))[2:] == (256, 512) and sheet.shape[1] < 1100
    assert images.contact_sheet([(None, "failed")], 1, "t").ndim == 3
