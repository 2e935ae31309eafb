"""Safetensors, one file or shards with an index: a header, and tensors on demand."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors

from sana_jax.checkpoints import pickles
from sana_jax.errors import CheckpointError, InputError

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' and transformers' weight files
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a component's files hold.

    `header` is {name: (shape, safetensors dtype)}; `files` is {path: {stored name: name}}; `places`
    is {name: (path, offset of its first byte)}.  `dropped` are names that the files hold and that
    were left out on purpose, `ignored` the entries of a pickle beside its weights.  `scratch` removes
    temporary files once it is called or forgotten.
    """

    source: str
    header: dict
    files: dict
    places: dict
    dropped: tuple = ()
    ignored: tuple = ()
    scratch: object = None

    def read(self, name):
        """The tensor as a new array.  It is read and not mapped into memory: a file that another
        process shortens meanwhile is an error here and not the end of this process.

        Raises CheckpointError: the file cannot be read, or ends too early.
        """
        (path, offset), (shape, dtype) = self.places[name], self.header[name]
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.source}: {name} is stored as {dtype}, must be one of {', '.join(DTYPES)}")
        array = np.empty(math.prod(shape), DTYPES[dtype])
        view = memoryview(array.view(np.uint8))
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(f"{path}: not readable: it ends within {name}; fetch the file again")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{path}: not readable ({error.strerror})") from error
        return array.reshape(shape)

    def tensors(self):
        """Yields (name, array) in the order of the files; no array is kept."""
        for names in self.files.values():
            for name in names.values():
                yield name, self.read(name)

    @property
    def dtypes(self):
        """The set of stored dtypes, e.g. {"BF16"}."""
        return {dtype for _, dtype in self.header.values()}

    def without(self, names):
        """The same less those of `names` that it holds; any other surplus stays an error."""
        held = tuple(name for name in self.header if name in names)
        return dataclasses.replace(
            self,
            header={name: value for name, value in self.header.items() if name not in held},
            files={
                path: {stored: name for stored, name in inner.items() if name not in held}
                for path, inner in self.files.items()
            },
            dropped=self.dropped + held,
        )

    def close(self):
        """Removes what was unpacked for this checkpoint; files of the user's are not touched."""
        if self.scratch is not None:
            self.scratch()


@contextlib.contextmanager
def _open(path):
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); fetch the file again") from error


def _once(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_header(path):
    """{stored name: (shape, dtype, offset in the file)} of a safetensors file.

    safetensors itself refuses what is malformed: sizes that do not add up, holes, overlaps, bytes
    after the end, more than 100 MB of header, JSON that is none.  It keeps the last of two tensors
    of one name, which is refused here.
    Raises CheckpointError, before any of the data is read.
    """
    with _open(path) as file:
        names = set(file.keys())
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        found = {
            name: (tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        if found.keys() != names:
            raise ValueError("it changed while it was read")
        found = dict(sorted(found.items(), key=lambda item: item[1][2]))  # in the order of the file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error}); fetch the file again") from error
    return found


def read_json(path):
    """A JSON object as a dict.  Python's reader takes the `-Infinity` of diffusers' schedulers.

    Raises InputError: absent, not JSON, or not an object.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter of a million brackets
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def variants(names, stems=STEMS):
    """The variants among the file names of a component: a set of None (plain), "fp16", "bf16", ..."""
    stem = "|".join(map(re.escape, stems))
    pattern = re.compile(rf"(?:{stem})(?:\.safetensors\.index(?:\.(\w+))?\.json|(?:\.(\w+))?\.safetensors)")
    return {m[1] or m[2] for name in names if (m := pattern.fullmatch(name))}


def choose_variant(available, wanted=None, published=None, source="checkpoint"):
    """Which of several weight files to read (or to download) for a dtype.

    Args:
      available: the set that `variants` returns.
      wanted: "fp32", "bf16" or "fp16", or None where the weights decide ("auto").
      published: the dtype that a known repository's model runs in, of the same names, or None.
      source: what the component is called in a message.
    Returns:
      None for the plain files, or a variant.  First the variant of the wanted dtype (float32 is
      the plain files), then the plain files, then the published dtype's, then the only one.
    Raises InputError: nothing, or several variants and no reason to prefer one.
    """
    for choice in (None if wanted == "fp32" else wanted, None, published):
        if choice in available:
            return choice
    if len(available) == 1:
        return next(iter(available))
    if not available:
        raise InputError(f"{source}: no weights in safetensors format")
    listed = ", ".join(sorted(available))
    raise InputError(f"{source}: no plain weights, and variants {listed}: choose one with variant=")


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
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = variants(names, stems)
    if variant is None and found:
        variant = choose_variant(found, source=folder)
    infix = f".{variant}" if variant else ""
    for stem in stems:
        if (index := folder / f"{stem}.safetensors.index{infix}.json").is_file():
            return _read_index(index)
        if (single := folder / f"{stem}{infix}.safetensors").is_file():
            return [single], None
    expected = " or ".join(f"{s}{infix}.safetensors" for s in stems)
    here = f"; variants here: {', '.join(sorted(v or 'plain' for v in found))}" if found else ""
    raise InputError(f"{folder}: no weights, expected {expected} (or its index){here}")


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


def open_checkpoint(folder, stems=STEMS, variant=None, rename=str, entry="state_dict"):
    """Reads the headers of all files of a component, and none of the data.

    Args:
      folder, stems, variant: see `find_files`.  A file that is named like a pickle (`pickles.SUFFIXES`)
        is unpacked first, see `pickles.unpack`; in a folder none is ever looked for.
      rename: stored name -> the table's name, e.g. to drop a "model." prefix.
      entry: of a pickle that holds several things, the one with the weights.
    Raises:
      InputError: nothing to read.
      CheckpointError: truncated or malformed files, or shards that contradict their index.
    """
    scratch, ignored = None, ()
    if pathlib.Path(folder).suffix in pickles.SUFFIXES and os.path.isfile(folder):
        unpacked, ignored, scratch = pickles.unpack(folder, entry)
        paths, index = [unpacked], None
    else:
        paths, index = find_files(folder, stems, variant)
    header, files, places, problems = {}, {}, {}, []
    for path in paths:
        stored_header = read_header(path)
        files[path] = {stored: rename(stored) for stored in stored_header}
        for stored, name in files[path].items():
            if name in header:
                problems.append(f"{name}: stored twice")
            shape, dtype, offset = stored_header[stored]
            header[name], places[name] = (shape, dtype), (path, offset)
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
    return Checkpoint(str(folder), header, files, places, ignored=ignored, scratch=scratch)
