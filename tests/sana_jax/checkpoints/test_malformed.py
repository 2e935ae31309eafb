"""Malformed safetensors: each is one CheckpointError in under a second, before anything is believed."""

import json
import struct
import time

import numpy as np
import pytest

from sana_jax.checkpoints import read, rules
from sana_jax.errors import CheckpointError

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file(header, data=bytes(32), length=None):
    """The bytes of a file; `header` as an object or as bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def two(**changes):
    return file({"a": A, "b": A | {"data_offsets": [16, 32]} | changes})


WHOLE = two()
UNREADABLE = {
    "empty": b"",
    "no header": b"\x10\x00\x00",
    "header of 2^63 bytes": file(b"{}", length=2**63),
    "header of 2^64 - 1 bytes": file(b"{}", length=2**64 - 1),
    "header longer than the file": file({"a": A}, length=10_000),
    "header of 101 MB": file(b'{"a": ' + b" " * 101_000_000 + b"{}}"),
    "header that is no UTF-8": file(b'{"\xff": 1}'),
    "header that is no object": file([A]),
    "header that is no JSON": file(b"{garbage"),
    "JSON 100,000 deep": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a tensor that is a number": file({"a": 3}),
    "an unknown dtype": two(dtype="F31"),
    "a negative offset": two(data_offsets=[-16, 0]),
    "a negative length": two(data_offsets=[32, 16]),
    "sizes that overflow 64 bits": two(shape=[2**40, 2**40]),
    "an offset beyond 64 bits": two(data_offsets=[16, 2**70]),
    "a negative size": two(shape=[-2, -2]),
    "a shape that does not fit its bytes": two(shape=[3, 2]),
    "two tensors that overlap": two(data_offsets=[8, 24]),
    "a hole between tensors": file({"a": A, "b": A | {"data_offsets": [20, 36]}}, bytes(36)),
    "bytes after the last tensor": WHOLE + b"x",
    "cut by one byte": WHOLE[:-1],
    "cut within the header": WHOLE[:30],
    "two tensors of one name": file(
        b'{"a": ' + json.dumps(A).encode() + b', "a": ' + json.dumps(A | {"data_offsets": [16, 32]}).encode() + b"}"
    ),
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
}


def refused(path, read_it):
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_it(path)
    assert time.perf_counter() - start < 1
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


def load(path):
    """As the loaders do it, for a model with the parameters a and b."""
    checkpoint = read.open_checkpoint(path)
    table, shapes = [rules.Rule("a", "a"), rules.Rule("b", "b")], {"a": (2, 2), "b": (2, 2)}
    return rules.leaf_by_leaf(
        table, shapes, checkpoint.header, checkpoint.read, np.dtype("f"), lambda _, arrays: arrays[0], source=str(path)
    )


@pytest.mark.parametrize("kind", UNREADABLE)
def test_malformed_files(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(UNREADABLE[kind])
    said = refused(path, load)
    assert "not readable as safetensors" in said and "fetch the file again" in said and "\n" not in said


def test_the_whole_file_is_read(tmp_path):
    """So that what is refused above is refused for its fault."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    assert {name: array.tolist() for name, array in load(path).items()} == {"a": [[0, 0]] * 2, "b": [[0, 0]] * 2}
    path.write_bytes(file({"__metadata__": {"format": "pt"}, "b": A | {"data_offsets": [16, 32]}, "a": A}))
    assert list(read.open_checkpoint(path).tensors())[0][0] == "a", "in the order of the file"


NAN = np.float32([[1, np.nan], [1, 1]]).tobytes()
UNFIT = {
    "NaN": (file({"a": A, "b": A | {"data_offsets": [16, 32]}}, bytes(16) + NAN), "holds NaN or infinity\n  tensors (1):\n    b"),
    "a path for a name": (file({"../../etc/x": A, "b": A | {"data_offsets": [16, 32]}}), "not part of this model (1):\n    ../../etc/x"),
    "integers": (two(dtype="I32"), "wrong dtype (1):\n    b: stored as I32"),
    "8-bit floats": (two(dtype="F8_E4M3", shape=[4, 4]), "wrong dtype (1):\n    b: stored as F8_E4M3"),
    "another shape": (two(shape=[4, 1]), "wrong shape (1):\n    b: file has (4, 1), the model needs (2, 2)"),
    "a scalar": (file({"a": A, "b": A | {"shape": [], "data_offsets": [16, 20]}}, bytes(20)), "b: file has (), the model"),
    "nothing in it": (file({}, b""), "missing (2):\n    a\n    b"),
    "a name of 1 MB": (file({"x" * 10**6: A, "b": A | {"data_offsets": [16, 32]}}), "not part of this model (1):\n    xxx"),
    "a name that paints the terminal": (
        file({"\x1b[2J\nfine": A, "b": A | {"data_offsets": [16, 32]}}), "not part of this model (1):\n    \\x1b[2J\\nfine"
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_well_formed_files_that_do_not_fit(tmp_path, kind):
    data, message = UNFIT[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert message in refused(path, load)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """Mapped memory would end the process here (SIGBUS)."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    checkpoint = read.open_checkpoint(path)
    assert checkpoint.read("b").shape == (2, 2)
    path.write_bytes(WHOLE[:-4])
    with pytest.raises(CheckpointError, match="it ends within b; fetch the file again"):
        checkpoint.read("b")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"not readable \(No such file"):
        checkpoint.read("a")
