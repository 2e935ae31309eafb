"""One order of rows, whatever reads them; what is bad keeps its place and is counted."""

import collections
import dataclasses
import multiprocessing

import numpy as np
import pytest

from sana_jax.data.captions import Captions
from sana_jax.data.loader import POSITIONS, Loader
from sana_jax.data.records import REASONS, TooManyBadRecords
from sana_jax.errors import InputError
from tests.toy_reader import Data, Reader, Words, words

FAULTY = {5: "damaged", 17: "no latent", 40: "nan latent", 96: "OSError"}


def batches(count, reader=None, *, seek=0, hosts=1, seed=3, tokenize=None, inputs=None, **fields):
    """`count` global batches: the rows of all hosts, one after the other."""
    reader = reader or Reader(faults=FAULTY)
    more = {} if inputs is None else {"inputs": inputs}
    parts = []
    for host in range(hosts):
        with Loader(reader, Data(**fields), seed=seed, tokenize=tokenize, host=host, hosts=hosts, **more) as loader:
            loader.seek(seek)
            parts.append([next(loader) for _ in range(count)])
            assert loader.samples == seek + count * Data(**fields).batch
    assert multiprocessing.active_children() == []
    return [{name: np.concatenate([b[name] for b in rows]) for name in rows[0]} for rows in zip(*parts)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], name)


@pytest.fixture(scope="module")
def reference():
    return batches(10)


@pytest.mark.parametrize("hosts, workers", [(2, 0), (3, 0), (4, 0), (6, 0), (12, 0), (1, 1), (1, 2), (2, 1)])
def test_same_rows_on_any_hosts_and_workers(hosts, workers, reference):
    assert_equal(batches(10, hosts=hosts, workers=workers), reference)


def test_threads_and_buffer_change_nothing(reference):
    assert_equal(batches(10, threads=7, buffer=9), reference)


@pytest.mark.parametrize("boundary", range(1, 10))
def test_resumes_at_every_batch(boundary, reference):
    hosts = (1, 2, 3)[boundary % 3]
    assert_equal(batches(10 - boundary, seek=12 * boundary, hosts=hosts), reference[boundary:])


def test_resumes_with_workers(reference):
    assert_equal(batches(3, seek=84, workers=2), reference[7:])


def test_seek_while_running(reference):
    with Loader(Reader(faults=FAULTY), Data(), seed=3) as loader:
        next(loader), next(loader)
        loader.seek(12)
        assert_equal([next(loader)], reference[1:2])


def test_another_seed_is_another_order(reference):
    other = batches(1, seed=4)[0]
    assert not np.array_equal(other["latent"], reference[0]["latent"])


def test_what_a_batch_holds(reference):
    for number, batch in enumerate(reference):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "latent": ((12, 2, 2, 4), np.float16),
            "states": ((12, 6, 8), np.float16),
            "mask": ((12, 6), bool),
            "weight": ((12,), np.float32),
            "bad": ((12,), np.int32),
            "position": ((12,), np.uint32),
        }
        assert batch["position"].tolist() == list(range(12 * number, 12 * number + 12))


def test_every_record_once_per_epoch_bad_ones_in_place():
    """97 batches of 12 are 12 epochs of 97 records, in which a bad record has a row like any other."""
    rows = collections.Counter()
    for batch in batches(97):
        good = batch["weight"] == 1
        assert np.array_equal(good, batch["bad"] == 0)
        rows.update(batch["latent"][good, 0, 0, 0].astype(int).tolist())
        for name in ("latent", "states"):
            assert not batch[name][~good].any()
        assert batch["mask"][~good].sum(1).tolist() == [1] * (~good).sum()  # attention needs a token
        rows.update(REASONS[number - 1] for number in batch["bad"][~good])
    faults = {"damaged": 12, "features": 24, "unreadable": 12}
    assert rows == faults | {i: 12 for i in range(97) if i not in FAULTY}


def test_states_and_mask_are_padded(reference):
    good = reference[0]["weight"] == 1
    indices = reference[0]["latent"][good, 0, 0, 0].astype(int)
    for i, states, mask in zip(indices, reference[0]["states"][good], reference[0]["mask"][good]):
        length = 1 + i % 6
        assert mask.tolist() == [True] * length + [False] * (6 - length)
        assert (states[:length] == i).all() and not states[length:].any()


def test_batches_of_one_shape_in_buckets():
    """40 records of three shapes, the rarest fewer than a batch: none is lost, no batch is mixed."""
    reader = Reader(40, shapes=((704, 352),) * 5 + ((512, 512),) * 4 + ((288, 864),))
    data = dict(batch=8, size=512, buckets=True)
    seen, shapes = collections.Counter(), collections.Counter()
    for batch in batches(40, reader, **data):  # 8 epochs
        assert batch["weight"].all()
        height, width = batch["latent"].shape[1:3]
        shapes[32 * height, 32 * width] += 1
        values = batch["latent"][:, 0, 0, 0].astype(int)
        seen.update(values.tolist())
        assert len({reader.sizes[i].tobytes() for i in values}) == 1
    assert seen == {i: 8 for i in range(40)}
    assert shapes == {(352, 704): 20, (512, 512): 16, (864, 288): 4}
    with Loader(reader, Data(**data)) as loader:
        assert sorted(loader.layouts) == sorted(shapes)


def test_buckets_on_hosts_agree():
    reader = Reader(40, "image", shapes=((64, 32), (32, 32)))
    whole = batches(6, reader, batch=4, size=512, buckets=True)
    assert_equal(batches(6, reader, batch=4, size=512, buckets=True, hosts=2), whole)


def test_the_fingerprint_is_of_the_order():
    """Sizes choose the bucket, and so the order, but are not in the fingerprint of a reader."""

    class Source(Reader):
        def fingerprint(self):
            return "of names and bytes"

    def fingerprint(shapes, host=0, **data):
        with Loader(Source(12, "image", shapes=shapes), Data(batch=4, **data), host=host, hosts=2) as loader:
            return loader.fingerprint()

    one, other = ((512, 512), (704, 352)), ((512, 512), (0, 0))
    wide = dict(size=512, buckets=True)
    found = fingerprint(one, **wide)
    assert len(found) == 32 and int(found, 16) and found == fingerprint(one, host=1, **wide)
    assert found != fingerprint(other, **wide) and found != fingerprint(one[::-1], **wide)
    assert found == fingerprint(((500, 500), (700, 352)), **wide), "the same buckets"
    assert fingerprint(one) == fingerprint(other), "all are in one bucket"
    with Loader(Reader(12, "image"), Data(batch=4)) as loader:
        assert loader.fingerprint() != fingerprint(((64, 64),))


def test_one_of_several_captions_by_seed_and_position():
    reader = Reader(30, "text")
    run = dict(reader=reader, tokenize=Words(), inputs=())
    first = batches(5, **run)
    assert first[0]["ids"].shape == (12, 12) and "image" not in first[0]
    assert_equal(batches(5, hosts=4, **run), first)
    assert_equal(batches(2, seek=36, **run), first[3:])
    texts = [text for batch in first for text in words(batch["ids"])]
    names = collections.Counter(text.split()[0] for text in texts)
    assert len(names) == 3 and min(names.values()) > 8
    chosen = collections.defaultdict(set)
    for text in (t for b in batches(30, **run) for t in words(b["ids"])):
        chosen[text.split()[1]].add(text.split()[0])
    assert any(len(kinds) > 1 for kinds in chosen.values()), "the same caption in every epoch"
    only = batches(2, captions=Captions(how="first"), **run)
    assert {text.split()[0] for b in only for text in words(b["ids"])} == {"prompt"}


@pytest.mark.parametrize("kind, tokenize", [("latent", None), ("image", Words())])
def test_layouts_tell_beforehand(kind, tokenize):
    with Loader(Reader(kind=kind), Data(), tokenize=tokenize, host=1, hosts=3) as loader:
        batch = next(loader)
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == loader.layouts[64, 64]
        assert loader.names == batch.keys()


def test_counts_and_where():
    with Loader(Reader(faults=FAULTY), Data(), seed=3, hosts=1) as loader:
        rows = [next(loader) for _ in range(97)]
        assert loader.counts == {"damaged": 12, "features": 24, "unreadable": 12}
        bad = np.concatenate([b["position"][b["bad"] > 0] for b in rows])
        assert set(loader.where(bad)) == {"toy-5", "toy-17", "toy-40", "toy-96"}
        batch = rows[50]
        good = batch["weight"] == 1
        indices = batch["latent"][good, 0, 0, 0].astype(int)
        assert loader.where(batch["position"][good]) == [f"toy-{i}" for i in indices]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_records(workers):
    """More than 2 of the last 100 rows: 3 in the first epoch of 97 records."""
    reader = Reader(faults={3: "damaged", 50: "caption", 90: "damaged"})
    data = Data(bad_share=0.02, bad_window=100, workers=workers)
    with Loader(reader, data) as loader, pytest.raises(TooManyBadRecords) as caught:
        for _ in range(100):
            next(loader)
    message = str(caught.value)
    assert "3 of the last" in message and "data.bad_share=0.02 of 100" in message
    assert "2 damaged, 1 caption" in message and "as told" in message and "toy-" in message
    assert loader.samples <= 108 and loader.counts == {"damaged": 2, "caption": 1}


def test_old_bad_records_are_forgotten():
    """One in 97 comes a few times in any 100 rows, and 36 times in all."""
    with Loader(Reader(faults={3: "damaged"}), Data(bad_share=0.04, bad_window=100)) as loader:
        for _ in range(3 * 97):
            next(loader)
        assert loader.counts == {"damaged": 36}


def test_waiting_is_measured():
    with Loader(Reader(), Data()) as loader:
        assert loader.wait_seconds == 0
        next(loader)
        assert loader.wait_seconds > 0


def test_the_numbers_of_samples_end():
    with Loader(Reader(), Data(batch=16)) as loader:
        loader.seek(POSITIONS - 32)
        assert next(loader)["position"][0] == POSITIONS - 32
        assert next(loader)["position"][-1] == POSITIONS - 1
        with pytest.raises(InputError, match=f"samples={POSITIONS}: a run counts up to"):
            next(loader)


@pytest.mark.parametrize("samples", [-12, 5, 13])
def test_only_whole_batches_are_sought(samples):
    with Loader(Reader(), Data()) as loader, pytest.raises(InputError, match=f"samples={samples}: must be a multiple"):
        loader.seek(samples)


@pytest.mark.parametrize(
    "fields, reader, message",
    [
        (dict(batch=0), Reader(), "data.batch=0: must be a positive integer"),
        (dict(workers=-1), Reader(), "data.workers=-1"),
        (dict(threads=0), Reader(), "data.threads=0"),
        (dict(buffer=0), Reader(), "data.buffer=0"),
        (dict(buffer=4097), Reader(), "data.buffer=4097"),
        ({}, Reader(0), "data.source: holds no record"),
        (dict(size=96, buckets=True), Reader(), "data.size=96: aspect ratios"),
        (dict(size=128), Reader(), r"batches of \(128, 128\) pixels .* do not fit the latent of toy-0, \(2, 2, 4\)"),
        ({}, Reader(4, faults=dict.fromkeys(range(4), "empty")), "none of its first 4 .* record 0: empty: as told"),
        ({}, Reader(4, "text"), "toy-0 has no latent and no image"),
    ],
)
def test_errors(fields, reader, message):
    with pytest.raises(InputError, match=message):
        Loader(reader, Data(**fields))


def test_a_batch_is_shared_evenly():
    with pytest.raises(InputError, match="data.batch=12: must be a multiple of the 5 processes"):
        Loader(Reader(), Data(), hosts=5)


def test_fields_are_those_of_an_experiment():
    """The toy Data stands for the real one."""
    from sana_jax import experiment

    real = {field.name for field in dataclasses.fields(experiment.Data)}
    assert {field.name for field in dataclasses.fields(Data)} <= real
