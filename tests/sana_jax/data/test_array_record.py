"""Shards of our own: what is written is read, what is damaged is told."""

import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from sana_jax.data import array_record
from sana_jax.data.array_record import ArrayRecord, Writer, pack, unpack, write
from sana_jax.data.folder import Folder
from sana_jax.data.records import BadRecord, Record
from sana_jax.data.synthetic import Synthetic
from sana_jax.errors import InputError
from tests.sana_jax.data.test_folder import PNG, reason
from tests.sana_jax.data.test_folder import write as write_files

RECORD = Record(
    "key é", b"picture", {"prompt": "caption", "other": "é\n"}, {"other": 27.25},
    {
        "latent": np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f2"),
        "states": np.random.default_rng(1).normal(size=(5, 7)).astype("f4"),
        "mask": np.array([True, False, True]), "none": np.zeros((0, 7), "f2"), "number": np.array(7, "i8"),
    },
)  # fmt: skip


def same(a, b):
    assert a[:4] == b[:4] and list(a.arrays) == list(b.arrays)
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name])


@pytest.mark.parametrize("record", [RECORD, Record("bare"), Record("empty", b""), Record("b", b"x")])
def test_what_is_packed_is_unpacked(record):
    data = pack(record, (40, 24))
    same(unpack(data), record)
    assert len(data) % array_record.ALIGNED == 0
    assert all(
        array.ctypes.data % 8 == np.frombuffer(data, "u1").ctypes.data % 8
        for array in unpack(data).arrays.values()
        if array.size
    )


def test_a_bad_record_stays_one():
    with pytest.raises(BadRecord, match="damaged: why"):
        unpack(pack(Record("x"), bad=BadRecord("damaged", "why")))


def hand(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"SJR1" + struct.pack("<I", len(text) if length is None else length) + text + body


FINE = {"key": "k", "captions": {}, "scores": {}, "image": None, "arrays": {}, "bad": None}


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "format"),
        (b"\x89PNG", "format"),
        (b"SJR1", "damaged"),
        (b"SJR1\xff\xff\xff\xff{}", "damaged"),
        (hand(b"{"), "damaged"),
        (hand(b"[" * 100_000), "damaged"),
        (hand([]), "damaged"),
        (hand({}), "damaged"),
        (hand(FINE | {"captions": "a cat"}), "damaged"),
        (hand(FINE | {"arrays": {"a": ["float32", [10**12], 0]}}), "damaged"),
        (hand(FINE | {"arrays": {"a": ["float32", [4], 0]}}, bytes(15)), "damaged"),
        (hand(FINE | {"arrays": {"a": ["object", [1], 0]}}, bytes(16)), "damaged"),
        (hand(FINE | {"arrays": {"a": ["float32", [-1], 0]}}, bytes(16)), "damaged"),
        (hand(FINE | {"arrays": {"a": ["float32", [1], -900]}}, bytes(16)), "damaged"),
        (hand(FINE | {"arrays": {"a": "float32"}}, bytes(16)), "damaged"),
    ],
)
def test_bytes_of_others_are_bad_records(data, expected):
    with pytest.raises(BadRecord) as caught:
        unpack(data)
    assert caught.value.reason == expected


def test_a_folder_becomes_shards(tmp_path):
    write_files(tmp_path / "in", {f"{i}.png": PNG + bytes([i]) for i in range(7)} | {"3.json": "{", "5.txt": "five"})
    source = Folder(str(tmp_path / "in")).open()
    assert write(source, tmp_path / "out", shard_records=3) == {"metadata": 1}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"0000{i}.array_record" for i in range(3)]
    reader = ArrayRecord(str(tmp_path / "out")).open()
    assert len(reader) == 7 and reader.sizes.dtype == np.int32
    np.testing.assert_array_equal(reader.sizes, source.sizes)
    for i in (0, 1, 2, 4, 5, 6):
        same(reader[i], source[i])
        assert reader.key(i) == source.key(i) == f"{i}.png"
    assert reason(reader, 3) == "metadata" and "00001.array_record:0" in reader.key(3)
    copy = pickle.loads(pickle.dumps(reader))
    same(copy[5], source[5])
    assert copy.fingerprint() == reader.fingerprint()
    with pytest.raises(InputError, match="empty or absent"):
        write(source, tmp_path / "out")
    for i in (-1, 7):
        with pytest.raises(IndexError):
            reader[i]
    single = ArrayRecord(str(tmp_path / "out" / "00002.array_record")).open()
    assert len(single) == 1 and single.key(0) == "6.png" and single.fingerprint() != reader.fingerprint()


def test_an_unfinished_shard_is_never_there(tmp_path):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), Writer(tmp_path / "a.array_record") as writer:
        writer.write(RECORD, (1, 1))
        assert not (tmp_path / "a.array_record").exists()
        raise Stop
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shard(tmp_path):
    with Writer(tmp_path / "a.array_record") as writer:
        for i in range(20):
            writer.write(Record(str(i), bytes([i]) * 9000), (8, 8))
    return tmp_path / "a.array_record"


def test_a_flipped_bit_is_one_bad_record(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(bytes([7]) * 3000) + 1000] ^= 4
    flipped = shard.with_name("b.array_record")
    flipped.write_bytes(data)
    reader = ArrayRecord(str(flipped)).open()
    assert reason(reader, 7) == "damaged"
    assert [reader[i].image[0] for i in range(20) if i != 7] == [i for i in range(20) if i != 7]


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"x" * 70_000]
)
def test_a_shard_that_is_not_whole_is_told_before_training(shard, damage):
    cut = shard.with_name("b.array_record")
    cut.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match="b.array_record: no whole shard"):
        ArrayRecord(str(shard.parent)).open()


def test_records_of_somebody_else(tmp_path):
    from array_record.python import array_record_module

    path = tmp_path / "theirs.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"a record")
    writer.close()
    with pytest.raises(InputError, match="no whole shard of sana_jax"):
        ArrayRecord(str(path)).open()
    with pytest.raises(InputError, match="no .array_record"):
        ArrayRecord(str(tmp_path / "..")).open()


def test_the_command(tmp_path):
    write(Synthetic(3, 16).open(), tmp_path / "first")
    command = [sys.executable, "-m", "sana_jax.data.array_record"]
    done = subprocess.run(
        [*command, str(tmp_path / "first"), str(tmp_path / "second")], capture_output=True, text=True, env=os.environ
    )
    assert (done.returncode, done.stdout) == (0, "3 records\n"), done.stderr
    assert array_record.main([str(tmp_path / "absent"), str(tmp_path / "third")]) == 2
    assert ArrayRecord(str(tmp_path / "second")).open()[2] == Synthetic(3, 16).open()[2]
