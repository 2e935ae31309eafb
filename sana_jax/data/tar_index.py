"""Where each record of a WebDataset tar is, learnt from its headers once (docs/data.md)."""

import json
import os

import numpy as np

from sana_jax.data import images, index, side_files
from sana_jax.data.records import BadRecord
from sana_jax.data.tar_members import Damage, members

SPAN = ("i8", (2,))  # offset and size; of a member in the tar, of the rest in the heap
PARTS = {".txt": "text", ".json": "json", ".npy": "npy", ".npz": "npz"} | dict.fromkeys(images.ENDINGS, "picture")
# key; sides: JSON {name: what a file beside the tar says of this key}; problem: JSON [reason, detail],
# empty if there is none; size: width and height, 0 where they cannot be told.
HEAP = ("key", "sides", "problem")
ROW = np.dtype([("size", "i4", (2,)), *((name, *SPAN) for name in (*HEAP, *sorted(set(PARTS.values()))))])
VERSION = 1


def build(path, beside, features):
    """(table, heap) of a tar file.

    The heap begins with the length, in 8 bytes, of the JSON {"damage": text, "refused": [text]}.
    Args:
      beside: {name: path} of JSON files {key: {...}}.
      features: the sizes are those of the latents.
    Raises OSError of the tar, InputError of the others.
    """
    rows, damage, refused = {}, [], []
    with open(path, "rb", buffering=0) as file:
        try:
            for member in members(file):
                _place(rows, refused, member)
        except Damage as error:
            damage.append(f"{path}: {error}")
        for row in rows.values():
            row["size"] = _size(file, row, features)
    for name, side in beside.items():
        try:
            with open(side, "rb") as file:
                found = side_files.parse_json(file.read())
        except OSError as error:
            raise index.unreadable(side, error) from error
        except BadRecord as error:
            damage.append(f"{side}: {error}")
            continue
        for row in rows.values():
            if row["key"] in found:
                row["sides"][name] = found[row["key"]]
    return _pack(rows, {"damage": damage, "refused": refused})


def _place(rows, refused, member):
    """Adds a member to the row of its key, the path without its ending."""
    key, ending = os.path.splitext(member.name)
    part = PARTS.get(ending.lower())
    hidden = os.path.basename(key).startswith(".")
    if member.problem:
        refused.append(f"{member.name}: {member.problem}")
    if part is None or hidden:
        return
    row = rows.setdefault(key, {"key": key, "sides": {}})
    if part in row:  # a record of its own, so that it is counted
        row = rows[key, len(rows)] = {"key": f"{key} (again)", "sides": {}, "problem": ["duplicate", member.name]}
    if member.problem:
        row["problem"] = ["unreadable", f"{member.name}: {member.problem}"]
    row[part] = (member.offset, member.size)


def _size(file, row, features):
    part = "npy" if features else "picture"
    if "problem" in row or part not in row:
        return 0, 0
    offset, size = row[part]
    try:
        if features:
            return side_files.latent_size(os.pread(file.fileno(), min(size, side_files.LARGEST_FEATURES + 1), offset))
        return images.read_header(lambda most: os.pread(file.fileno(), min(size, most), offset)).shown
    except BadRecord:
        return 0, 0


def _pack(rows, notes):
    notes = json.dumps(notes).encode()
    heap = bytearray(len(notes).to_bytes(8, "little") + notes)
    table = np.zeros(len(rows), ROW)
    for i, row in enumerate(rows.values()):
        texts = {
            "key": row["key"].encode("utf-8", "surrogateescape"),
            "sides": json.dumps(row["sides"]).encode() if row["sides"] else b"",
            "problem": json.dumps(row["problem"]).encode() if "problem" in row else b"",
        }
        for name, text in texts.items():
            table[i][name] = len(heap), len(text)
            heap += text
        for name in set(PARTS.values()):
            table[i][name] = row.get(name, (-1, 0))
        table[i]["size"] = row["size"]
    return table, heap


def notes(known):
    """{"damage": [text], "refused": [text]} of an index."""
    return json.loads(known.bytes_at((8, int.from_bytes(known.bytes_at((0, 8)), "little"))))


def path_of(path, size, time, beside, features):
    """The path of the index of a tar file with these stamps."""
    return index.name(f"{path}#{'features' if features else 'pictures'}", VERSION, repr(ROW.descr), size, time, beside)
