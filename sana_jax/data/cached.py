"""Latents and text states that `python -m sana_jax.data.cache` has made; see there."""

import dataclasses
import json
import math
import os
import pathlib

import numpy as np

from sana_jax.data.array_record import ENDING, ShardReader
from sana_jax.data.side_files import parse_json
from sana_jax.data.records import BadRecord
from sana_jax.errors import InputError
from sana_jax.files import read_bounded

META = "cache.json"  # what the features are of, and which models made them
MADE_FROM = "made_from"  # of it: `experiment.describe` of the source; not there in older ones
NULL = "null.npy"  # states of the empty caption, float16 [m d]


@dataclasses.dataclass(frozen=True)
class Cached:
    """The features in a folder."""

    path: str

    def open(self):
        """A `CachedReader`.  Raises InputError: no cache, or one that is not finished."""
        meta = read_meta(self.path)
        names = shard_names(meta)
        there = {entry.name for entry in pathlib.Path(self.path).iterdir()}
        if missing := [name for name in names if name not in there]:
            raise InputError(
                f"data.source.path={self.path!r}: {len(missing)} of {len(names)} shards are not there yet; the command "
                "that made the others, given again, makes them"
            )
        return CachedReader(self.path, meta, names)


class CachedReader(ShardReader):
    """The records of a Cached: `latent` [h w c] as the autoencoder made it, and `states` [n d] of the n
    valid tokens of a caption, both float16.  Record i is record i of what was cached."""

    def __init__(self, path, meta, names):
        super().__init__([os.path.join(path, name) for name in names], meta["fingerprint"])
        if len(self) != meta["rows"]:
            raise InputError(f"data.source.path={path!r}: {len(self)} rows, {META} says {meta['rows']}")
        self.path, self.meta = path, meta

    @property
    def scaling_factor(self):
        """Of the autoencoder that made the latents; None where the cache does not say."""
        return self.meta.get("scaling_factor")

    @property
    def null(self):
        """States of the empty caption, float16 [m d], padding included; None where no states are cached."""
        if not self.meta["text"]:
            return None
        try:
            return np.load(pathlib.Path(self.path) / NULL)
        except (OSError, ValueError) as error:
            raise InputError(f"{pathlib.Path(self.path) / NULL}: cannot be read ({error})") from error


def shard_names(meta):
    """The names of all shards of a cache."""
    return [f"{i:05d}{ENDING}" for i in range(math.ceil(meta["rows"] / meta["shard_records"]))]


def read_meta(path):
    """cache.json of a folder.  Raises InputError."""
    name = os.path.join(path, META)
    try:
        meta = parse_json(read_bounded(name, 1 << 20))
    except BadRecord as error:
        raise InputError(f"{name}: {error}") from error
    if absent := {"rows", "shard_records", "fingerprint", "text"} - set(meta):
        raise InputError(f"{name}: no {', '.join(sorted(absent))}; not written by sana_jax.data.cache")
    return meta


def made_from(path):
    """`experiment.describe` of the source that a cache was made from, {} where an older one does not say."""
    return read_meta(path).get(MADE_FROM) or {}


def write_meta(path, meta):
    """Writes cache.json, whole or not at all."""
    name = pathlib.Path(path) / META
    partial = name.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, name)
