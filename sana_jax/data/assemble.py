"""From a batch's number to its arrays.  All that happens to a record happens here, in a worker."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from sana_jax.data import images
from sana_jax.data.records import BadRecord
from sana_jax.data.schedule import Schedule
from sana_jax.errors import InputError
from sana_jax.resolution import PATCH

PROBED = 256  # records that are looked at until one is good


class Contents(NamedTuple):
    """What every batch holds, found once from the first good record.

    image: whether it has pixels.
    latent, states: (channels, dtype), or None.
    """

    image: bool = False
    latent: tuple | None = None
    states: tuple | None = None


def read(reader, indices):
    """A Record or a BadRecord for each index, whatever goes wrong; one by one where it can only be so."""
    if hasattr(reader, "__getitems__"):
        try:
            return reader.__getitems__([int(i) for i in indices])
        except Exception:  # one of them spoils the lot: each on its own, to learn which
            pass
    return (read_one(reader, i) for i in indices)


def read_one(reader, index):
    try:
        return reader[int(index)]
    except BadRecord as bad:
        return bad
    except OSError as error:
        return BadRecord("unreadable", str(error))
    except (Exception, SystemExit) as error:
        return BadRecord("error", f"{type(error).__name__}: {error}")


def contents(reader, inputs, shape_of):
    """The Contents of all batches, after the first good record; `inputs` as in the loader.

    Every host looks at the same records, and so finds the same.
    Args:
      shape_of: index -> (height, width) in pixels of the batches that the record is in.
    Raises:
      InputError: none of the first 256 records is good, or the first good one does not fit.
    """
    reasons, looked = {}, min(PROBED, len(reader))
    for index in range(looked):
        record = read_one(reader, index)
        if not isinstance(record, BadRecord):
            return _contents(record, inputs, shape_of(index))
        reasons.setdefault(record.reason, f"record {index}: {record}")
    raise InputError(
        f"data.source: none of its first {looked} records can be used; " + "; ".join(reasons.values())
    )


def _contents(record, inputs, shape):
    arrays = {name: record.arrays.get(name) for name in ("latent", "states") if name in inputs}
    latent, states, found = arrays.get("latent"), arrays.get("states"), {}
    if latent is not None:
        if latent.ndim != 3 or tuple(PATCH * side for side in latent.shape[:2]) != tuple(shape):
            raise InputError(
                f"data.size: batches of {shape} pixels (height, width) do not fit the latent of "
                f"{record.key}, {latent.shape}; was it made for another size?"
            )
        found["latent"] = (latent.shape[2], _dtype(latent))
    elif "image" in inputs and record.image is not None:
        found["image"] = True
    elif {"latent", "image"} & set(inputs):
        raise InputError(f"data.source: {record.key} has no {' and no '.join(inputs[:2])}")
    if states is not None:
        if states.ndim != 2:
            raise InputError(f"data.source: states of {record.key} are {states.shape}, not [m d]")
        found["states"] = (states.shape[1], _dtype(states))
    return Contents(**found)


def _dtype(array):
    return np.dtype(np.float16 if array.dtype == np.float16 else np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Assemble:
    """assemble(number) is the global batch of that number, of it the rows start..stop of this host.

    reader, captions, tokenize: as in the loader.  schedule: the order.  members: the records of each
    bucket, None where all are in one.  shapes: of the buckets, (height, width) in pixels.
    contents: what a batch holds.  length: tokens of cached states.  seed: of the choice of captions.
    """

    reader: Any
    schedule: Schedule
    members: tuple | None
    shapes: tuple
    contents: Contents
    captions: Any
    tokenize: Any
    length: int
    seed: int
    start: int
    stop: int

    def __call__(self, number):
        bucket, indices = self.records(number, self.start, self.stop)
        positions = (number * self.schedule.batch + np.arange(self.start, self.stop)).astype(np.uint32)
        batch, texts = self.empty(bucket), [""] * len(indices)
        for row, record in enumerate(read(self.reader, indices)):
            try:
                if isinstance(record, BadRecord):
                    raise record
                texts[row] = self.fill(batch, row, record, positions[row])
            except BadRecord as bad:
                self.blank(batch, row, bad)
            except (Exception, SystemExit) as error:
                self.blank(batch, row, BadRecord("error", f"{type(error).__name__}: {error}"))
        for name in ("latent", "states"):
            for row in np.flatnonzero(not_finite(batch[name])) if name in batch else ():
                self.blank(batch, row, BadRecord("features", f"{name} is not finite"))
        if self.tokenize is not None and self.contents.states is None:
            batch |= self.tokenize(texts)
        batch["weight"] = (batch["bad"] == 0).astype(np.float32)
        return batch | {"position": positions}

    def records(self, number, start, stop):
        """(bucket, indices into the reader) of rows start..stop of the global batch `number`."""
        bucket, rows = self.schedule.rows(number, start, stop)
        return bucket, rows if self.members is None else self.members[bucket][rows]

    def empty(self, bucket):
        b, (height, width) = self.stop - self.start, self.shapes[bucket]
        batch = {"bad": np.zeros(b, np.int32)}
        if self.contents.latent:
            channels, dtype = self.contents.latent
            batch["latent"] = np.zeros((b, height // PATCH, width // PATCH, channels), dtype)
        elif self.contents.image:
            batch["image"] = np.zeros((b, height, width, 3), np.uint8)
        if self.contents.states:
            channels, dtype = self.contents.states
            batch["states"] = np.zeros((b, self.length, channels), dtype)
            batch["mask"] = np.zeros((b, self.length), bool)
        return batch

    def fill(self, batch, row, record, position):
        """Puts one record into its row; returns its caption, "" where none is wanted."""
        if "latent" in batch:
            place(batch["latent"][row], record.arrays.get("latent"), "latent")
        elif "image" in batch:
            if record.image is None:
                raise BadRecord("unreadable", "no picture")
            image = batch["image"][row]
            image[...] = images.decode(record.image, *image.shape[:2])
        if "states" in batch:
            place_states(batch["states"][row], batch["mask"][row], record.arrays)
        elif self.tokenize is not None:
            key = np.array([self.seed, position], np.uint64)
            return self.captions.choose(record, np.random.Generator(np.random.Philox(key=key)))[1]
        return ""

    def blank(self, batch, row, bad):
        """A placeholder: weight 0, and finite all through the network, which 0 times NaN would not be."""
        for name, array in batch.items():
            array[row] = 0
        if "mask" in batch:
            batch["mask"][row, 0] = True  # attention over no token at all is not defined
        batch["bad"][row] = bad.number


def place(target, array, name):
    if array is None:
        raise BadRecord("features", f"no {name}")
    if array.shape != target.shape:
        raise BadRecord("features", f"{name} {array.shape}, expected {target.shape}")
    target[...] = array


def place_states(target, mask, arrays):
    """States [n d] and their mask [n], all true where absent, into [m d] and [m]."""
    states, valid = arrays.get("states"), arrays.get("mask")
    if states is None:
        raise BadRecord("features", "no states")
    valid = np.ones(len(states), bool) if valid is None else np.asarray(valid, bool)
    if states.ndim != 2 or states.shape[1] != target.shape[1] or valid.shape != states.shape[:1]:
        raise BadRecord("features", f"states {states.shape} with mask {valid.shape}")
    if not valid.any():
        raise BadRecord("features", "no valid state")
    used = int(np.flatnonzero(valid)[-1]) + 1
    if used > len(target):
        raise BadRecord("features", f"{used} states, of which data.tokens allows {len(target)}")
    target[:used], mask[:used] = states[:used], valid[:used]


def not_finite(array):
    """bool [b]: rows that hold NaN or an infinity.  float16 by its bits: numpy has no fast isfinite."""
    axes = tuple(range(1, array.ndim))
    if array.dtype == np.float16:
        return ((array.view(np.uint16) & 0x7C00) == 0x7C00).any(axes)
    return ~np.isfinite(array).all(axes)


