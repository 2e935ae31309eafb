"""What a model is, as one sha256: recorded with each picture, checked against what was downloaded."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile

from sana_jax.errors import InputError
from sana_jax.hub import folders


def cache_folder():
    """The project's folder in the user's cache; it may not exist yet."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sana_jax"


def write_atomically(path, text):
    """Writes a text file that is whole or absent, whoever else writes it.  Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        pathlib.Path(partial).unlink(missing_ok=True)
        raise


def file_sha256(path):
    """The sha256 of a file as hex, remembered for as long as its size and its mtime stay.

    Raises InputError: the file cannot be read.
    """
    try:
        path = pathlib.Path(path).resolve(strict=True)
        found = path.stat()
        key = {"path": str(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
        name = hashlib.sha256(os.fsencode(path)).hexdigest()
        note = cache_folder() / "sha256" / f"{name}.json"
        if (known := _remembered(note, key)) is not None:
            return known
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if (after.st_size, after.st_mtime_ns) == (found.st_size, found.st_mtime_ns):
        with contextlib.suppress(OSError, UnicodeError):  # a cache that cannot be written costs time only
            write_atomically(note, json.dumps(key | {"sha256": digest}))
    return digest


def _remembered(note, key):
    """The digest in a note that is about exactly this file, else None."""
    try:
        held = json.loads(note.read_text(encoding="utf-8"))
        digest = held.pop("sha256")
        return digest if held == key and len(bytes.fromhex(digest)) == 32 else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None  # absent or damaged: computed anew


def files_sha256(folder, names):
    """{name: sha256} of files in a folder, several at a time (hashing releases the GIL)."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(pathlib.Path(folder) / name), names)))


def model_sha256(path, variant=None, *, wanted=None, part=None):
    """One sha256 for everything that a run reads of a model.

    A file's is its own, as `sha256sum` prints it.  A folder's is that of the lines
    "<sha256>  <relative path>\\n" of the files it reads, sorted by path: weights of the variant that is
    loaded, configurations, tokenizer, scheduler, sana_jax.json.

    Args:
      path: pipeline or component folder, or one file.
      variant, wanted: which weights are loaded, see `folders.weight_index`.
      part: of a pipeline only "transformer", "vae" or "text_encoder" (and tokenizer).
    Returns:
      64 hex digits.
    Raises:
      InputError: not a model, or not readable.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return file_sha256(path)
    digests = files_sha256(path, folders.files_read(path, wanted, variant, part))
    return hashlib.sha256("".join(f"{digests[n]}  {n}\n" for n in sorted(digests)).encode()).hexdigest()


def model_sha256_in_background(path, variant=None, *, wanted=None, part=None):
    """`model_sha256` beside other work: call `.result()` of what is returned to wait for it."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(model_sha256, path, variant, wanted=wanted, part=part)
    finally:
        pool.shutdown(wait=False)
