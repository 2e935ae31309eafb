"""What was learnt by reading every header once, kept in the user's cache folder.

A file is one table and a heap of bytes that rows point into, mapped and not read, so that all
processes of a machine share it.  Its name holds what it was made from: an index of something that
has changed since is never found.
"""

import errno
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np

from sana_jax.errors import InputError

END = b"complete"  # how every whole index ends


class Index(NamedTuple):
    table: np.ndarray  # [n] of a structured dtype
    heap: np.ndarray  # [bytes] uint8

    def bytes_at(self, span):
        """The bytes at (offset, size) of the heap."""
        offset, size = (int(n) for n in span)
        return self.heap[offset : offset + size].tobytes()


def unreadable(path, error):
    """An InputError of an OSError: it is no property of the file, so that no index may remember it."""
    return InputError(f"{path}: cannot be read ({errno.errorcode.get(error.errno, error.errno)}, {error.strerror})")


def folder():
    """$XDG_CACHE_HOME/sana_jax/data, or that in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "sana_jax" / "data"


def name(subject, *made_from):
    """The path of the index of `subject`, a path, as it is now: `made_from` is JSON of sizes, times, versions."""
    state = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:20]
    return folder() / f"{_what(subject)}-{state}.index"


def _what(subject):
    return hashlib.sha256(os.path.realpath(subject).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def write(path, table, heap):
    """Writes an index, whole or not at all, and removes those of earlier states of its subject."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            try:
                np.lib.format.write_array(file, table, version=(1, 0))
                file.write(bytes(heap) + END)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                pathlib.Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InputError(f"index={str(path)!r}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error
    for old in path.parent.glob(f"{path.name.partition('-')[0]}-*.index"):
        if old != path:
            old.unlink(missing_ok=True)


def read(path):
    """The Index of a file, mapped; None if it is absent or not of this form."""
    try:
        return _map(os.fspath(path))
    except (OSError, ValueError, IndexError):
        return None


def need(path):
    """The Index of a file that was there a moment ago.  Raises InputError."""
    if (found := read(path)) is None:
        raise InputError(f"index={str(path)!r}: has gone; start again")
    return found


def earlier(subject):
    """An Index of an earlier state of `subject`, or None."""
    for path in folder().glob(f"{_what(subject)}-*.index"):
        if (found := read(path)) is not None:
            return found
    return None


@functools.lru_cache(maxsize=None)  # by name: a file under a name never changes
def _map(path):
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        at = file.tell()
        size = file.seek(-len(END), os.SEEK_END)
        start = at + shape[0] * dtype.itemsize
        if size < start or file.read() != END:
            raise ValueError(f"{path}: cut short")
    table = np.memmap(path, dtype, "r", at, shape) if shape[0] else np.zeros(0, dtype)
    heap = np.memmap(path, np.uint8, "r", start, size - start) if size > start else np.zeros(0, np.uint8)
    return Index(table, heap)
