"""From a batch's number to its arrays.  All that happens to a record happens here, in a worker."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sana_jax.data import images
from sana_jax.data.records import BadRecord
from sana_jax.data.schedule import Schedule
from sana_jax.errors import InputError
from sana_jax.resolution import PATCH

PROBED = 256  # records that are looked at until one is good
# Pillow keeps the memory of decoded pictures for the next ones, at most 8 times 16 MB.  Else the
# kernel takes it back and zeroes it anew for each, a sixth of the time of decoding in a thread.
Image.core.set_blocks_max(8)


class Contents(NamedTuple):
    """What every batch holds, found once from the first good record.

    image: whether it has pixels.  scene: how many numbers of a scene to be painted, or None.
    latent, states: (channels, dtype), or None.
    texts: {name: (shape of a row, dtype)} of what a tokenizer makes.
    """

    image: bool = False
    scene: int | None = None
    latent: tuple | None = None
    states: tuple | None = None
    texts: dict = {}


def read_one(reader, index):
    """A Record or a BadRecord, whatever goes wrong; the cause of one by I/O is the OSError."""
    try:
        return reader[int(index)]
    except BadRecord as bad:
        return bad
    except OSError as error:
        bad = BadRecord("unreadable", str(error))
        bad.__cause__ = error
        return bad
    except (Exception, SystemExit) as error:
        return BadRecord("error", f"{type(error).__name__}: {error}")


def contents(reader, inputs, shape_of, tokenize):
    """The Contents of all batches, after the first good record; `inputs` and `tokenize` as in the loader.

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
            return _contents(record, inputs, shape_of(index), tokenize)
        reasons.setdefault(record.reason, f"record {index}: {record}")
    raise InputError(
        f"data.source: none of its first {looked} records can be used; " + "; ".join(reasons.values())
    )


def _contents(record, inputs, shape, tokenize):
    arrays = {name: record.arrays.get(name) for name in ("latent", "states") if name in inputs}
    latent, states, found = arrays.get("latent"), arrays.get("states"), {}
    scene = record.arrays.get("scene")
    if latent is not None:
        if latent.ndim != 3 or tuple(PATCH * side for side in latent.shape[:2]) != tuple(shape):
            raise InputError(
                f"data.size: batches of {shape} pixels (height, width) do not fit the latent of "
                f"{record.key}, {latent.shape}; was it made for another size?"
            )
        found["latent"] = (latent.shape[2], _dtype(latent))
    elif "image" in inputs and record.image is not None:
        found["image"] = True
    elif "image" in inputs and scene is not None:
        found["scene"] = len(scene)
    elif {"latent", "image"} & set(inputs):
        raise InputError(f"data.source: {record.key} has no {' and no '.join(inputs[:2])}")
    if states is not None:
        if states.ndim != 2:
            raise InputError(f"data.source: states of {record.key} are {states.shape}, not [m d]")
        found["states"] = (states.shape[1], _dtype(states))
    elif tokenize is not None:
        found["texts"] = {name: (array.shape[1:], array.dtype) for name, array in tokenize([""]).items()}
    return Contents(**found)


def _dtype(array):
    return np.dtype(np.float16 if array.dtype == np.float16 else np.float32)


def zeros(layout):
    return {name: np.zeros(*told) for name, told in layout.items()}


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

    def __call__(self, number, allocate=zeros):
        """The batch; `allocate` makes its arrays, {name: (shape, dtype)} -> {name: array of 0}."""
        bucket, indices = self.records(number, self.start, self.stop)
        batch, texts = allocate(self.layout(bucket)), [""] * len(indices)
        batch["position"][:] = number * self.schedule.batch + np.arange(self.start, self.stop)
        for row, index in enumerate(indices):
            try:
                if isinstance(record := read_one(self.reader, index), BadRecord):
                    raise record
                texts[row] = self.fill(batch, row, record)
            except BadRecord as bad:
                self.blank(batch, row, bad)
            except (Exception, SystemExit) as error:
                self.blank(batch, row, BadRecord("error", f"{type(error).__name__}: {error}"))
        for name, array in self.tokenize(texts).items() if self.contents.texts else ():
            batch[name][:] = array
        batch["weight"][:] = batch["bad"] == 0
        return batch

    def records(self, number, start, stop):
        """(bucket, indices into the reader) of rows start..stop of the global batch `number`."""
        bucket, rows = self.schedule.rows(number, start, stop)
        return bucket, rows if self.members is None else self.members[bucket][rows]

    def layout(self, bucket):
        """{name: (shape, dtype)} of a batch."""
        b, (height, width) = self.stop - self.start, self.shapes[bucket]
        found = {"weight": ((b,), np.float32), "position": ((b,), np.uint32), "bad": ((b,), np.int32)}
        if self.contents.latent:
            channels, dtype = self.contents.latent
            found["latent"] = ((b, height // PATCH, width // PATCH, channels), dtype)
        elif self.contents.image:
            found["image"] = ((b, height, width, 3), np.uint8)
        elif self.contents.scene:
            found["scene"] = ((b, self.contents.scene), np.float32)
        if self.contents.states:
            channels, dtype = self.contents.states
            found["states"] = ((b, self.length, channels), dtype)
            found["mask"] = ((b, self.length), bool)
        return found | {name: ((b, *shape), dtype) for name, (shape, dtype) in self.contents.texts.items()}

    def fill(self, batch, row, record):
        """Puts one record into its row; returns its caption, "" where none is wanted."""
        if "latent" in batch:
            place(batch["latent"][row], record.arrays.get("latent"), "latent")
        elif "image" in batch:
            if record.image is None:
                raise BadRecord("unreadable", "no picture")
            image = batch["image"][row]
            image[...] = images.decode(record.image, *image.shape[:2])
        elif "scene" in batch:
            place(batch["scene"][row], record.arrays.get("scene"), "scene")
        if "states" in batch:
            place_states(batch["states"][row], batch["mask"][row], record.arrays)
        elif self.contents.texts:
            key = np.array([self.seed, batch["position"][row]], np.uint64)
            return self.captions.choose(record, np.random.Generator(np.random.Philox(key=key)))[1]
        return ""

    def blank(self, batch, row, bad):
        """A placeholder: weight 0, and finite all through the network, which 0 times NaN would not be."""
        for name in batch.keys() - {"position"}:
            batch[name][row] = 0
        if "mask" in batch:
            batch["mask"][row, 0] = True  # attention over no token at all is not defined
        batch["bad"][row] = bad.number


def place(target, array, name):
    if array is None:
        raise BadRecord("features", f"no {name}")
    if array.shape != target.shape:
        raise BadRecord("features", f"{name} {array.shape}, expected {target.shape}")
    with np.errstate(over="ignore"):  # float32 into float16
        target[...] = array
    if not finite(target):
        raise BadRecord("features", f"{name} is not finite, as {target.dtype}")


def place_states(target, mask, arrays):
    """States [n d] and their mask [n], all true where absent, into [m d] and [m]."""
    states, valid = arrays.get("states"), arrays.get("mask")
    if states is None:
        raise BadRecord("features", "no states")
    valid = np.ones(len(states), bool) if valid is None else np.asarray(valid, bool)
    if states.ndim != 2 or valid.shape != states.shape[:1]:
        raise BadRecord("features", f"states {states.shape} with mask {valid.shape}")
    if not valid.any():
        raise BadRecord("features", "no valid state")
    used = int(np.flatnonzero(valid)[-1]) + 1
    if used > len(target):
        raise BadRecord("features", f"{used} states, of which data.tokens allows {len(target)}")
    place(target[:used], states[:used], "states")
    mask[:used] = valid[:used]


def finite(array):
    """Whether all is.  float16 by its bits: numpy converts it for isfinite, which takes ten times as long."""
    if array.dtype == np.float16:
        return array.size == 0 or int((array.view(np.uint16) & 0x7C00).max()) != 0x7C00
    return bool(np.isfinite(array).all())
