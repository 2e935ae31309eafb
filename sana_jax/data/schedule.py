"""The order of all records for ever, as a function: global sample number -> record.

Every bucket k of n_k records is an endless stream of epochs, each shuffled anew.  A global batch of B
rows takes the next B of one stream.  In epoch e of the whole, bucket k gives

    floor((e + 1) n_k / B) - floor(e n_k / B)

batches, and the batches of an epoch are shuffled too.  So nothing is dropped and nothing repeated, a
batch has one shape, a bucket of fewer than B records waits until it fills a batch, and all follows
from one integer: no host has to hear of another, and nothing is kept in memory.
"""

import dataclasses
import functools

import grain
import numpy as np

from sana_jax.errors import InputError, require_positive, require_range


def _seed(*parts):
    """A seed below 2^32 from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@functools.lru_cache(maxsize=256)
def _shuffled(length, seed):
    """An endless stream of epochs of range(length): item i belongs to epoch i // length."""
    return grain.MapDataset.range(length).shuffle(seed=seed).repeat()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """sizes: records of each bucket, 0 for none.  batch: rows of a global batch, B.  seed: in [0, 2^32)."""

    sizes: tuple[int, ...]
    batch: int
    seed: int = 0

    def __post_init__(self):
        require_positive("data.batch", self.batch)
        require_range("seed", self.seed, 0, 2**32 - 1)
        if not any(self.sizes):
            raise InputError("data.source: holds no record")

    def batches_before(self, epoch):
        """[len(sizes)] batches that each bucket has given before `epoch`."""
        return [epoch * size // self.batch for size in self.sizes]

    def epoch(self, number):
        """The epoch of the global batch `number`."""
        records = sum(self.sizes)
        # batches_before(e) sums to more than e n / B - K: e is no later than that bound allows.
        low, high = 0, (number + len(self.sizes) + 1) * self.batch // records + 1
        while high - low > 1:  # the last epoch that begins no later than this batch
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self.batches_before(middle)) <= number else (low, middle)
        return low

    def place(self, number):
        """(bucket, which batch of its stream) of the global batch `number`."""
        epoch = self.epoch(number)
        before, after = self.batches_before(epoch), self.batches_before(epoch + 1)
        length = sum(after) - sum(before)
        turn = _shuffled(length, _seed(self.seed, 1, epoch))[number - sum(before)]
        for bucket, (start, end) in enumerate(zip(before, after)):
            if turn < end - start:
                return bucket, start + turn
            turn -= end - start
        raise AssertionError(f"batch {number} is not in epoch {epoch}")

    def rows(self, number, start=0, stop=None):
        """(bucket, int64 records of that bucket) for rows start..stop of the global batch `number`."""
        bucket, turn = self.place(number)
        stream = _shuffled(self.sizes[bucket], _seed(self.seed, 0, bucket))
        first = turn * self.batch
        stop = self.batch if stop is None else stop
        return bucket, np.array([stream[first + row] for row in range(start, stop)], np.int64)
