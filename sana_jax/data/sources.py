"""Which source a folder or file is, where nobody says."""

import os
import pathlib

from sana_jax.data import images
from sana_jax.data.array_record import ENDING, ArrayRecord
from sana_jax.data.cached import META, Cached
from sana_jax.data.folder import Folder
from sana_jax.data.tar import Tar
from sana_jax.errors import InputError


def guess(path):
    """The source of `path`, by what is in it; a folder of pictures with those of folders inside.

    Raises InputError: no such file or folder, another kind of file, or tars or shards in folders inside only.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    names = [path.name] if path.is_file() else [entry.name for entry in path.iterdir()]
    for ending, source in ((META, Cached), (ENDING, ArrayRecord), (".tar", Tar)):
        if any(name.endswith(ending) for name in names):
            return source(str(path))
    if path.is_file():
        raise InputError(f"{path}: must be a folder, a .tar or a {ENDING}")
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(name.lower().endswith(images.ENDINGS) for name in files):
            break
        if inside := [name for name in files if name.endswith((META, ENDING, ".tar"))]:
            more = f", or data.source=Tar({str(path)!r}, recursive=True)" if inside[0].endswith(".tar") else ""
            raise InputError(
                f"{path}: tars, {ENDING} files and {META} were looked for in this folder itself, but {inside[0]} is in "
                f"{folder}; name that folder{more}"
            )
    return Folder(str(path), recursive=True)
