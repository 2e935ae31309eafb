"""Which pictures a run has, what they are called, and what is painted at once."""

import numpy as np
import pytest

from sana_jax import images, requests
from sana_jax.cli import jobs, records
from sana_jax.cli.painting import Sheets
from sana_jax.cli.prompt_files import Entry
from sana_jax.errors import InputError

SETTINGS = records.SETTINGS | {"prompt": "cat", "seed": 7}
ENTRIES = [Entry("line 1", "00001", "one"), Entry("line 4", "00004", "two"), Entry("id 'c'", "c", "three", "blur", 3)]


def names(entries=None, axes=None, count=1, output=None, folder="out"):
    output = (jobs.pathlib.Path(folder), None) if output is None else jobs.check_output(output)
    return [p.path.name for p in jobs.pictures(entries, SETTINGS, axes or {}, count, output)]


def test_numbers_go_on_where_they_ended(tmp_path):
    assert names(count=2, folder=tmp_path) == ["00000_7.png", "00001_7.png"]
    for name in ("00004_1.png", "9_2.jpg", "note_1.png", "x00009_1.png"):
        (tmp_path / name).touch()
    assert names(count=2, folder=tmp_path) == ["00005_7.png", "00006_7.png"]
    (tmp_path / "123456_0.png").touch()
    assert names(folder=tmp_path) == ["123457_7.png"]


def test_the_next_number_where_one_is_taken(tmp_path):
    assert jobs.next_path(tmp_path / "00003_7_a_b.png") == tmp_path / "00004_7_a_b.png"
    (tmp_path / "00009_1.png").touch()
    assert jobs.next_path(tmp_path / "00003_7.png") == tmp_path / "00010_7.png"
    assert jobs.next_path(tmp_path / "99999_7.png") == tmp_path / "100000_7.png"


def test_one_file_and_several(tmp_path):
    assert names(output=tmp_path / "a.png") == ["a.png"]
    assert names(output=tmp_path / "a.b.PNG", count=2) == ["a.b-0.png", "a.b-1.png"]
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "v1.5").mkdir()
    for folder in ("folder.png", "v1.5"):
        assert jobs.check_output(tmp_path / folder) == (tmp_path / folder, None)


def test_asking_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert jobs.check_output(None)[0].name == "outputs"
    for output in ("a/b/c", "a/b.png", "a", "", "."):
        jobs.check_output(output)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for output in ("file", "file/a.png", "file/a/b", "file/a/b.png"):
        with pytest.raises(InputError, match="output=.*: cannot be written .Not a directory.$"):
            jobs.check_output(tmp_path / output)
    for output in ("a.jpg", "a.png.txt", "a.webp"):
        with pytest.raises(InputError, match="must end in .png, or be a folder"):
            jobs.check_output(tmp_path / output)
    with pytest.raises(InputError, match="cannot be written .File name too long"):
        jobs.check_output(tmp_path / ("a" * 300))


def test_pictures_of_a_file_are_named_after_its_prompts(tmp_path):
    found = jobs.pictures(ENTRIES, SETTINGS, {}, 1, (tmp_path, None))
    assert [p.path.name for p in found] == ["00001.png", "00004.png", "c.png"]
    assert [(p.settings["prompt"], p.settings["negative_prompt"], p.settings["seed"]) for p in found] == [
        ("one", "", 7), ("two", "", 7), ("three", "blur", 3)
    ]  # fmt: skip
    assert [p.settings["index"] for p in found] == [0, 0, 0], "a picture does not depend on its line"
    assert names(ENTRIES, count=2, folder=tmp_path) == [f"{e.name}-{i}.png" for e in ENTRIES for i in (0, 1)]
    with pytest.raises(InputError, match="output=.*a.png.: must be a folder"):
        names(ENTRIES, output=tmp_path / "a.png")
    with pytest.raises(InputError, match="id 'c': sets seed, which --grid sets too"):
        names(ENTRIES, axes={"seed": [1, 2]}, folder=tmp_path)


def test_a_grid_is_a_product_in_order(tmp_path):
    axes = {"guidance_scale": [2.0, 4.5], "sampler": ["flow-euler", "flow-dpm-solver"]}
    found = jobs.pictures(ENTRIES[:1], SETTINGS, axes, 2, (tmp_path, None))
    labels = [f"guidance-scale={w} sampler={s}" for w in ("2", "4.5") for s in ("flow-euler", "flow-dpm-solver")]
    assert [p.label for p in found] == [f"{label} image {i}" for label in labels for i in (0, 1)]
    assert found[2].path.name == "00001_guidance-scale=2_sampler=flow-dpm-solver-0.png"
    assert {p.sheet.name for p in found} == {"00001_grid.png"}
    assert [p.settings["guidance_scale"] for p in found] == [2.0] * 4 + [4.5] * 4
    found = jobs.pictures(None, SETTINGS, {"seed": [5, 6]}, 1, (tmp_path, None))
    assert [p.path.name for p in found] == ["00000_5_seed=5.png", "00001_6_seed=6.png"]
    assert found[0].sheet.name == "00002_7_grid.png"


def test_batches_hold_what_can_be_painted_at_once(tmp_path):
    found = jobs.pictures(ENTRIES, SETTINGS, {"steps": [2, 3]}, 3, (tmp_path, None))
    batches = jobs.batches(found, 4)
    assert sorted(p.path for b in batches for p in b.rows) == sorted(p.path for p in found), "each of them once"
    assert [(b.settings["steps"], b.settings["seed"], len(b.rows)) for b in batches] == [
        (2, 7, 4), (3, 7, 4), (2, 7, 2), (3, 7, 2), (2, 3, 3), (3, 3, 3)
    ]  # fmt: skip
    first, last = batches[0], batches[-1]
    assert first.described == {"prompts": ["one"] * 3 + ["two"], "negative_prompts": [""] * 4, "indices": [0, 1, 2, 0]}
    assert last.described == {"prompts": ["three"], "negative_prompts": ["blur"], "indices": [0, 1, 2]}
    call = jobs.call(first)
    assert (call["prompts"], call["num_images"], call["first_image"]) == (["one"] * 3 + ["two"], 1, [0, 1, 2, 0])
    call = jobs.call(last)
    assert (call["prompts"], call["num_images"], call["first_image"]) == (["three"], 3, [0, 1, 2])
    # A batch of which some are there already is still the same call.
    kept = first.keep(found[1:2])
    assert kept.kept == [found[1]] and kept.rows == [None, found[1], None, None] and jobs.call(kept) == jobs.call(first)


def test_settings_are_checked_for_every_cell(tmp_path):
    found = jobs.pictures(None, SETTINGS, {"steps": [2, 5000]}, 1, (tmp_path, None))
    with pytest.raises(InputError, match="steps=5000"):
        jobs.check(found)
    jobs.check(found[:1])


def test_a_sheet_is_written_with_its_last_picture(tmp_path):
    axes = {"steps": [2, 3], "seed": [1, 2, 3]}
    found = jobs.pictures(ENTRIES[:2], SETTINGS, axes, 2, (tmp_path, None))
    shades = {}

    def paint(picture):
        shades[picture.path] = 10 * (len(shades) + 1), 0, 99
        images.save_png(picture.path, np.full((8, 8, 3), shades[picture.path], np.uint8), {})

    failed = found[4]
    for picture in found[:6]:  # an earlier run
        if picture is not failed:
            paint(picture)
    sheets = Sheets(found, axes, 2, pending=[failed, *found[6:]])
    for picture in found[6:]:
        assert sheets.written == [tmp_path / "00001_grid.png"] * (picture in found[12:])
        paint(picture)
        sheets.done(picture, picture.path)
        sheets.done(failed, None)
    assert sheets.written == [tmp_path / "00001_grid.png", tmp_path / "00004_grid.png"]
    sheet = images.read_picture(tmp_path / "00001_grid.png")[0]

    def place(picture):
        rows, columns = np.nonzero((sheet == shades[picture.path]).all(axis=-1))
        return rows.min(), columns.min()

    # Two rows of images for each value of steps, seeds from left to right.
    places = np.array([place(p) if p is not failed else (-1, -1) for p in found[:12]]).reshape(2, 3, 2, 2)
    tops, lefts = places[..., 0], places[..., 1]
    assert (tops[:, 0] == tops[:, 1]).all() and tops[0, 0, 0] < tops[0, 0, 1] < tops[1, 0, 0] < tops[1, 0, 1]
    assert (lefts[1, 0] < lefts[1, 1]).all() and (lefts[1, 1] < lefts[1, 2]).all() and (lefts[0, 0] == lefts[1, 0]).all()
    with pytest.raises(InputError, match="00001_grid.png: is a contact sheet; give one of its pictures: .*steps=2_seed=1-0"):
        records.read(tmp_path / "00001_grid.png")
    # All are there but the sheet: it is written at once.
    (tmp_path / "00004_grid.png").unlink()
    assert Sheets(found, axes, 2, pending=[]).written == [tmp_path / "00004_grid.png"]


def test_numbers_of_images():
    """`first_image` of a call, as a number or as all of them."""
    assert requests.image_numbers(5, 3).tolist() == [5, 6, 7]
    assert requests.image_numbers([4, 4, 0], 3).tolist() == [4, 4, 0]
    with pytest.raises(InputError, match="first_image: lists 2 numbers for 3 images"):
        requests.image_numbers([1, 2], 3)
    for wrong in (-1, [0, -1], "3", [1.5], 2**40):
        with pytest.raises(InputError, match="first_image="):
            requests.check_request(first_image=wrong)
