"""Shards of records in ArrayRecord files: what reads fastest, from disks and network file systems.

    python -m sana_jax.data.array_record FOLDER OUT      pictures or tars of FOLDER as shards in OUT

One record of ours (docs/data.md) is

    b"SJR1"  length of the header, 4 bytes, little-endian  header, JSON  padding to 16  pieces, each padded to 16

with the header {"key", "size": [width, height], "captions": {}, "scores": {}, "image": [offset, bytes]
or null, "arrays": {name: [dtype, shape, offset]}, "bad": [reason, detail] or null}, offsets counted
from the first piece.  The last record of a shard is an array "sizes" of all sizes.  The container
has checksums, so that what a disk has damaged is an error and not a picture.
"""

import argparse
import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import struct
import sys

import numpy as np
import tqdm
from array_record.python import array_record_module

from sana_jax.data.folder import THREADS, scan
from sana_jax.data.records import BadRecord, Record
from sana_jax.errors import InputError

ENDING = ".array_record"
MAGIC = b"SJR1"
ALIGNED = 16
# One record a group: a read fetches nothing else.  Pictures and latents do not get smaller.
WRITE = "group_size:1,uncompressed"
READ = "readahead_buffer_size:0,max_parallelism:0"
OPEN_FILES = 256  # of a process
DTYPES = ("bool", "float16", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


def pack(record, size=(0, 0), bad=None):
    """The bytes of a Record; `bad`: a BadRecord that reading it shall raise."""
    pieces, at = [], 0

    def place(data):
        nonlocal at
        start, padding = at, -len(data) % ALIGNED
        pieces.append(data + b"\0" * padding)
        at += len(data) + padding
        return start

    header = {
        "key": record.key,
        "size": [int(side) for side in size],
        "captions": record.captions,
        "scores": record.scores,
        "image": None if record.image is None else [place(record.image), len(record.image)],
        "arrays": {
            n: [str(a.dtype), list(a.shape), place(np.ascontiguousarray(a).tobytes())] for n, a in record.arrays.items()
        },
        "bad": None if bad is None else [bad.reason, bad.detail],
    }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *pieces])


def unpack(data):
    """The Record of `pack`'s bytes; arrays are views of them.  Raises BadRecord."""
    if data[:4] != MAGIC:
        raise BadRecord("format", "no record of sana_jax.data.array_record")
    try:
        start = 8 + struct.unpack("<I", data[4:8])[0]
        header = json.loads(data[8:start])
        arrays = {name: _view(data, start, *told) for name, told in header["arrays"].items()}
        image = header["image"] and data[start + header["image"][0] :][: header["image"][1]]
        record = Record(header["key"], image, dict(header["captions"].items()), dict(header["scores"].items()), arrays)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise BadRecord("damaged", f"{type(error).__name__}: {error}") from None
    if header.get("bad"):
        raise BadRecord(*header["bad"])
    return record


def _view(data, start, dtype, shape, offset):
    if dtype not in DTYPES or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} {shape}")
    return np.frombuffer(data, dtype, math.prod(shape), start + offset).reshape(shape)


class Writer:
    """Writes a shard, whole or not at all.

    with Writer(path) as writer:
        writer.write(record, (width, height))
    """

    def __init__(self, path):
        self._path = os.fspath(path)
        self._partial = f"{self._path}.partial"
        self._file, self._sizes = array_record_module.ArrayRecordWriter(self._partial, WRITE), []

    def write(self, record, size, bad=None):
        self._file.write(pack(record, size, bad))
        self._sizes.append(size)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._file.write(pack(Record("index", arrays={"sizes": np.array(self._sizes, np.int32).reshape(-1, 2)})))
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            pathlib.Path(self._partial).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """The records of a .array_record file that a `Writer` wrote, or of all in a folder."""

    path: str

    def open(self):
        """A `ShardReader`.  Raises InputError: no shards, or one that is not whole."""
        single = os.path.isfile(self.path)
        top = os.path.dirname(self.path) or "." if single else self.path
        found, _ = scan(top, False, (ENDING,), ())
        found = [row for row in found if not single or row[0] == os.path.basename(self.path)]
        if not found:
            raise InputError(f"data.source.path={self.path!r}: no {ENDING} in it")
        digest = hashlib.sha256(repr([row[:2] for row in found]).encode()).hexdigest()[:32]
        return ShardReader([os.path.join(top, row[0]) for row in found], digest)


class ShardReader:
    """The records of shards, one after the other.  Picklable; every process opens them by itself."""

    def __init__(self, paths, digest):
        """Raises InputError: a file that is no shard, or is not whole."""
        self._paths, self._digest = paths, digest
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(shard_sizes, paths))
        self.sizes = np.concatenate(sizes)  # width and height, int32 [n 2]
        self._ends = np.cumsum([len(found) for found in sizes]).tolist()

    def __len__(self):
        return self._ends[-1]

    def fingerprint(self):
        """Changes with names and sizes of the shards."""
        return self._digest

    def _place(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect.bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def key(self, i):
        """What record i is called."""
        try:
            return self[i].key
        except BadRecord as bad:
            shard, row = self._place(i)
            return f"{os.path.basename(self._paths[shard])}:{row} ({bad})"

    def __getitem__(self, i):
        """The Record.  Raises BadRecord."""
        shard, row = self._place(i)
        return unpack(_read(self._paths[shard], row))


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path):
    return array_record_module.ArrayRecordReader(path, READ)


def _read(path, row):
    """The bytes of a row of a shard.  Raises BadRecord: the container says that they are damaged."""
    try:
        return _open(path).read([row])[0]
    except Exception as error:  # the library has no error of its own
        raise BadRecord("damaged", f"{os.path.basename(path)}: {str(error)[:200]}") from None


def shard_sizes(path):
    """Width and height of every record of a shard, int32 [n 2].  Raises InputError: it is not whole."""
    try:
        file = _open(path)
        count = file.num_records() - 1
        if count < 0:
            raise ValueError("cut short, or no ArrayRecord")
        sizes = unpack(_read(path, count)).arrays["sizes"]
        if sizes.shape != (count, 2) or sizes.dtype != np.int32:
            raise ValueError(f"sizes of {sizes.shape} for {count} records")
        return sizes
    except Exception as error:
        raise InputError(f"{path}: no whole shard of sana_jax.data.array_record ({str(error)[:200]})") from error


def write(reader, folder, shard_records=10_000):
    """Writes the records of any reader as shards; bad ones stay in place, as bad ones.

    Returns {reason: how many}.  Raises InputError: there is something in the folder, or it cannot be written.
    """
    folder, bad, sizes = pathlib.Path(folder), {}, reader.sizes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: must be empty or absent")
        progress = tqdm.tqdm(total=len(reader), unit=" records", disable=None)
        for start in range(0, len(reader), shard_records):
            with Writer(folder / f"{start // shard_records:05d}{ENDING}") as writer:
                for i in range(start, min(start + shard_records, len(reader))):
                    problem = None
                    try:
                        record = reader[i]
                    except BadRecord as error:
                        record, problem = Record(reader.key(i)), error
                        bad[error.reason] = bad.get(error.reason, 0) + 1
                    writer.write(record, sizes[i], problem)
                    progress.update()
        progress.close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return bad


def main(arguments=None):
    from sana_jax.data.sources import guess

    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.data.array_record", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", help="pictures, or tars")
    parser.add_argument("out", help="a folder to make")
    parser.add_argument("--shard-records", type=int, default=10_000)
    options = parser.parse_args(arguments)
    try:
        reader = guess(options.folder).open()
        bad = write(reader, options.out, max(1, options.shard_records))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(reader)} records" + "".join(f", {count} {reason}" for reason, count in sorted(bad.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
