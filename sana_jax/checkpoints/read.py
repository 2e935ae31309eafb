"""Safetensors, one file or shards with an index, as a header and a stream of arrays."""

import contextlib
import dataclasses
import json
import pathlib
import re

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import safetensors

from sana_jax.errors import CheckpointError, InputError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a component's files hold.

    `header` is {name: (shape, safetensors dtype)}; `files` is {path: {stored name: name}}.
    """

    source: str
    header: dict
    files: dict

    def tensors(self):
        """Yields (name, array).  One file is open at a time and no array is kept."""
        for path, names in self.files.items():
            with _open(path) as file:
                for stored, name in names.items():
                    yield name, file.get_tensor(stored)

    @property
    def dtypes(self):
        """The set of stored dtypes, e.g. {"BF16"}."""
        return {dtype for _, dtype in self.header.values()}


@contextlib.contextmanager
def _open(path):
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); fetch the file again") from error


def read_json(path):
    """A JSON object as a dict.  Python's reader takes the `-Infinity` of diffusers' schedulers.

    Raises InputError: absent, not JSON, or not an object.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def find_files(folder, stems, variant=None):
    """The weight files of a component: (paths, {stored name: path} from the index, or None).

    Args:
      folder: a component folder, or a .safetensors file.
      stems: file stems to try in order, e.g. ("diffusion_pytorch_model", "model").
      variant: "bf16", "fp16", ...; None takes the plain files, or else the only variant there is.
    Raises:
      InputError: no weights, or only several variants.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        return [folder], None
    infix = f".{variant}" if variant else ""
    for stem in stems:
        if (index := folder / f"{stem}.safetensors.index{infix}.json").is_file():
            return _read_index(index)
        if (single := folder / f"{stem}{infix}.safetensors").is_file():
            return [single], None
    stem = "|".join(map(re.escape, stems))
    pattern = re.compile(rf"(?:{stem})\.(?:safetensors\.index\.(\w+)\.json|(\w+)\.safetensors)")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    variants = {m[1] or m[2] for name in names if (m := pattern.fullmatch(name))}
    if variant is None and len(variants) == 1:
        return find_files(folder, stems, variants.pop())
    expected = " or ".join(f"{s}{infix}.safetensors" for s in stems)
    found = f"; variants here: {', '.join(sorted(variants))}" if variants else ""
    raise InputError(f"{folder}: no weights, expected {expected} (or its index){found}")


def _read_index(index):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object with a file for each tensor")
    for shard in weight_map.values():  # a shard name never leads out of the folder
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} must be a plain file name")
    shards = sorted(set(weight_map.values()))
    if absent := [s for s in shards if not (index.parent / s).is_file()]:
        raise CheckpointError(f"{index}: shards named here are absent: {', '.join(absent)}")
    return [index.parent / s for s in shards], {n: index.parent / s for n, s in weight_map.items()}


def open_checkpoint(folder, stems=("diffusion_pytorch_model", "model"), variant=None, rename=str):
    """Reads the headers of all files of a component, and none of the data.

    Args:
      folder, stems, variant: see `find_files`.
      rename: stored name -> the table's name, e.g. to drop a "model." prefix.
    Raises:
      InputError: nothing to read.
      CheckpointError: truncated or malformed files, or shards that contradict their index.
    """
    paths, index = find_files(folder, stems, variant)
    header, files, problems = {}, {}, []
    for path in paths:
        with _open(path) as file:
            files[path] = {stored: rename(stored) for stored in file.keys()}
            for stored, name in files[path].items():
                if name in header:
                    problems.append(f"{name}: stored twice")
                piece = file.get_slice(stored)
                header[name] = (tuple(piece.get_shape()), piece.get_dtype())
    if index is not None:
        placed = {stored: path for path, names in files.items() for stored in names}
        problems += [
            f"{n}: the index says {index[n].name if n in index else 'nowhere'}, "
            f"it is in {placed[n].name if n in placed else 'no file'}"
            for n in sorted(placed.keys() | index.keys())
            if placed.get(n) != index.get(n)
        ]
    if problems:
        listed = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"{folder}: files disagree\n  " + "\n  ".join(listed))
    return Checkpoint(str(folder), header, files)
