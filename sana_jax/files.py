"""Files that somebody names, who may be no friend: read whole, up to a size, and never a device or a pipe."""

import os
import stat

from sana_jax.errors import InputError


def read_bounded(path, largest, name=None):
    """The bytes of a regular file.

    Args:
      largest: bytes that it may have.
      name: what it is called in messages, the path if left out.
    Raises:
      InputError: it cannot be read, is a device or a pipe (which may have no end), or is larger.
    """
    name = path if name is None else name
    try:
        mode, data = os.stat(path).st_mode, None
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # a folder: `open` says so
            with open(path, "rb") as file:
                data = file.read(largest + 1)  # one more, since the size that a file tells need not be true
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL, or what the file system cannot encode
        raise InputError(f"{name}: cannot be read ({error})") from error
    if data is None:
        raise InputError(f"{name}: cannot be read (must be a plain file, is a device or a pipe)")
    if len(data) > largest:
        size = f"{largest >> 20} MB" if largest >> 20 else f"{largest} bytes"
        raise InputError(f"{name}: must have at most {size}")
    return data
