"""Safetensors out: shards of bounded size with an index, streamed, each file whole or absent."""

import json
import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

SHARD_BYTES = 5 * 10**9  # the peers' own limit


def write_json(path, value):
    """Writes through a temporary neighbour, so that no reader ever sees half a file."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    _replace(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))


def _replace(path, write):
    temporary = f"{path}.partial"
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_safetensors(folder, stem, tensors, shard_bytes=SHARD_BYTES):
    """Writes a stream of (name, array) as `stem.safetensors`, or as numbered shards with an index.

    The host holds one shard at a time.  Shards get their final names when their number is known.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pending, size, parts, weight_map, total = {}, 0, [], {}, 0
    mode = 0o666 & ~umask()

    def flush():
        part = folder / f"{stem}.part-{len(parts)}"
        try:
            safetensors.numpy.save_file(pending, part, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{part}: {error}") from error
        part.chmod(mode)  # safetensors keeps its files from everybody else
        parts.append((part, list(pending)))
        pending.clear()

    try:
        for name, array in tensors:
            array = np.asarray(array, order="C")  # and not ascontiguousarray, which has no scalars
            if pending and size + array.nbytes > shard_bytes:
                flush()
                size = 0
            pending[name] = array
            size += array.nbytes
            total += array.nbytes
        flush()
    except BaseException:
        for part in folder.glob(f"{stem}.part-*"):
            part.unlink()
        raise
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if len(parts) == 1:
        os.replace(parts[0][0], single)
        index.unlink(missing_ok=True)  # of earlier shards: it would hide the new file
        return
    for i, (part, names) in enumerate(parts, 1):
        file = f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        os.replace(part, folder / file)
        weight_map |= {name: file for name in names}
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    single.unlink(missing_ok=True)  # of an earlier save: readers differ in which they prefer


def umask():
    """The permissions that new files and folders of this process go without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
