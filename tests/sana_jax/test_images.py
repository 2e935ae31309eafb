"""PNG files: whole or absent, with their recipe, under names that are free."""

import os

import numpy as np
import pytest
from PIL import Image

from sana_jax import images
from sana_jax.errors import InputError

RECORD = {
    "prompt": "ein Häuschen\nim 雪 \"q\" \\", "negative_prompt": "", "steps": 3, "sampler": "flow-euler", "guidance_scale": 1.0,
    "seed": 5, "width": 3, "height": 2, "model": "/models/toy", "versions": {"sana_jax": "0"},
}  # fmt: skip


def picture(value=0):
    return np.full((2, 3, 3), value, np.uint8)


def test_what_is_written_is_read(tmp_path):
    path, image = tmp_path / "new" / "folder" / "a.png", np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    images.save_png(path, image, RECORD)
    np.testing.assert_array_equal(Image.open(path), image)
    assert images.read_record(path) == RECORD
    with Image.open(path) as file:
        assert file.text["parameters"] == (
            f"{RECORD['prompt']}\nSteps: 3, Sampler: flow-euler, CFG scale: 1.0, Seed: 5, Size: 3x2, "
            "Model: toy, Version: sana_jax 0"
        )
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_pictures_without_a_recipe(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "plain.png")
    Image.fromarray(picture()).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("plain.png", "jpeg.png", "empty.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}: not a PNG that sana_jax wrote") as caught:
            images.read_record(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    images.save_png(path, picture(1), RECORD)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        images.save_png(path, picture(2), RECORD)
    if isinstance(error, OSError):
        assert str(caught.value) == f"output={str(path)!r}: cannot be written (No space left on device)"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == before


def names(*arguments):
    return [path.name for path in images.output_paths(*arguments)]


def test_numbers_go_on_where_they_ended(tmp_path):
    assert names(tmp_path, 2, 7) == ["00000_7.png", "00001_7.png"]
    for name in ("00004_1.png", "9_2.jpg", "note_1.png", "x00009_1.png"):
        (tmp_path / name).touch()
    assert names(tmp_path, 2, 7) == ["00005_7.png", "00006_7.png"]
    (tmp_path / "123456_0.png").touch()
    assert names(tmp_path, 1, 7) == ["123457_7.png"]


def test_one_file_and_several(tmp_path):
    assert images.output_paths(tmp_path / "a.png", 1, 7) == [tmp_path / "a.png"]
    assert names(tmp_path / "a.b.PNG", 2, 7) == ["a.b-0.PNG", "a.b-1.PNG"]
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "v1.5").mkdir()
    for folder in ("folder.png", "v1.5"):
        assert images.output_paths(tmp_path / folder, 1, 7) == [tmp_path / folder / "00000_7.png"]


def test_asking_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names(None, 1, 0) == ["00000_0.png"] and images.output_paths(None, 1, 0)[0].parent.name == "outputs"
    for output in ("a/b/c", "a/b.png", "a", "", "."):
        assert len(images.output_paths(output, 3, 0)) == 3
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for output in ("file", "file/a.png", "file/a/b", "file/a/b.png"):
        with pytest.raises(InputError, match="output=.*: cannot be written .Not a directory.$"):
            images.output_paths(tmp_path / output, 1, 0)
    for output in ("a.jpg", "a.png.txt", "a.webp"):
        with pytest.raises(InputError, match="must end in .png, or be a folder"):
            images.output_paths(tmp_path / output, 1, 0)
    with pytest.raises(InputError, match="cannot be written .File name too long"):
        images.output_paths(tmp_path / ("a" * 300), 1, 0)
