"""WebDataset tars: the documented members, hostile ones, and damage that Python's own reader does not see."""

import errno
import functools
import io
import json
import os
import pickle
import re
import tarfile
import threading

import numpy as np
import pytest

from sana_jax.data import index, tar, tar_index
from sana_jax.data.captions import usable
from sana_jax.data.tar import Tar
from sana_jax.errors import InputError
from tests.sana_jax.data.pictures import bad_pictures, encoded, scene
from tests.sana_jax.data.test_folder import npy, npz, reason

PNG = encoded(scene(40, 24))


def pack(files, format=tarfile.PAX_FORMAT):
    """The bytes of a tar; a member may be bytes, text or a TarInfo without data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in files if isinstance(files, list) else files.items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def one(tmp_path, files, **fields):
    data = files if isinstance(files, bytes) else pack(files)
    (tmp_path / "s.tar").write_bytes(data)
    return Tar(str(tmp_path / "s.tar"), **fields).open()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_documented_members(tmp_path, format):
    long = "d/" * 40 + "x" * 60 if format == tarfile.USTAR_FORMAT else "long/" * 30 + "é" * 70
    (tmp_path / "00000.tar").write_bytes(
        pack(
            {
                "./a.png": PNG,
                "./a.json": json.dumps({"file_name": "a.png", "prompt": "own", "width": 40, "height": 24}),
                "b.JPEG": encoded(scene(64, 48), "JPEG"),
                "b.txt": "first\nsecond",
                f"{long}.webp": encoded(scene(48, 64), "WEBP"),
                "LICENSE": "not looked at",
            },
            format,
        )
    )
    (tmp_path / "00001.tar").write_bytes(pack({"a.jpg": encoded(scene(32, 32), "JPEG")}, format))
    (tmp_path / "00000_InternVL2-26B.json").write_text(json.dumps({"a": {"prompt": "seen"}, "b": {"Other": "too"}}))
    (tmp_path / "00000_InternVL2-26B_clip_score.json").write_text(json.dumps({"a": {"_InternVL2-26B": 27.5}}))
    (tmp_path / "wids-meta.json").write_text("{}")
    reader = Tar(str(tmp_path)).open()
    assert [reader.key(i) for i in range(4)] == ["00000.tar:a", "00000.tar:b", f"00000.tar:{long}", "00001.tar:a"]
    assert reader.sizes.tolist() == [[40, 24], [64, 48], [48, 64], [32, 32]] and reader.sizes.dtype == np.int32
    assert reader[0].image == PNG and reader[0].captions == {"prompt": "own", "InternVL2-26B": "seen"}
    assert reader[0].scores == {"InternVL2-26B": 27.5} and reader[1].captions == {"prompt": "first", "Other": "too"}
    assert reader[3].captions == {} and reader.notes == {"damage": [], "refused": []}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [], "nothing is extracted"


def test_a_name_beyond_8_gb_and_dots_in_names(tmp_path):
    """GNU's binary numbers; the ending is what follows the last dot."""
    reader = one(tmp_path, {"v1.5.png": PNG, "v1.5.txt": "x", "v1.6.png": PNG})
    assert [reader.key(i) for i in range(2)] == ["s.tar:v1.5", "s.tar:v1.6"] and reader[0].captions == {"prompt": "x"}
    data = bytearray(pack({"a.png": PNG}, tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + len(PNG).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert one(tmp_path, bytes(data))[0].image == PNG


def test_hostile_members_are_refused_and_counted(tmp_path):
    reader = one(
        tmp_path,
        [
            ("good.png", PNG),
            ("/abs.png", PNG),
            ("../up.png", PNG),
            ("d/../../up2.png", PNG),
            ("", special("link.png", tarfile.SYMTYPE, "/etc/passwd")),
            ("", special("hard.png", tarfile.LNKTYPE, "good.png")),
            ("", special("device.png", tarfile.CHRTYPE)),
            ("", special("pipe.png", tarfile.FIFOTYPE)),
            ("", special("dir.png", tarfile.DIRTYPE)),
            ("", special("README", tarfile.SYMTYPE, "good.png")),
            ("last.png", PNG),
        ],
    )
    assert reader[0].image == reader[len(reader) - 1].image == PNG and len(reader) == 9
    for i in range(1, 8):
        assert reason(reader, i) == "unreadable" and reader.sizes[i].tolist() == [0, 0]
    words = [text.rpartition(": ")[2] for text in reader.notes["refused"]]
    assert words == ["a name that leads outside"] * 3 + ["a link", "a hard link", "a device", "a pipe", "a link"]


def test_records_that_are_not_whole(tmp_path):
    reader = one(
        tmp_path,
        [
            ("a.png", PNG),
            ("a.png", PNG),  # the same key and ending again
            ("b.txt", "a caption and no picture"),
            ("c.jpg", b""),
            ("d.jpg", b"<html>"),
            ("e.png", PNG),
            ("e.json", "{"),
            ("f.png", PNG),
            ("f.txt", b"\xff"),
            ("._a.png", "of another system"),
        ],
    )
    assert len(reader) == 7 and reader.sizes[1:4].tolist() == [[0, 0]] * 3
    assert reason(reader, 1) == "duplicate" and reason(reader, 2) == "unreadable"
    assert reader[3].image == b"" and reader[4].image == b"<html>"
    assert reason(reader, 5) == "metadata" and reason(reader, 6, choose=True) == "caption"


def test_bad_pictures_keep_their_places(tmp_path):
    bad = bad_pictures()
    reader = one(tmp_path, {f"{i:02d}.png": data for i, (data, _) in enumerate(bad.values())} | {"zz.png": PNG})
    assert len(reader) == len(bad) + 1 and reader.sizes[-1].tolist() == [40, 24]
    assert [reader[i].image for i in range(len(bad))] == [data for data, _ in bad.values()]


def body(count=4):
    return {f"{i}.png": PNG for i in range(count)} | {f"{i}.txt": "x" for i in range(count)}


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WHOLE = pack(body())
END = len(WHOLE.rstrip(b"\0")) // 512 * 512 + 512  # where the end mark begins
DAMAGED = {
    "cut within a member": (WHOLE[:700], "cut short within the member"),
    "cut within a header": (WHOLE[: END - 512 * 2 + 100], "cut short at byte"),
    "cut between members": (WHOLE[: END - 1024], "no end mark"),
    "without an end mark": (WHOLE[:END], "no end mark"),
    "half an end mark": (WHOLE[: END + 512], "half an end mark"),
    "a flipped bit in a name": (flip(WHOLE, END - 1024 + 3), "damaged header"),
    "a flipped bit in a size": (flip(WHOLE, END - 1024 + 130), "damaged header"),
    "a header of junk": (WHOLE[: END - 1024] + b"\xa5" * 512 + WHOLE[END - 512 :], "damaged header"),
    "two archives in one": (WHOLE + WHOLE, "data after the end mark"),
    "zeros in the middle": (WHOLE[: END - 1024] + bytes(1024) + WHOLE[END - 1024 :], "data after the end mark"),
    "no tar at all": (b"PK\x03\x04" + bytes(2000), "damaged header"),
    "an empty file": (b"", "no end mark"),
    "a pax header of junk": (re.sub(rb"\d{3} path=", b"999 path=", pack({"é" * 200 + ".png": PNG})), "damaged header"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_before_training(tmp_path, name):
    data, words = DAMAGED[name]
    with pytest.raises(InputError, match=words) as caught:
        one(tmp_path, data)
    assert "allow_damaged" in str(caught.value) and "s.tar" in str(caught.value)


@pytest.mark.parametrize("blocks", [2, 3, 20, 64])
def test_whole_archives_pass(tmp_path, blocks):
    """Negative control: padding of any length is no damage."""
    assert len(one(tmp_path, WHOLE[:END] + bytes(512 * blocks))) == 4


def test_the_standard_library_does_not_see_it():
    """Why there is a reader of our own: of a damaged header it makes an early end."""
    data = DAMAGED["a flipped bit in a name"][0]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert len(archive.getnames()) == 7


def test_damaged_tars_can_be_used_up_to_the_damage(tmp_path):
    data = DAMAGED["a flipped bit in a name"][0]
    reader = one(tmp_path, data, allow_damaged=True)
    assert len(reader) == 4 and reader[3].captions == {} and reader[2].captions == {"prompt": "x"}
    assert "damaged header" in reader.notes["damage"][0]
    with pytest.raises(InputError, match="damaged header"):  # the index is there now, and remembers
        Tar(str(tmp_path / "s.tar")).open()
    with pytest.raises(InputError, match="no samples"):
        one(tmp_path, bytes(1024), allow_damaged=True)


def test_bad_files_beside_a_tar(tmp_path):
    (tmp_path / "s_x.json").write_text("{")
    with pytest.raises(InputError, match="s_x.json: metadata: JSON"):
        one(tmp_path, body())
    (tmp_path / "s_x.json").write_text(
        json.dumps({"0": "text", "1": {"x": True}, "2": {"x": 1e999}, "3": {"x": "fine"}})
    )
    reader = one(tmp_path, body())
    assert reason(reader, 0) == reason(reader, 2) == "metadata" and reason(reader, 1, choose=True) == "caption"
    assert usable(reader[3]) == {"prompt": "x", "x": "fine"}


@pytest.mark.parametrize("what", ["header", "side"])
def test_an_io_error_is_not_remembered(tmp_path, monkeypatch, what):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "s_x.json").write_text("{}")
    target = (tar_index.images, "read_header") if what == "header" else (tar_index.side_files, "parse_json")
    monkeypatch.setattr(*target, fails)
    with pytest.raises(InputError, match=r"s(_x\.json|\.tar): cannot be read \(EIO, Input") as caught:
        one(tmp_path, body(), allow_damaged=True)
    assert ("s_x.json" in str(caught.value)) == (what == "side")
    monkeypatch.undo()
    assert Tar(str(tmp_path)).open().sizes.tolist() == [[40, 24]] * 4


def test_features(tmp_path):
    latent = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("f2")
    files = {
        "a.npy": npy(latent),
        "a.npz": npz(caption_feature=np.ones((1, 5, 3))),
        "a.json": '{"prompt": "x"}',
        "b.png": PNG,
        "c.npy": b"x",
    }
    reader = one(tmp_path, files, features=True)
    assert (
        reader.sizes.tolist() == [[192, 128], [0, 0], [0, 0]] and reason(reader, 1) == reason(reader, 2) == "features"
    )
    np.testing.assert_array_equal(reader[0].arrays["latent"], latent.transpose(1, 2, 0))
    assert reader[0].arrays["states"].shape == (5, 3) and reader[0].arrays["mask"].all()


def test_headers_are_read_once_and_changes_noticed(tmp_path, monkeypatch):
    built, real = [], tar_index.build
    monkeypatch.setattr(
        tar_index, "build", lambda path, *rest: (built.append(os.path.basename(path)), real(path, *rest))[1]
    )
    for name in ("x", "y"):
        (tmp_path / f"{name}.tar").write_bytes(WHOLE)
    first = Tar(str(tmp_path)).open()
    assert sorted(built) == ["x.tar", "y.tar"]
    assert Tar(str(tmp_path)).open().fingerprint() == first.fingerprint() and len(built) == 2
    (tmp_path / "x_cap.json").write_text(json.dumps({"0": {"cap": "new"}}))
    second = Tar(str(tmp_path)).open()
    assert built[2:] == ["x.tar"] and second.fingerprint() != first.fingerprint()
    assert second[0].captions == {"prompt": "x", "cap": "new"}
    (tmp_path / "y.tar").write_bytes(pack(body(5)))
    assert built[2:] == ["x.tar"] and len(Tar(str(tmp_path)).open()) == 9 and built[3:] == ["y.tar"]


def test_a_tar_that_changes_under_a_run_is_a_bad_record(tmp_path):
    reader = one(tmp_path, WHOLE)
    os.truncate(tmp_path / "s.tar", 600)
    assert reason(reader, 0) == "unreadable"
    (tmp_path / "s.tar").unlink()
    assert reason(pickle.loads(pickle.dumps(reader)), 0) == "unreadable"


def test_readers_are_small_and_work_in_many_threads(tmp_path, monkeypatch):
    """More tars than may be open at once."""
    monkeypatch.setattr(tar, "_open", functools.lru_cache(maxsize=2)(tar._File))
    for shard in range(5):
        (tmp_path / f"{shard}.tar").write_bytes(pack({f"{shard}-{i}.png": PNG + bytes([shard, i]) for i in range(4)}))
    reader = pickle.loads(pickle.dumps(Tar(str(tmp_path)).open()))
    assert len(pickle.dumps(reader)) < 5000
    wrong = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, len(reader), 200):
            shard, row = divmod(int(i), 4)
            if reader[int(i)].image != PNG + bytes([shard, row]) or not reader.key(i).endswith(f"{shard}-{row}"):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "make, words", [(lambda path: path, "no .tar"), (lambda path: path / "absent", "no such folder")]
)
def test_nothing_to_read(tmp_path, make, words):
    with pytest.raises(InputError, match=words):
        Tar(str(make(tmp_path))).open()


def test_only_the_ends_of_the_list_are_records(tmp_path):
    reader = one(tmp_path, WHOLE)
    for i in (-1, 4):
        with pytest.raises(IndexError):
            reader[i]
    assert index.read(str(tmp_path / "absent")) is None
