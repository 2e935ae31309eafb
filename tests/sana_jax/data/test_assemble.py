"""What becomes of a record in its row, good or bad."""

import numpy as np
import pytest

from sana_jax.data.captions import Captions
from sana_jax.data.loader import Loader
from sana_jax.data.records import REASONS, BadRecord
from tests.toy_reader import Data, Reader, Words, words


def batch_with(fault, kind="latent", **more):
    """The first batch of 4 records, of which one is faulty, and the row that is."""
    reader = Reader(5, kind, {3: fault} if fault else {})
    with Loader(reader, Data(batch=5), **more) as loader:
        batch = next(loader)
        return batch, loader.where(batch["position"]).index("toy-3")


@pytest.mark.parametrize(
    "kind, fault, reason",
    [
        *(("latent", reason, reason) for reason in REASONS),
        ("latent", "OSError", "unreadable"),
        ("latent", "IndexError", "error"),
        ("latent", "SystemExit", "error"),
        ("latent", "no latent", "features"),
        ("latent", "nan latent", "features"),
        ("latent", "huge latent", "features"),
        ("latent", "inf states", "features"),
        ("latent", "wide states", "features"),
        ("latent", "many states", "features"),
        ("latent", "flat latent", "features"),
        ("image", "not a picture", "format"),
        ("image", "no picture", "unreadable"),
        ("image", "no caption", "caption"),
    ],
)
def test_a_bad_record_is_a_placeholder(kind, fault, reason):
    more = {"tokenize": Words()} if kind == "image" else {}
    batch, row = batch_with(fault, kind, **more)
    others = np.arange(5) != row
    assert REASONS[batch["bad"][row] - 1] == reason and batch["weight"][row] == 0
    assert not batch["bad"][others].any() and batch["weight"][others].all()
    good, same_row = batch_with(None, kind, **more)
    assert row == same_row
    for name in batch.keys() - {"weight", "bad"}:
        np.testing.assert_array_equal(batch[name][others], good[name][others], name)
        assert np.isfinite(batch[name]).all()
    if kind == "latent":
        assert not batch["latent"][row].any() and batch["mask"][row].tolist() == [True] + [False] * 5
    else:
        assert not batch["image"][row].any() and words(batch["ids"])[row] == ""


def test_reasons_cross_processes():
    with Loader(Reader(5, faults={3: "SystemExit", 2: "caption"}), Data(batch=5, workers=1)) as loader:
        next(loader)
        assert loader.counts == {"error": 1, "caption": 1}


def test_a_bad_record_can_be_named():
    bad = BadRecord("caption", "blank")
    assert (bad.reason, bad.detail, str(bad)) == ("caption", "blank", "caption: blank")
    assert REASONS[bad.number - 1] == "caption" and str(BadRecord("empty")) == "empty"
    with pytest.raises(ValueError, match="reason='other'"):
        BadRecord("other")


class Both(Reader):
    def record(self, i):
        record = super().record(i)
        return record._replace(image=Reader(kind="image").record(i).image)


def test_objectives_say_what_they_can_use():
    def names(**more):
        with Loader(Both(), Data(batch=2), **more) as loader:
            return next(loader).keys() - {"weight", "position", "bad"}

    assert names() == {"latent", "states", "mask"}
    assert names(tokenize=Words()) == {"latent", "states", "mask"}
    assert names(inputs=("latent", "image"), tokenize=Words()) == {"latent", "ids", "ids_mask"}
    assert names(inputs=("image",)) == {"image"}
    assert names(inputs=(), tokenize=Words()) == {"ids", "ids_mask"}
    assert names(inputs=("image", "states")) == {"image", "states", "mask"}


def test_pictures_are_decoded_to_the_size_of_the_batch():
    with Loader(Reader(9, "image", shapes=((40, 90),)), Data(batch=4)) as loader:
        batch = next(loader)
        assert batch["image"].shape == (4, 64, 64, 3) and batch["image"].dtype == np.uint8
        indices = [int(key.removeprefix("toy-")) for key in loader.where(batch["position"])]
        assert batch["image"][:, 30, 30].tolist() == [[i, i, i] for i in indices]


def test_float32_features_stay_float32():
    class Wide(Reader):
        def record(self, i):
            record = super().record(i)
            return record._replace(arrays={name: a.astype(np.float32) for name, a in record.arrays.items()})

    with Loader(Wide(), Data(batch=2), tokenize=None) as loader:
        batch = next(loader)
    assert batch["latent"].dtype == batch["states"].dtype == np.float32


def test_a_mask_that_is_cached_is_used():
    class Masked(Reader):
        def record(self, i):
            record = super().record(i)
            states = np.arange(1, 17, dtype=np.float16).reshape(8, 2)
            mask = np.array([1, 0, 1, 1, 0, 0, 0, 0], np.int16)
            return record._replace(arrays=record.arrays | {"states": states, "mask": mask})

    with Loader(Masked(), Data(batch=2), tokenize=None) as loader:
        batch = next(loader)
    assert batch["mask"].tolist() == [[True, False, True, True, False, False]] * 2
    assert batch["states"][0, :4, 0].tolist() == [1, 3, 5, 7] and not batch["states"][:, 4:].any()
    assert Captions().how == "uniform"
