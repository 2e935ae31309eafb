"""Pictures in a folder, with captions, CLIP scores and features in files beside them (docs/data.md).

One record is one picture file; records are in the order of their paths, so every host has the same.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import stat

import numpy as np
import tqdm

from sana_jax.data import images, index, side_files
from sana_jax.data.captions import MAIN
from sana_jax.data.records import BadRecord, Record
from sana_jax.errors import InputError

SIDES = (".json", ".npy", ".npz", ".txt")
THREADS = 16  # that read headers; a network file system answers them side by side
SPAN = ("i8", (2,))  # offset and size
# size: width and height in pixels, 0 where they cannot be told; stamp: bytes and time of the file
# that they are from; text: path, then the endings of its side files, with NULs between.
ROW = np.dtype([("size", "i4", (2,)), ("stamp", "i8", (2,)), ("text", *SPAN)])


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures (.jpg, .jpeg, .png, .webp) of a folder.

    path: the folder.
    recursive: those of folders inside too; links to folders are not followed.
    caption_keys: what is a caption in `<stem>.json`.
    features: `<stem>.npy` and `<stem>.npz` are read, and pictures are not.
    latent_scale: what these latents were multiplied by, 0.41407 if NVlabs' tools wrote them.
    """

    path: str
    recursive: bool = False
    caption_keys: tuple[str, ...] = (MAIN,)
    features: bool = False
    latent_scale: float = 1.0

    def open(self):
        """A `FolderReader`.  Raises InputError: no such folder, no pictures in it, or an I/O error on the way."""
        found, inside = scan(self.path, self.recursive, images.ENDINGS, SIDES)
        if not found:
            hint = f"; {inside} folders inside: recursive=True reads them" if inside else ""
            raise InputError(f"data.source.path={self.path!r}: no {', '.join(images.ENDINGS)} in it{hint}")
        made_from = [[rel, size, time, *map(list, sides)] for rel, size, time, sides in found]
        subject = os.path.join(self.path, f"{'features' if self.features else 'pictures'} {self.recursive}")
        path = index.name(subject, repr(ROW.descr), made_from)
        if (known := index.read(path)) is None:
            known = _make(self, path, found, subject)
        digest = hashlib.sha256(repr([(r, n, [s[:2] for s in sides]) for r, n, _, sides in found]).encode())
        return FolderReader(self, os.fspath(path), len(known.table), digest.hexdigest()[:32])


class FolderReader:
    """The records of a Folder.  Picklable; every process maps the index by itself."""

    def __init__(self, source, path, count, digest):
        self.source, self._path, self._count, self._digest = source, path, count, digest

    def __len__(self):
        return self._count

    @property
    def sizes(self):
        """Width and height, int32 [n 2]; 0 0 for what cannot be read."""
        return np.array(self._index().table["size"])

    def fingerprint(self):
        """Changes with names and sizes of the files, not with times or the folder's own place."""
        return self._digest

    def _index(self):
        return index.need(self._path)

    def key(self, i):
        """The path of record i within the folder."""
        return self._text(i)[0]

    def _text(self, i):
        known = self._index()
        return known.bytes_at(known.table["text"][i]).decode("utf-8", "surrogateescape").split("\0")

    def __getitem__(self, i):
        """The Record.  Raises BadRecord."""
        rel, *sides = self._text(i)
        path = os.path.join(self.source.path, rel)
        base = os.path.splitext(path)[0]
        captions, scores = {}, {}
        for side in sides:
            if side == ".txt":
                captions |= side_files.parse_text(_bytes(base + side, side_files.LARGEST_TEXT))
            elif side == ".json":
                data = _bytes(base + side, side_files.LARGEST_TEXT)
                captions |= side_files.own_captions(data, self.source.caption_keys)
            elif side.endswith(".json"):
                value = side_files.parse_json(_bytes(base + side, side_files.LARGEST_TEXT))
                stem = os.path.basename(base)
                if stem not in value:
                    raise BadRecord("metadata", f"{stem}{side}: no entry {stem!r}")
                found = side_files.entry(value[stem], side[1 : -len(".json")])
                captions, scores = captions | found[0], scores | found[1]
        if self.source.features:
            return Record(rel, None, captions, scores, self._features(base, sides))
        return Record(rel, _bytes(path, images.LARGEST_BYTES), captions, scores)

    def _features(self, base, sides):
        if ".npy" not in sides:
            raise BadRecord("features", "no .npy beside the picture")
        data = _bytes(base + ".npy", side_files.LARGEST_FEATURES)
        arrays = {"latent": side_files.parse_latent(data, self.source.latent_scale)}
        if ".npz" in sides:
            arrays |= side_files.parse_text_features(_bytes(base + ".npz", side_files.LARGEST_FEATURES))
        return arrays


def scan(top, recursive, mains, sides):
    """([(path, bytes, time, ((ending, bytes, time), ...))] in order, how many folders are inside).

    One entry for each file with an ending of `mains`, with the files beside it that have one of
    `sides` and belong to it.  Hidden files are left out.  Raises InputError.
    """
    if not os.path.isdir(top):
        raise InputError(f"data.source.path={top!r}: no such folder")
    found, inside, todo = [], 0, [""]
    while todo:
        folder = todo.pop()
        files = {}
        try:
            with os.scandir(os.path.join(top, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        inside += 1
                        if recursive and not entry.is_symlink():
                            todo.append(os.path.join(folder, entry.name))
                    elif os.path.splitext(entry.name)[1].lower() in mains + sides:
                        files[entry.name] = _stamp(entry)
        except OSError as error:
            raise index.unreadable(error.filename or os.path.join(top, folder), error) from error
        found += [(os.path.join(folder, name), *stamp, sides) for name, stamp, sides in _together(files, mains)]
    return sorted(found, key=lambda row: os.fsencode(row[0])), inside


def _stamp(entry):
    """(bytes, time) of a file, -1 0 of what is none: a link to nothing, a pipe.  Raises OSError."""
    try:
        found = entry.stat()
    except FileNotFoundError:
        return -1, 0
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, 0)


def _together(files, mains):
    """(name, stamp, its side files) of every main file among {name: stamp}.

    A side file belongs to the longest stem that it begins with: `a_b.json` to `a_b.png`, if there is
    one, and else to `a.png` as the captions of "b".
    """
    stems = {name: os.path.splitext(name)[0] for name in files if name.lower().endswith(mains)}
    sides = {stem: [] for stem in stems.values()}
    for name, stamp in files.items():
        if name in stems:
            continue
        stem, ending = os.path.splitext(name)
        while stem not in sides and "_" in stem and ending == ".json":
            stem = stem.rpartition("_")[0]
        if stem in sides:
            sides[stem].append((name[len(stem) :], *stamp))
    for name, stem in stems.items():
        yield name, files[name], tuple(sorted(sides[stem]))


def _make(source, path, found, subject):
    """Reads the headers of what is new or changed since the last index, and writes the next."""
    known = {}
    if (old := index.earlier(subject)) is not None:
        texts = (old.bytes_at(span).partition(b"\0")[0] for span in old.table["text"])
        known = {(rel, *stamp): size for rel, stamp, size in zip(texts, old.table["stamp"].tolist(), old.table["size"])}
    table, heap = np.zeros(len(found), ROW), bytearray()
    new = []
    for i, (rel, size, time, sides) in enumerate(found):
        if source.features:
            size, time = next((side[1:] for side in sides if side[0] == ".npy"), (-1, 0))
        text = "\0".join([rel, *(side[0] for side in sides)]).encode("utf-8", "surrogateescape")
        table[i]["stamp"], table[i]["text"] = (size, time), (len(heap), len(text))
        heap += text
        rel = rel.encode("utf-8", "surrogateescape")
        if (rel, size, time) in known:
            table[i]["size"] = known[rel, size, time]
        elif size >= 0:
            new.append(i)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        paths = (os.path.join(source.path, found[i][0]) for i in new)
        sizes = pool.map(_latent_size if source.features else _picture_size, paths)
        progress = tqdm.tqdm(sizes, f"{source.path}: headers", len(new), delay=5, leave=False)
        for i, size in zip(new, progress):
            table[i]["size"] = size
    index.write(path, table, heap)
    return index.need(path)


def _picture_size(path):
    try:
        with _open(path) as file:
            return images.read_header(lambda most: os.pread(file.fileno(), most, 0)).shown
    except BadRecord:
        return 0, 0
    except OSError as error:
        raise index.unreadable(path, error) from error


def _latent_size(path):
    path = os.path.splitext(path)[0] + ".npy"
    try:
        with _open(path) as file:
            return side_files.latent_size(file.read(side_files.LARGEST_FEATURES + 1))
    except BadRecord:
        return 0, 0
    except OSError as error:
        raise index.unreadable(path, error) from error


def _open(path):
    """A regular file; a pipe, which may never end, is none.  Raises OSError."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_BINARY", 0)), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(22, "no regular file")
    return file


def _bytes(path, largest):
    """A file's bytes.  Raises BadRecord."""
    try:
        with _open(path) as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadRecord("unreadable", f"{os.path.basename(path)}: {reason}") from error
    if len(data) > largest:
        raise BadRecord("too_large", f"{os.path.basename(path)}: more than {largest >> 20} MB")
    return data
