"""Captions, CLIP scores and cached features as they lie beside pictures (docs/data.md), from bytes.

`<stem>` is a picture's name without its ending:

    <stem>.txt               its first line is the caption "prompt"
    <stem>.json              {"prompt": text}, and what else `caption_keys` names
    <stem>_<name>.json       {stem: {name: text}} or {stem: {name: score}}
    <stem>.npy               latent [c h w] or [1 c h w]
    <stem>.npz               caption_feature [.. m d], attention_mask [.. m]

Whether a caption is a text is asked when it is chosen: one that is none does no harm where no texts
are read.  A file that cannot be parsed or read at all makes the record bad for everything.
"""

import io
import json
import math
import zipfile

import numpy as np

from sana_jax.data.captions import MAIN
from sana_jax.data.records import BadRecord
from sana_jax.resolution import PATCH

LARGEST_TEXT = 4 << 20  # bytes of a .txt, or of a .json of one picture
LARGEST_FEATURES = 256 << 20
FLOATS = {np.dtype(d) for d in ("f2", "f4", "f8")}
NAMES = {"caption_feature": "states", "attention_mask": "mask"}


def parse_text(data):
    """{"prompt": first line}, {} of no bytes.  What is not UTF-8 is kept, as characters that no text has."""
    if not data:
        return {}
    text = bounded(data).decode("utf-8-sig", "surrogateescape")
    return {MAIN: next(iter(text.splitlines()), "")}


def parse_json(data):
    """The dict of a JSON file.  Raises BadRecord."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord("metadata", f"JSON: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadRecord("metadata", f"JSON: a {type(value).__name__}, not an object")
    return value


def own_captions(data, keys=(MAIN,)):
    """{key: caption} of `<stem>.json`."""
    value = parse_json(bounded(data))
    return {key: value[key] for key in keys if key in value}


def entry(value, name):
    """(captions, scores) of what a JSON file says of one picture: numbers are scores.

    A caption called "prompt" is called `name`, as its file is; underscores before names are dropped.
    Raises BadRecord.
    """
    if not isinstance(value, dict):
        raise BadRecord("metadata", f"{name}: a {type(value).__name__}, not an object")
    captions, scores = {}, {}
    for key, item in value.items():
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            if not math.isfinite(item):
                raise BadRecord("metadata", f"{name}: the score of {key!r} is {item}")
            scores[key.lstrip("_")] = float(item)
        else:
            captions[(name if key == MAIN else key).lstrip("_")] = item
    return captions, scores


def parse_latent(data, scale=1.0):
    """[h w c] of a .npy with [c h w] or [1 c h w], divided by `scale`."""
    array = _npy(data, "latent")
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise BadRecord("features", f"latent: shape {array.shape}, not [c h w]")
    array = np.ascontiguousarray(array.transpose(1, 2, 0))
    return (array / scale).astype(array.dtype) if scale != 1 else array


def latent_size(data):
    """(width, height) in pixels of the picture whose latent a .npy holds.  Raises BadRecord."""
    height, width, _ = parse_latent(data).shape
    return width * PATCH, height * PATCH


def parse_text_features(data):
    """{"states": [m d], "mask": [m] bool} of a .npz; a mask that is absent is all true."""
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(bounded(data, LARGEST_FEATURES))) as archive:
            for name, ours in NAMES.items():
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as file:
                        found[ours] = _npy(bounded(file.read(LARGEST_FEATURES + 1), LARGEST_FEATURES), name)
    except BadRecord:
        raise
    except Exception as error:  # zipfile raises a dozen kinds
        raise BadRecord("features", f"npz: {type(error).__name__}: {error}") from None
    if "states" not in found:
        raise BadRecord("features", "npz: no caption_feature")
    states = found["states"]
    if states.ndim < 2 or math.prod(states.shape[:-2]) != 1:
        raise BadRecord("features", f"caption_feature: shape {states.shape}, not [m d]")
    states = states.reshape(states.shape[-2:])
    mask = found.get("mask", np.ones(len(states))).reshape(-1).astype(bool)
    if mask.shape != states.shape[:1]:
        raise BadRecord("features", f"attention_mask: {mask.size} tokens, caption_feature has {len(states)}")
    return {"states": states, "mask": mask}


def _npy(data, name):
    """An array of numbers from the bytes of a .npy file; its header is not believed."""
    file = io.BytesIO(bounded(data, LARGEST_FEATURES))
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRecord("features", f"{name}: no .npy ({str(error)[:200]})") from None
    if dtype.newbyteorder("=") not in FLOATS and dtype.kind not in "biu":
        raise BadRecord("features", f"{name}: dtype {dtype}, not numbers")
    body = data[file.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise BadRecord("features", f"{name}: {len(body)} bytes for {dtype} {shape}")
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    array = array.astype(dtype.newbyteorder("="), copy=False)
    return array


def bounded(data, largest=LARGEST_TEXT):
    """`data`.  Raises BadRecord: it is empty, or has more than `largest` bytes."""
    if not data:
        raise BadRecord("empty", "a side file")
    if len(data) > largest:
        raise BadRecord("too_large", f"a side file of more than {largest >> 20} MB")
    return data
