"""The members of a tar file by its headers alone; nothing is extracted, no link is followed.

Python's own reader takes a damaged header for the end of the archive and says nothing.  Here every
header's checksum must hold, every member must lie within the file, and zeros must end it.
"""

import os
from typing import NamedTuple

BLOCK = 512
LONGEST_EXTENSION = 1 << 20  # bytes of a header that holds a long name
KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    name: str
    offset: int  # of the data
    size: int
    problem: str = ""  # why it must not be used


class Damage(Exception):
    """The archive is not whole; what came before can be used."""


def members(file):
    """Yields the regular files of an open tar file, and what else stands where one should, with a `problem`.

    Raises Damage: behind the last member that is whole, if the archive does not end as it should.
    """
    descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
    at, override = 0, {}
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            raise Damage(f"no end mark at byte {at}: cut short?" if not header else f"cut short at byte {at}")
        if not any(header):
            return _require_end(descriptor, at, end)
        size, kind = _parse(header, at)
        data, size = at + BLOCK, override.get("size", size) if kind not in b"LKxg" else size
        if data + size > end:
            raise Damage(f"cut short within the member at byte {at}: {data + size - end} bytes are missing")
        if kind in b"LKxg":
            if size > LONGEST_EXTENSION:
                raise Damage(f"a header of {size} bytes at byte {at}")
            _extend(override, kind, os.pread(descriptor, size, data), at)
        else:
            if kind != b"5":
                yield _member(override.get("name") or _name(header), data, size, kind, override)
            override = {}
        at = data + -(-size // BLOCK) * BLOCK


def _require_end(descriptor, at, end):
    if end < at + 2 * BLOCK:
        raise Damage(f"half an end mark at byte {at}: cut short?")
    for start in range(at, end, 1 << 20):
        if any(os.pread(descriptor, 1 << 20, start)):
            raise Damage(f"data after the end mark at byte {at}: several archives in one?")


def _parse(header, at):
    """(size, kind).  Raises Damage: a wrong checksum, or numbers that are none."""
    try:
        told = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        raise Damage(f"a damaged header at byte {at}") from None
    if told != sum(header) - sum(header[148:156]) + 8 * ord(" ") or size < 0:
        raise Damage(f"a damaged header at byte {at}")
    return size, header[156:157]


def _number(field):
    """Octal digits, or what GNU writes for numbers that do not fit: binary behind 0x80."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header):
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _extend(override, kind, data, at):
    """Notes in `override` what a header in front of another says of it."""
    if kind == b"L":
        override["name"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if kind != b"x":
        return
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise Damage(f"a damaged header at byte {at}")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            override["name"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit():
            override["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            override["problem"] = "a sparse file"
        data = data[int(length) :]


def _member(name, offset, size, kind, override):
    problem = override.get("problem", "")
    if kind not in (b"0", b"\0", b"7"):
        problem = KINDS.get(kind, f"a member of type {kind!r}")
    if name.startswith("/") or ".." in name.split("/") or not name or "\0" in name:
        problem = "a name that leads outside"
    return Member(name.removeprefix("./"), offset, size, problem)
