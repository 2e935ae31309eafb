"""Plain WebDataset tars by random access: an index of offsets is made once, nothing is extracted."""

import bisect
import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import json
import os

import numpy as np
import tqdm

from sana_jax.data import images, index, side_files, tar_index
from sana_jax.data.captions import MAIN
from sana_jax.data.folder import THREADS, scan
from sana_jax.data.records import BadRecord, Record
from sana_jax.errors import InputError

OPEN_FILES = 256  # of a process
SHOWN = 10  # damaged files that an error lists


@dataclasses.dataclass(frozen=True)
class Tar:
    """The samples of a .tar file, or of all in a folder.

    path: the file or folder.
    recursive: those of folders inside too.
    caption_keys: what is a caption in `<key>.json`.
    features: `<key>.npy` and `<key>.npz` are read, and pictures are not.
    latent_scale: what these latents were multiplied by, 0.41407 if NVlabs' tools wrote them.
    allow_damaged: use of a damaged tar what lies before the damage.
    """

    path: str
    recursive: bool = False
    caption_keys: tuple[str, ...] = (MAIN,)
    features: bool = False
    latent_scale: float = 1.0
    allow_damaged: bool = False

    def open(self):
        """A `TarReader`.  Raises InputError: no tars, damaged ones, or an I/O error on the way."""
        single = os.path.isfile(self.path)
        top = os.path.dirname(self.path) if single else self.path
        found, _ = scan(top or ".", self.recursive and not single, (".tar",), (".json",))
        found = [row for row in found if not single or row[0] == os.path.basename(self.path)]
        if not found:
            raise InputError(f"data.source.path={self.path!r}: no .tar in it")
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            shards = pool.map(lambda row: self._index(top, row), found)
            shards = list(tqdm.tqdm(shards, f"{self.path}: headers", len(found), delay=5, leave=False))
        damage = [text for _, path, _ in shards for text in tar_index.notes(index.need(path))["damage"]]
        if damage and not self.allow_damaged:
            more = f"\nand {len(damage) - SHOWN} more" if len(damage) > SHOWN else ""
            raise InputError(
                f"data.source.path={self.path!r}: damaged; mend or remove them, or use what lies before the damage with "
                "data.source.allow_damaged=true:\n" + "\n".join(damage[:SHOWN]) + more
            )
        if not any(len(index.need(path).table) for _, path, _ in shards):
            raise InputError(f"data.source.path={self.path!r}: no samples in its tars")
        digest = hashlib.sha256(repr([(r, n, [s[:2] for s in sides]) for r, n, _, sides in found]).encode())
        return TarReader(self, shards, digest.hexdigest()[:32])

    def _index(self, top, row):
        """(path of a tar, of its index, its bytes); the index is made if it is not there."""
        rel, size, time, sides = row
        path = os.path.join(top, rel)
        base = os.path.splitext(path)[0]
        beside = {ending[1 : -len(".json")]: base + ending for ending, *_ in sides if ending != ".json"}
        place = os.fspath(tar_index.path_of(path, size, time, [list(side) for side in sides], self.features))
        if index.read(place) is None:
            try:
                index.write(place, *tar_index.build(path, beside, self.features))
            except OSError as error:
                raise index.unreadable(path, error) from error
        return path, place, size


class TarReader:
    """The records of a Tar.  Picklable; every process maps the indices and opens the tars by itself."""

    def __init__(self, source, shards, digest):
        self.source, self._shards, self._digest = source, shards, digest
        self._ends = np.cumsum([len(index.need(place).table) for _, place, _ in shards]).tolist()

    def __len__(self):
        return self._ends[-1]

    @property
    def sizes(self):
        """Width and height, int32 [n 2]; 0 0 for what cannot be read."""
        return np.concatenate([index.need(place).table["size"] for _, place, _ in self._shards])

    def fingerprint(self):
        """Changes with names and sizes of the tars and of the files beside them."""
        return self._digest

    @property
    def notes(self):
        """{"damage": [text], "refused": [text]}: what is wrong with the tars, and members that are not used."""
        found = [tar_index.notes(index.need(place)) for _, place, _ in self._shards]
        refused = [f"{path}: {text}" for (path, *_), note in zip(self._shards, found) for text in note["refused"]]
        return {"damage": [text for note in found for text in note["damage"]], "refused": refused}

    def _row(self, i):
        """(path of the tar, its bytes, index, row) of record i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect.bisect_right(self._ends, i)
        path, place, size = self._shards[shard]
        known = index.need(place)
        return path, size, known, known.table[i - (self._ends[shard - 1] if shard else 0)]

    def key(self, i):
        """Name of the tar and key of record i."""
        path, _, known, row = self._row(i)
        return f"{os.path.basename(path)}:{known.bytes_at(row['key']).decode('utf-8', 'surrogateescape')}"

    def __getitem__(self, i):
        """The Record.  Raises BadRecord."""
        path, size, known, row = self._row(i)
        if problem := known.bytes_at(row["problem"]):
            raise BadRecord(*json.loads(problem))
        read = functools.partial(_read, path, size, row)
        captions, scores = {}, {}
        if text := read("text", side_files.LARGEST_TEXT):
            captions |= side_files.parse_text(text)
        if text := read("json", side_files.LARGEST_TEXT):
            captions |= side_files.own_captions(text, self.source.caption_keys)
        if text := known.bytes_at(row["sides"]):
            for name, value in json.loads(text).items():
                found = side_files.entry(value, name)
                captions, scores = captions | found[0], scores | found[1]
        if not self.source.features:
            if (picture := read("picture", images.LARGEST_BYTES)) is None:
                raise BadRecord("unreadable", "no picture")
            return Record(self.key(i), picture, captions, scores)
        if (latent := read("npy", side_files.LARGEST_FEATURES)) is None:
            raise BadRecord("features", "no .npy")
        arrays = {"latent": side_files.parse_latent(latent, self.source.latent_scale)}
        if (states := read("npz", side_files.LARGEST_FEATURES)) is not None:
            arrays |= side_files.parse_text_features(states)
        return Record(self.key(i), None, captions, scores, arrays)


class _File:
    """A descriptor that is closed when nobody uses it any more, in whichever thread that is."""

    def __init__(self, path, size):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.fits = os.fstat(self.descriptor).st_size == size

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open = functools.lru_cache(maxsize=OPEN_FILES)(_File)


def _read(path, size, row, part, largest):
    """The bytes of a part of a record, None if it has none.  Raises BadRecord."""
    offset, length = (int(n) for n in row[part])
    if offset < 0:
        return None
    if length > largest:
        raise BadRecord("too_large", f"{part}: more than {largest >> 20} MB")
    try:
        file = _open(path, size)
        data = os.pread(file.descriptor, length, offset) if file.fits else b""
    except OSError as error:
        raise BadRecord("unreadable", f"{os.path.basename(path)}: {error.strerror}") from error
    if not file.fits or len(data) != length:
        changed = f"{os.path.basename(path)}: has changed since it was indexed"
        raise BadRecord("unreadable", changed) from OSError(errno.ESTALE, changed)  # no property of the record
    return data
