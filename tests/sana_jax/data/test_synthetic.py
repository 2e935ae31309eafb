"""Synthetic pictures: the same everywhere, and their captions are true."""

import pickle
import re
import timeit

import numpy as np
import pytest

from sana_jax.data import images
from sana_jax.data.synthetic import COLOURS, SHAPES, SIZES, Synthetic
from sana_jax.errors import InputError


def pixels(reader, i):
    width, height = reader.sizes[i]
    return images.decode(reader[i].image, height, width)


def test_captions_are_true():
    reader = Synthetic(200, 48, aspects=(1.0, 0.5, 2.0)).open()
    shares = {shape: [] for shape in SHAPES}
    for i in range(len(reader)):
        image, caption = pixels(reader, i), reader[i].captions["prompt"]
        size, colour, shape, ground = re.fullmatch(r"a (\w+) (\w+) (\w+) on (\w+)", caption).groups()
        assert (image[0, 0] == COLOURS[ground]).all() or shape == "square"
        found = {tuple(c) for c in np.unique(image.reshape(-1, 3), axis=0).tolist()}
        assert found == {COLOURS[colour], COLOURS[ground]}
        covered = (image == COLOURS[colour]).all(-1).sum() / (2 * SIZES[size] * min(image.shape[:2])) ** 2
        shares[shape].append(covered)
    for shape, expected in {
        "square": 1,
        "circle": np.pi / 4,
        "triangle": 1 / 2,
        "ring": np.pi / 4 * (1 - 0.6**2),
    }.items():
        assert len(shares[shape]) > 20 and abs(np.mean(shares[shape]) - expected) < 0.12


def test_records_are_the_same_everywhere():
    reader, other = Synthetic(9, 64).open(), pickle.loads(pickle.dumps(Synthetic(9, 64))).open()
    assert [reader[i] for i in range(9)] == [other[i] for i in range(9)]
    assert reader.fingerprint() == other.fingerprint() != Synthetic(9, 64, seed=1).open().fingerprint()
    assert reader[0] != Synthetic(9, 64, seed=1).open()[0]


@pytest.mark.parametrize("size, aspects", [(8, (1.0,)), (512, (0.25, 4.0)), (33, (1.0, 0.7))])
def test_sizes(size, aspects):
    reader = Synthetic(4, size, aspects).open()
    assert len(reader) == 4 and reader.sizes.shape == (4, 2) and reader.sizes.dtype == np.int32
    for i, (width, height) in enumerate(reader.sizes):
        assert images.header(reader[i].image).shown == (width, height)
        assert abs(height / width / aspects[i % len(aspects)] - 1) < 0.1


def test_it_is_fast():
    reader = Synthetic(1, 512).open()
    assert min(timeit.repeat(lambda: reader[0], number=1, repeat=5)) < 0.05


@pytest.mark.parametrize("fields", [dict(records=0), dict(size=-1), dict(size=1.5), dict(aspects=(0.0,))])
def test_bad_fields(fields):
    with pytest.raises(InputError, match="data.source"):
        Synthetic(**fields).open()
