"""A reader without files, whose records can go wrong in every way; workers can import it."""

import dataclasses
import io
import os
import signal
import sys

import numpy as np
from PIL import Image

from sana_jax.data.records import BadRecord, Record


@dataclasses.dataclass(frozen=True)
class Data:
    """The fields of `experiment.Data` that a loader reads, at toy size."""

    batch: int = 12
    size: int = 64
    buckets: bool = False
    captions: object = None
    tokens: int = 6
    workers: int = 0
    threads: int = 2
    buffer: int = 2
    bad_share: float = 1.0
    bad_window: int = 1000


def picture(value, width=64, height=64):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass
class Reader:
    """Record i says i: its latent or its pixels, its states and its captions.

    kind: "latent" with states, "image", or "text".
    faults: {index: reason to raise, or a name of FAULTS}.
    shapes: (width, height) of the pictures, in turn.
    """

    count: int = 97
    kind: str = "latent"
    faults: dict = dataclasses.field(default_factory=dict)
    shapes: tuple = ((64, 64),)

    def __len__(self):
        return self.count

    @property
    def sizes(self):
        return np.array(self.shapes, np.int32)[np.arange(self.count) % len(self.shapes)]

    def fingerprint(self):
        return repr(self)

    def key(self, i):
        return f"toy-{i}"

    def __getitem__(self, i):
        assert type(i) is int and 0 <= i < self.count, i
        if (fault := self.faults.get(i)) is not None:
            return FAULTS[fault](self, i) if fault in FAULTS else self.bad(fault)
        return self.record(i)

    def bad(self, reason):
        raise BadRecord(reason, "as told")

    def record(self, i):
        captions = {"long": f"long {i}", "prompt": f"prompt {i}", "short": f"short {i}"}
        width, height = self.shapes[i % len(self.shapes)]
        if self.kind == "text":
            return Record(self.key(i), captions=captions)
        if self.kind == "image":
            return Record(self.key(i), picture(i % 256, width, height), captions)
        latent = np.full((height // 32, width // 32, 4), i, np.float16)
        states = np.full((1 + i % 6, 8), i, np.float16)
        return Record(self.key(i), captions=captions, arrays={"latent": latent, "states": states})


def with_array(name, change):
    def fault(reader, i):
        record = reader.record(i)
        return record._replace(arrays=record.arrays | {name: change(record.arrays[name])})

    return fault


def die(how):
    def fault(reader, i):
        how()
        return reader.record(i)

    return fault


FAULTS = {
    "OSError": lambda reader, i: open("/nowhere/at/all"),
    "IndexError": lambda reader, i: [][i],
    "SystemExit": die(lambda: sys.exit(0)),
    "exit 0": die(lambda: os._exit(0)),
    "SIGKILL": die(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "no latent": lambda reader, i: reader.record(i)._replace(arrays={}),
    "nan latent": with_array("latent", lambda a: np.where(np.arange(a.shape[-1]) == 1, np.nan, a).astype(a.dtype)),
    "inf states": with_array("states", lambda a: np.full_like(a, np.inf)),
    "huge latent": with_array("latent", lambda a: np.full(a.shape, 1e6, np.float32)),
    "wide states": with_array("states", lambda a: np.zeros((len(a), 9), a.dtype)),
    "many states": with_array("states", lambda a: np.zeros((7, 8), a.dtype)),
    "flat latent": with_array("latent", lambda a: a[..., 0]),
    "not a picture": lambda reader, i: reader.record(i)._replace(image=b"GIF89a" + bytes(100)),
    "no picture": lambda reader, i: reader.record(i)._replace(image=None),
    "no caption": lambda reader, i: reader.record(i)._replace(captions={}),
}


class Words:
    """Stands for a tokenizer: the first letters of a text."""

    length = 12

    def __call__(self, texts):
        ids = np.zeros((len(texts), self.length), np.int32)
        for row, text in zip(ids, texts):
            row[: len(text)] = [ord(letter) for letter in text[: self.length]]
        return {"ids": ids, "ids_mask": ids > 0}


def words(ids):
    """The texts behind `ids` of Words."""
    return ["".join(chr(number) for number in row if number) for row in ids]
