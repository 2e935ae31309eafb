"""Batches in an order that one integer fixes, on any number of hosts, processes and threads.

    loader = Loader(reader, config.data, seed=config.seed, tokenize=tokenizer)
    loader.seek(samples)
    batch = next(loader)

A batch is a dict of numpy arrays, this host's rows of the global batch:

    weight [b] float32, 1, or 0 for a placeholder;  position [b] uint32, the global sample number;
    bad [b] int32, 0 or the number of a reason (`records.REASONS`);
    image [b H W 3] uint8, or latent [b h w c] as the autoencoder made it, or scene [b P] float32, which
        the reader's `paint` turns into an image of `loader.shape` on the device;
    ids [b M] int32 and ids_mask [b M] bool, or states [b m d] and mask [b m] bool.
"""

import collections
import functools
import hashlib
import time

import numpy as np

from sana_jax.data import buckets
from sana_jax.data.assemble import Assemble, contents, read_one
from sana_jax.data.captions import Captions
from sana_jax.data.records import REASONS, BadRecord, TooManyBadRecords
from sana_jax.data.schedule import Schedule
from sana_jax.data.workers import Workers, in_threads
from sana_jax.errors import InputError, require_positive, require_range

POSITIONS = 2**32  # a sample's number is 32 bits wide, since random keys are made from it
EXAMPLES = 3  # of bad records in a message
INPUTS = ("latent", "image", "states")


class Loader:
    """Endless iterator; `samples`, the global samples given so far, is all its state.

    Args:
      reader: of a source of this package, `source.open()`.
      data: `experiment.Data`.
      seed: of the order and of the choice of captions.
      tokenize: texts -> arrays with a row for each (`tokens.Tokenizer`), None for no texts.  It can
        be pickled, as the reader can.
      inputs: what the objective can use.  Of "latent" and "image" the first that the records have, so
        ("image",) insists on pixels and () does without; "states" in place of captions to tokenize.
      host, hosts: which rows of a global batch are this process's: an equal share, in order.
    Attributes:
      names: of the arrays in a batch, when it is painted.
      shape: (height, width) in pixels of the last batch, None before the first.
      layouts: {(height, width) in pixels: {name: (shape, dtype)}}, every kind of batch there is.
      counts: {reason: bad records} of this host.
      wait_seconds: spent in `next`, for batches that were not ready.
    Raises:
      InputError: an argument; or nothing in the source can be used.
    """

    def __init__(self, reader, data, *, seed=0, tokenize=None, inputs=INPUTS, host=0, hosts=1):
        require_positive("data.batch", data.batch)
        require_range("data.workers", data.workers, 0, 1024)
        require_range("data.threads", data.threads, 1, 1024)
        require_range("data.buffer", data.buffer, 1, 4096)
        if data.batch % hosts:
            raise InputError(f"data.batch={data.batch}: must be a multiple of the {hosts} processes")
        if len(reader) == 0:
            raise InputError("data.source: holds no record")
        shapes, members, counts = buckets.divide(reader, data.size, data.buckets)
        self._batch = Assemble(
            reader=reader,
            schedule=Schedule(counts, data.batch, seed),
            members=members,
            shapes=shapes,
            contents=contents(reader, inputs, functools.partial(_shape, reader, data), tokenize),
            captions=data.captions or Captions(),
            tokenize=tokenize,
            length=data.tokens,
            seed=seed,
            start=host * (data.batch // hosts),
            stop=(host + 1) * (data.batch // hosts),
        )
        self._data, self._batches = data, None
        self._recent = np.zeros(max(1, data.bad_window // hosts), bool)  # were they bad: the last rows
        self._seen = 0  # rows since the start
        self.samples, self.wait_seconds, self.counts = 0, 0.0, collections.Counter()
        used = [bucket for bucket, count in enumerate(counts) if count]
        self.layouts = {shapes[bucket]: self._batch.layout(bucket) for bucket in used}
        self.names = frozenset("image" if name == "scene" else name for name in self._batch.layout(0))
        self.shape = None

    def __iter__(self):
        return self

    def __next__(self):
        """The next batch.

        Raises:
          TooManyBadRecords: more than `data.bad_share` of the last `data.bad_window` were bad.
          WorkerDied: a worker process ended.
        """
        if self.samples + self._data.batch > POSITIONS:
            raise InputError(f"samples={self.samples}: a run counts up to {POSITIONS} samples")
        begin = time.perf_counter()
        self.start()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - begin
        first = self.samples + self._batch.start
        if batch["position"][0] != first:
            raise RuntimeError(f"batch of sample {batch['position'][0]} in the place of {first}")
        bucket, _ = self._batch.schedule.place(self.samples // self._data.batch)
        self.shape = self._batch.shapes[bucket]
        self.samples += self._data.batch
        self._count(batch)
        return batch

    def start(self):
        """Begins to read ahead, if it has not begun; `next` does so too."""
        if self._batches is not None:
            return
        data = self._data
        numbers = range(self.samples // data.batch, POSITIONS // data.batch)
        if data.workers:
            self._batches = Workers(self._batch, numbers, data.workers, data.threads, data.buffer)
        else:
            self._batches = in_threads(self._batch, numbers, data.threads, data.buffer)
            self._batches.start_prefetch()

    def seek(self, samples):
        """Goes on with the global sample `samples`.  Raises InputError: not between two batches."""
        if samples < 0 or samples % self._data.batch:
            raise InputError(f"samples={samples}: must be a multiple of data.batch={self._data.batch}")
        self.close()
        self.samples = samples

    def close(self):
        """Ends threads and processes; `next` starts them again."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def fingerprint(self):
        """32 hex digits, of all that the order depends on: the reader's, and what is in each bucket."""
        found = hashlib.sha256(repr((self._batch.reader.fingerprint(), self._batch.shapes)).encode())
        for members in self._batch.members or ():
            found.update(np.int64(len(members)).tobytes() + np.ascontiguousarray(members, "<i8").tobytes())
        return found.hexdigest()[:32]

    def where(self, positions):
        """For messages: the key of the record that each global sample number stands for."""
        return [key for key, _ in map(self._look_up, positions)]

    def _look_up(self, position):
        """(key, Record or BadRecord) of a global sample number."""
        number, row = divmod(int(position), self._data.batch)
        _, (index,) = self._batch.records(number, row, row + 1)
        record, reader = read_one(self._batch.reader, index), self._batch.reader
        if isinstance(record, BadRecord):
            return reader.key(int(index)) if hasattr(reader, "key") else f"record {index}", record
        return record.key, record

    def _count(self, batch):
        bad = batch["bad"] > 0
        self._recent[(self._seen + np.arange(bad.size)) % self._recent.size] = bad
        self._seen += bad.size
        if not bad.any():
            return
        self.counts.update(REASONS[number - 1] for number in batch["bad"][bad])
        most, found = self._data.bad_share * self._recent.size, int(self._recent.sum())
        if found > most:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
            examples = (f"{key}: {record}" for key, record in map(self._look_up, batch["position"][bad][:EXAMPLES]))
            raise TooManyBadRecords(
                f"{found} of the last {min(self._seen, self._recent.size)} records were bad, more than "
                f"data.bad_share={self._data.bad_share} of {self._recent.size} allows; so far: {counts}; "
                f"for example {'; '.join(examples)}"
            )


def _shape(reader, data, index):
    """(height, width) in pixels of the batches with record `index`."""
    shapes = buckets.shapes(data.size, data.buckets)
    return shapes[buckets.assign(reader.sizes[index : index + 1], data.size, data.buckets)[0] if len(shapes) > 1 else 0]
