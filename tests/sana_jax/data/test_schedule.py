"""The static schedule: every record once per epoch, in batches of one bucket, from one integer."""

import collections
import tracemalloc

import pytest

from sana_jax.data.schedule import Schedule
from sana_jax.errors import InputError

CASES = [((13, 0, 7, 1), 4), ((97,), 12), ((3,), 8), ((1, 1, 1), 5), ((40, 60, 20), 20), ((5, 2), 1)]


@pytest.mark.parametrize("sizes, batch", CASES)
def test_every_record_comes_once_per_epoch_of_its_bucket(sizes, batch):
    """B epochs of the whole are full batches of every bucket: each record has come B times."""
    schedule = Schedule(sizes, batch, seed=7)
    streams = collections.defaultdict(dict)
    for number in range(sum(sizes)):  # B epochs of n records in batches of B
        bucket, turn = schedule.place(number)
        assert schedule.epoch(number) < batch
        same, rows = schedule.rows(number)
        assert same == bucket and rows.shape == (batch,)
        assert turn not in streams[bucket], "a batch of a stream came twice"
        streams[bucket][turn] = rows.tolist()
    assert schedule.epoch(sum(sizes)) >= batch
    assert sorted(streams) == [k for k, size in enumerate(sizes) if size]
    for bucket, batches in streams.items():
        assert sorted(batches) == list(range(sizes[bucket]))  # n_k batches of B are B epochs of n_k
        stream = [row for turn in sorted(batches) for row in batches[turn]]
        for epoch in range(batch):
            part = stream[epoch * sizes[bucket] : (epoch + 1) * sizes[bucket]]
            assert sorted(part) == list(range(sizes[bucket]))


def test_a_bucket_gives_its_share_in_every_epoch():
    sizes, batch = (13, 0, 7, 1), 4
    schedule, counts = Schedule(sizes, batch), collections.Counter()
    for number in range(2 * sum(sizes)):
        counts[schedule.epoch(number), schedule.place(number)[0]] += 1
    for epoch in range(2 * batch):
        for bucket, size in enumerate(sizes):
            assert counts[epoch, bucket] == (epoch + 1) * size // batch - epoch * size // batch


def test_epochs_and_batches_are_shuffled_and_the_seed_decides():
    schedule = Schedule((1000,), 10)
    epochs = [[tuple(schedule.rows(100 * e + i)[1]) for i in range(100)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    turns = [schedule.place(i)[1] for i in range(100)]
    assert sorted(turns) == list(range(100)) != turns
    assert [schedule.place(100 + i)[1] - 100 for i in range(100)] != turns
    other = Schedule((1000,), 10, seed=1)
    assert sum(other.rows(i)[1].tolist() == schedule.rows(i)[1].tolist() for i in range(100)) == 0
    two = Schedule((1000, 1000), 10)  # buckets of one size are not shuffled alike
    streams = {k: {} for k in (0, 1)}
    for i in range(200):
        bucket, turn = two.place(i)
        streams[bucket][turn] = two.rows(i)[1].tolist()
    assert all(streams[0][turn] != streams[1][turn] for turn in range(100))


def test_the_order_is_what_it_always_was():
    """A run resumes in the order that it began in: other numbers here break every run in progress."""
    schedule = Schedule((13, 0, 7, 1), 4, seed=3)
    found = [(bucket, rows.tolist()) for bucket, rows in map(schedule.rows, range(6))]
    assert found == GOLDEN


def test_rows_of_a_host_are_a_slice():
    schedule = Schedule((50, 30), 12)
    for number in range(20):
        bucket, rows = schedule.rows(number)
        for start, stop in ((0, 4), (4, 12), (11, 12)):
            assert schedule.rows(number, start, stop)[0] == bucket
            assert schedule.rows(number, start, stop)[1].tolist() == rows[start:stop].tolist()


def test_memory_does_not_grow_with_the_data():
    schedule = Schedule((50_000_000, 3_000_000, 7), 1024)
    tracemalloc.start()
    seen = {int(row) for number in (0, 10**6, 4_194_303) for row in schedule.rows(number, 0, 32)[1]}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 96 and peak < 1 << 20


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sizes=(), batch=4), "holds no record"),
        (dict(sizes=(0, 0), batch=4), "holds no record"),
        (dict(sizes=(5,), batch=0), "data.batch=0: must be a positive integer"),
        (dict(sizes=(5,), batch=2, seed=-1), r"seed=-1: must be an int in \[0, 4294967295\]"),
        (dict(sizes=(5,), batch=2, seed=2**32), "seed=4294967296"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(InputError, match=message):
        Schedule(**fields)


GOLDEN = [
    (2, [5, 6, 3, 4]),
    (0, [4, 5, 10, 7]),
    (0, [0, 3, 12, 2]),
    (0, [9, 8, 6, 1]),
    (0, [11, 5, 8, 10]),
    (0, [12, 2, 3, 6]),
]
