"""Buckets are the published sizes, chosen as the sampler chooses them."""

import numpy as np
import pytest

from sana_jax.data import buckets
from sana_jax.errors import InputError
from sana_jax.resolution import painted_size


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_nearest_as_in_sampling(size):
    rng = np.random.default_rng(size)
    sizes = np.concatenate([rng.integers(1, 8192, (400, 2)), [[1000, 1000], [4000, 1000], [1000, 4000], [1, 8192]]])
    shapes = buckets.shapes(size, True)
    chosen = [shapes[place] for place in buckets.assign(sizes, size)]
    assert chosen == [painted_size(int(h), int(w), size // 32) for w, h in sizes]
    assert len(set(chosen)) > 20


def test_halfway_goes_to_the_lower_ratio():
    # 0.25 and 0.28 are as near to 0.265 = 53 / 200 as floats allow
    assert buckets.shapes(512, True)[buckets.assign([[200, 53]], 512)[0]] == painted_size(53, 200, 16)


def test_unreadable_ones_are_squares():
    shapes = buckets.shapes(512, True)
    for size in ((0, 0), (0, 100), (100, 0)):
        assert shapes[buckets.assign(np.array([size], np.int32), 512)[0]] == (512, 512)


def test_one_square_of_any_size():
    assert buckets.shapes(64, False) == ((64, 64),)
    assert buckets.shapes(513, False) == ((513, 513),)


def test_sizes_of_ones_own():
    own = ((64, 64), (96, 64), (128, 128), (64, 96))
    assert buckets.shapes(64, own) == own
    sizes = [(70, 60), (64, 97), (300, 310), (97, 64), (0, 0), (110, 110), (70, 72)]  # width, height
    assert buckets.assign(np.array(sizes, np.int32), 64, own).tolist() == [0, 1, 2, 3, 0, 2, 0]
    assert buckets.assign([(0, 7)], 128, own).tolist() == [2], "unreadable: as data.size"
    assert buckets.assign([(w, h) for h, w in own], 64, own).tolist() == [0, 1, 2, 3]
    for wrong in ((), ((64, 64), (64, 64)), [(64, 64), (96, 64)]):
        with pytest.raises(InputError, match="must be false, true, or different sizes"):
            buckets.shapes(64, wrong)


@pytest.mark.parametrize("size", [64, 640, 513, 8192])
def test_no_aspect_ratios_elsewhere(size):
    with pytest.raises(InputError, match=f"data.size={size}: aspect ratios are published for 512"):
        buckets.shapes(size, True)


def test_members_partition_the_records():
    places = np.array([2, 0, 2, 2, 0, 4])
    found = buckets.members(places, 5)
    assert [part.tolist() for part in found] == [[1, 4], [], [0, 2, 3], [], [5]]
    assert all(part.dtype == np.int32 for part in found)
    assert [len(part) for part in buckets.members(np.zeros(0, np.int64), 3)] == [0, 0, 0]
