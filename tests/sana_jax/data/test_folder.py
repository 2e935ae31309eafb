"""Folders: the documented files, what is wrong with them, and an index that notices changes."""

import errno
import io
import json
import os
import pickle

import numpy as np
import pytest

from sana_jax.data import folder as folder_module
from sana_jax.data import index
from sana_jax.data.captions import Captions, usable
from sana_jax.data.folder import Folder
from sana_jax.data.records import BadRecord
from sana_jax.errors import InputError
from tests.sana_jax.data.pictures import bad_pictures, encoded, scene


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def reason(reader, i, choose=False):
    with pytest.raises(BadRecord) as caught:
        record = reader[i]
        if choose:
            usable(record)
    return caught.value.reason


PNG = encoded(scene(40, 24))


def test_the_documented_files(tmp_path):
    write(
        tmp_path,
        {
            "a.png": PNG,
            "a.txt": "\ufeffthe first line\nand another",
            "a_InternVL2-26B.json": json.dumps({"a": {"InternVL2-26B": "seen by one"}}),
            "a_VILA1-5-13B.json": json.dumps({"a": {"prompt": "seen by another"}, "other": {}}),
            "a_InternVL2-26B_clip_score.json": json.dumps({"a": {"InternVL2-26B": 27.1, "_VILA1-5-13B": 26}}),
            "a_prompt_clip_score.json": json.dumps({"a": {"prompt": 25.5}}),
            "b.JPG": encoded(scene(64, 48), "JPEG"),
            "b.json": json.dumps({"prompt": "of b", "width": 64, "file_name": "b.JPG"}),
            "c.webp": encoded(scene(48, 64), "WEBP"),
            "notes.md": "not looked at",
            ".hidden.png": PNG,
            "inside/d.png": PNG,
        },
    )
    reader = Folder(str(tmp_path)).open()
    assert [reader.key(i) for i in range(len(reader))] == ["a.png", "b.JPG", "c.webp"]
    assert reader.sizes.dtype == np.int32 and reader.sizes.tolist() == [[40, 24], [64, 48], [48, 64]]
    record = reader[0]
    assert record.image == PNG and record.key == "a.png"
    captions = {"prompt": "the first line", "InternVL2-26B": "seen by one", "VILA1-5-13B": "seen by another"}
    assert record.captions == captions
    assert record.scores == {"InternVL2-26B": 27.1, "VILA1-5-13B": 26.0, "prompt": 25.5}
    assert reader[1].captions == {"prompt": "of b"} and reader[2].captions == {}
    deep = Folder(str(tmp_path), recursive=True).open()
    assert deep.key(3) == os.path.join("inside", "d.png") and len(deep) == 4


def test_a_side_file_belongs_to_the_longest_stem(tmp_path):
    write(
        tmp_path, {"a.png": PNG, "a_b.png": PNG, "a_b.json": '{"prompt": "of a_b"}', "a_c.json": '{"a": {"c": "of a"}}'}
    )
    reader = Folder(str(tmp_path)).open()
    assert reader[0].captions == {"c": "of a"} and reader[1].captions == {"prompt": "of a_b"}


def test_other_keys_can_be_captions(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.json": '{"prompt": "p", "caption": "c", "url": "u"}'})
    assert Folder(str(tmp_path), caption_keys=("caption",)).open()[0].captions == {"caption": "c"}


def test_bad_pictures_keep_their_places(tmp_path):
    bad = bad_pictures()
    write(
        tmp_path,
        {f"{i:02d}.png": data for i, (data, _) in enumerate(bad.values())} | {"good.png": PNG, "good.txt": "x"},
    )
    reader = Folder(str(tmp_path)).open()
    assert len(reader) == len(bad) + 1 and reader.sizes[-1].tolist() == [40, 24]
    for size, (name, (_, why)) in zip(reader.sizes, bad.items()):
        if why in ("format", "empty", "too_large", "too_small") or "header" in name and "bad" not in name:
            assert size.tolist() == [0, 0], name
    assert usable(reader[len(bad)]) == {"prompt": "x"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"a.json": "{"}, "metadata"),
        ({"a.json": "[" * 100_000}, "metadata"),
        ({"a.json": '{"a":' * 100_000}, "metadata"),
        ({"a.json": "[1, 2]"}, "metadata"),
        ({"a.json": '"prompt"'}, "metadata"),
        ({"a.json": b'{"prompt": "\xff"}'}, "metadata"),
        ({"a.json": '{"prompt": ' + "1" * 5000 + "}"}, "metadata"),
        ({"a.json": ""}, "empty"),
        ({"a.txt": ""}, "caption"),
        ({"a.txt": " \t\n"}, "caption"),
        ({"a.txt": "\nsecond line"}, "caption"),
        ({"a.txt": b"caf\xe9"}, "caption"),
        ({"a.txt": "a\0b"}, "caption"),
        ({"a.txt": "x" * (5 << 20)}, "too_large"),
        ({"a.json": '{"url": "no prompt"}'}, "caption"),
        ({"a.json": '{"prompt": 3}'}, "caption"),
        ({"a.json": '{"prompt": null}'}, "caption"),
        ({"a.json": '{"prompt": ["a"]}'}, "caption"),
        ({"a.json": '{"prompt": "a\\u0000b"}'}, "caption"),
        ({"a.json": '{"prompt": "\\ud800"}'}, "caption"),
        ({}, "caption"),
        ({"a_x.json": '{"b": {"x": "of b"}}'}, "metadata"),
        ({"a_x.json": '{"a": "text"}'}, "metadata"),
        ({"a_x.json": '{"a": {"x": NaN}}'}, "metadata"),
    ],
)
def test_bad_captions_are_bad_records(tmp_path, files, expected):
    write(tmp_path, {"a.png": PNG} | files)
    assert reason(Folder(str(tmp_path)).open(), 0, choose=True) == expected


def test_an_empty_text_file_is_no_caption(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "", "a.json": '{"prompt": "of a"}', "b.png": PNG, "b.txt": ""})
    reader = Folder(str(tmp_path)).open()
    assert reader[0].captions == {"prompt": "of a"} and reader[1].captions == {}


def test_long_captions_are_cut(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "x" * (1 << 20)})
    name, text = Captions().choose(Folder(str(tmp_path)).open()[0], np.random.default_rng(0))
    assert name == "prompt" and text == "x" * 10_000


def test_what_is_no_plain_file(tmp_path):
    write(tmp_path, {"a.png": PNG})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "absent")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    reader = Folder(str(tmp_path)).open()
    keys = [reader.key(i) for i in range(len(reader))]
    assert keys == ["a.png", "link.png", "nowhere.png", "pipe.png"]
    assert reader.sizes.tolist() == [[40, 24], [40, 24], [0, 0], [0, 0]]
    assert reason(reader, 2) == reason(reader, 3) == "unreadable" and reader[1].image == PNG


def test_folders_of_folders_may_link_to_each_other(tmp_path):
    write(tmp_path, {"x/a.png": PNG})
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    assert len(Folder(str(tmp_path), recursive=True).open()) == 1


def test_a_file_that_goes_away_is_a_bad_record(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "x"})
    reader = Folder(str(tmp_path)).open()
    (tmp_path / "a.txt").unlink()
    assert reason(reader, 0) == "unreadable"


def test_features(tmp_path):
    latent, states = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("f2"), np.ones((1, 5, 3), "f4")
    write(
        tmp_path,
        {"a.png": PNG, "a.npy": npy(latent), "a.npz": npz(caption_feature=states, attention_mask=[[[1, 1, 1, 0, 0]]])},
    )
    write(tmp_path, {"b.png": PNG, "b.npy": npy(latent[None].astype("f4")), "c.png": PNG})
    reader = Folder(str(tmp_path), features=True).open()
    assert reader.sizes.tolist() == [[192, 128], [192, 128], [0, 0]]
    record = reader[0]
    assert record.image is None and record.arrays["states"].shape == (5, 3)
    assert record.arrays["mask"].tolist() == [True, True, True, False, False]
    np.testing.assert_array_equal(record.arrays["latent"], latent.transpose(1, 2, 0))
    assert "states" not in reader[1].arrays and reader[1].arrays["latent"].shape == (4, 6, 2)
    assert reason(reader, 2) == "features"
    scaled = Folder(str(tmp_path), features=True, latent_scale=0.5).open()[0].arrays["latent"]
    np.testing.assert_array_equal(scaled, latent.transpose(1, 2, 0) * np.float16(2))
    assert Folder(str(tmp_path)).open()[0].arrays == {}


LATENT = npy(np.zeros((2, 4, 6), "f2"))


@pytest.mark.parametrize(
    "files",
    [
        {"a.npy": b"\x80\x04]q\0."},
        {"a.npy": LATENT[:-1]},
        {"a.npy": LATENT + b"x"},
        {"a.npy": LATENT.replace(b"(2, 4, 6)", b"(2, 4, 9999999999999)".ljust(9))},
        {"a.npy": npy(np.zeros((2, 3)))},
        {"a.npy": npy(np.zeros((2, 2, 4, 6)))},
        {"a.npy": npy(np.array([[["x"]]]))},
        {
            "a.npy": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,1,1), }".ljust(128, b" ")
            + bytes(8)
        },
        {"a.npy": LATENT, "a.npz": b"PK\x03\x04 no zip"},
        {"a.npy": LATENT, "a.npz": npz(attention_mask=np.ones(3))},
        {"a.npy": LATENT, "a.npz": npz(caption_feature=np.ones((2, 3, 4)))},
        {"a.npy": LATENT, "a.npz": npz(caption_feature=np.ones((3, 4)), attention_mask=np.ones(2))},
    ],
)
def test_bad_features_are_bad_records(tmp_path, files):
    write(tmp_path, {"a.png": PNG} | files)
    assert reason(Folder(str(tmp_path), features=True).open(), 0) == "features"


def test_headers_are_read_once(tmp_path, index_folder, monkeypatch):
    write(tmp_path, {f"{name}.png": encoded(scene(40, 24 + i)) for i, name in enumerate("abc")})
    read = []
    real = folder_module._picture_size
    monkeypatch.setattr(
        folder_module, "_picture_size", lambda path: (read.append(os.path.basename(path)), real(path))[1]
    )
    first = Folder(str(tmp_path)).open()
    assert sorted(read) == ["a.png", "b.png", "c.png"]
    read.clear()
    assert Folder(str(tmp_path)).open().fingerprint() == first.fingerprint() and read == []

    write(tmp_path, {"b.png": encoded(scene(40, 99)), "d.png": PNG})
    second = Folder(str(tmp_path)).open()
    assert sorted(read) == ["b.png", "d.png"] and second.sizes[1].tolist() == [40, 99]
    assert second.fingerprint() != first.fingerprint()
    read.clear()
    (tmp_path / "a.png").unlink()
    assert len(Folder(str(tmp_path)).open()) == 3 and read == []
    assert [path.suffix for path in index_folder.iterdir()] == [".index"], "earlier ones and partial ones are gone"
    assert [second.key(i) for i in range(4)] == ["a.png", "b.png", "c.png", "d.png"], "it is still mapped"


@pytest.mark.parametrize("features", [False, True])
def test_an_io_error_is_not_remembered(tmp_path, index_folder, monkeypatch, features):
    """A network file system that fails for a moment must not give other sizes, and another order, for good."""
    write(tmp_path, {"a.png": PNG, "a.npy": LATENT, "b.png": b"no picture", "b.npy": b"no latent"})
    real = folder_module._open

    def fails(path):
        if os.path.basename(path).startswith("a."):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(folder_module, "_open", fails)
    with pytest.raises(InputError, match=rf"a\.{'npy' if features else 'png'}: cannot be read \(ESTALE, Stale"):
        Folder(str(tmp_path), features=features).open()
    assert list(index_folder.glob("*.index")) == []
    monkeypatch.undo()
    sizes = Folder(str(tmp_path), features=features).open().sizes.tolist()
    assert sizes == [[192, 128] if features else [40, 24], [0, 0]], "what is bad in content is 0 0"


def test_the_fingerprint_is_of_the_contents_not_of_the_place(tmp_path):
    for name in "xy":
        write(tmp_path / name, {"a.png": PNG, "a.txt": "one"})
    one, two = (Folder(str(tmp_path / name)).open() for name in "xy")
    assert one.fingerprint() == two.fingerprint()
    write(tmp_path / "x", {"a.txt": "longer"})
    assert Folder(str(tmp_path / "x")).open().fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:50],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[:-1],
        lambda data: data[:-8] + bytes(8),
    ],
)
def test_a_damaged_index_is_made_again(tmp_path, index_folder, damage, monkeypatch):
    write(tmp_path, {"a.png": PNG, "b.png": PNG})
    Folder(str(tmp_path)).open()
    (path,) = index_folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    index._map.cache_clear()  # as in the next process
    reader = Folder(str(tmp_path)).open()
    assert reader.sizes.tolist() == [[40, 24]] * 2 and reader[1].key == "b.png"


def test_readers_can_be_pickled(tmp_path):
    write(tmp_path, {f"{i:03d}.png": PNG for i in range(200)})
    reader = Folder(str(tmp_path)).open()
    data = pickle.dumps(reader)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy[7].key == "007.png" and copy.fingerprint() == reader.fingerprint()
    np.testing.assert_array_equal(copy.sizes, reader.sizes)


@pytest.mark.parametrize(
    "name, word", [("absent", "no such folder"), ("deep", "1 folders inside: recursive"), ("empty", "no .jpeg")]
)
def test_nothing_to_read(tmp_path, name, word):
    write(tmp_path, {"deep/x/a.png": PNG, "empty/notes.md": "x"})
    with pytest.raises(InputError, match=word):
        Folder(str(tmp_path / name)).open()
