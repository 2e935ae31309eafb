"""Sizes: the published tables, which entry a request takes, how the picture becomes the request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import InputError
from sana_jax.resolution import bins, check_size, painted_size, resize_and_crop, to_unit

TABLED = (16, 32, 64, 128)


def published(sample_size):
    """What diffusers' SanaPipeline looks up for a model of this latent side."""
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana import pipeline_sana

    tables = {
        16: pipeline_sana.ASPECT_RATIO_512_BIN,
        32: ASPECT_RATIO_1024_BIN,
        64: ASPECT_RATIO_2048_BIN,
        128: pipeline_sana.ASPECT_RATIO_4096_BIN,
    }
    return tables[sample_size]


@pytest.mark.parity
@pytest.mark.parametrize("sample_size", TABLED)
def test_tables(sample_size):
    theirs = {float(ratio): tuple(map(int, size)) for ratio, size in published(sample_size).items()}
    assert list(bins(sample_size).items()) == list(theirs.items()), "order too: the first of a tie is taken"


@pytest.mark.parity
@pytest.mark.parametrize("sample_size", TABLED)
def test_painted_size(sample_size):
    from diffusers.image_processor import PixArtImageProcessor

    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 8193, (200, 2)).tolist() + list(bins(sample_size).values())
    sizes += [[1, 1], [1, 8192], [8192, 1], [1024, 1025]]
    chosen = set()
    for height, width in sizes:
        theirs = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=published(sample_size))
        chosen.add(painted_size(height, width, sample_size))
        assert painted_size(height, width, sample_size) == theirs, (height, width)
    assert len(chosen) >= 25, "these sizes hardly tell"


def test_tables_hold_multiples_of_32():
    for sample_size in TABLED:
        for height, width in bins(sample_size).values():
            assert height % 32 == width % 32 == 0
            assert painted_size(height, width, sample_size, bin_resolution=False) == (height, width)
        assert bins(sample_size)[1.0] == (32 * sample_size, 32 * sample_size)


@pytest.mark.parametrize("sample_size", [1, 8, 24, 256])
def test_sample_sizes_without_a_table_round_up(sample_size):
    assert bins(sample_size) is None
    assert painted_size(64, 96, sample_size) == (64, 96)
    assert painted_size(65, 1, sample_size) == (96, 32)


@pytest.mark.parametrize(
    "height, width, message",
    [
        (0, 64, "height=0: must be in [1, 8192]; nearest valid 32"),
        (64, -5, "width=-5: must be in [1, 8192]; nearest valid 32"),
        (100_000, 64, "height=100000: must be in [1, 8192]; nearest valid 8192"),
        (64, 8193, "width=8193: must be in [1, 8192]; nearest valid 8192"),
        (64.0, 64, "height=64.0: must be an int, in pixels"),
        (64, "64", "width='64': must be an int, in pixels"),
        (True, 64, "height=True: must be an int, in pixels"),
        (64, None, "width=None: must be an int, in pixels"),
    ],
)
def test_sizes_out_of_range(height, width, message):
    for call in (check_size, lambda h, w: painted_size(h, w, 32), lambda h, w: painted_size(h, w, 5, False)):
        with pytest.raises(InputError) as caught:
            call(height, width)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "height, width, message",
    [(100, 64, "height=100: .*; nearest valid 96"), (64, 1000, "width=1000: .*; nearest valid 992"),
     (1, 64, "height=1: .*; nearest valid 32"), (64, 8191, "width=8191: .*; nearest valid 8192")],
)  # fmt: skip
def test_without_bins_sizes_are_multiples_of_32(height, width, message):
    with pytest.raises(InputError, match=message):
        painted_size(height, width, 32, bin_resolution=False)


RESIZES = {
    "same": ((64, 96), (64, 96)),
    "down, other ratio": ((64, 96), (40, 40)),
    "down to one side": ((96, 64), (96, 48)),
    "up": ((32, 64), (77, 130)),
    "up to one side": ((64, 64), (64, 91)),
    "far down": ((96, 96), (7, 5)),
    "far up": ((32, 32), (200, 33)),
    "odd rest of the crop": ((64, 96), (64, 91)),
}


@pytest.mark.parity
@pytest.mark.parametrize("case", RESIZES)
def test_resize_and_crop(case):
    import torch
    from diffusers.image_processor import PixArtImageProcessor

    (h, w), (height, width) = RESIZES[case]
    images = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype("f")
    theirs = PixArtImageProcessor.resize_and_crop_tensor(torch.tensor(images).permute(0, 3, 1, 2), width, height)
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    ours = np.asarray(resize_and_crop(jnp.asarray(images), height, width))
    assert ours.shape == theirs.shape == (2, height, width, 3)
    assert np.abs(ours - theirs).max() <= 1e-5


def test_every_request_is_delivered_whole():
    sizes = np.random.default_rng(1).integers(1, 8193, (6, 2)).tolist()
    for height, width in sizes + [[1, 8192], [8192, 1], [1, 1], [8192, 8192]]:
        images = jax.ShapeDtypeStruct((1, *painted_size(height, width, 16), 3), jnp.float32)
        out = jax.eval_shape(lambda x: resize_and_crop(x, height, width), images)
        assert out.shape == (1, height, width, 3)


@pytest.mark.parity
def test_the_published_arithmetic_can_lose_the_picture():
    """int(352 * (15 / 352)) is 14 in floating point, and a crop of 15 from 14 begins at -1."""
    import torch
    from diffusers.image_processor import PixArtImageProcessor

    size, side = 352, 15
    theirs = PixArtImageProcessor.resize_and_crop_tensor(torch.ones(1, 3, size, size), side, side)
    assert theirs.shape[2:] == (1, 1), "mended: drop our deviation"
    assert resize_and_crop(jnp.ones((1, size, size, 3)), side, side).shape == (1, side, side, 3)


def test_to_unit():
    images = jnp.float32([-2, -1, -0.5, 0, 1, 3])
    np.testing.assert_array_equal(to_unit(images), [0, 0, 0.25, 0.5, 1, 1])
    assert to_unit(images.astype(jnp.bfloat16)).dtype == jnp.float32

