"""Files that somebody names: plain ones, up to a size."""

import os

import pytest

from sana_jax.errors import InputError
from sana_jax.files import read_bounded


def test_what_is_small_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_bounded(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(InputError, match="a: must have at most 9 bytes$"):
        read_bounded(tmp_path / "a", 9)


def test_what_is_no_plain_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(InputError, match="^it: cannot be read .must be a plain file"):
            read_bounded(path, 10, "it")
    for path, reason in {tmp_path: "Is a directory", tmp_path / "b": "No such file", "a\0b": "null", "\ud800": "codec"}.items():
        with pytest.raises(InputError, match=f"cannot be read .*{reason}"):
            read_bounded(path, 10)
