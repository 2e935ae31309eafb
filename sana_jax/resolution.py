"""Which sizes a model paints, and how a requested size is reached from one of them (docs/numerics.md 7)."""

import numbers

import jax
import jax.numpy as jnp

from sana_jax.errors import InputError

PATCH = 32  # pixels per latent; every painted side is a multiple of it
LARGEST = 8192  # pixels; a side above it is a typing error, not a wish

# height / width: (height, width), as published; 1024 and 4096 px are twice these.
BINS_512 = {
    0.25: (256, 1024), 0.28: (256, 928), 0.32: (288, 896), 0.33: (288, 864), 0.35: (288, 832),
    0.4: (320, 800), 0.42: (320, 768), 0.48: (352, 736), 0.5: (352, 704), 0.52: (352, 672),
    0.57: (384, 672), 0.6: (384, 640), 0.68: (416, 608), 0.72: (416, 576), 0.78: (448, 576),
    0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512), 1.0: (512, 512), 1.07: (512, 480),
    1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448), 1.38: (576, 416), 1.46: (608, 416),
    1.67: (640, 384), 1.75: (672, 384), 2.0: (704, 352), 2.09: (736, 352), 2.4: (768, 320),
    2.5: (800, 320), 3.0: (864, 288), 4.0: (1024, 256),
}  # fmt: skip
BINS_2048 = {
    0.25: (1024, 4096), 0.26: (1024, 3968), 0.27: (1024, 3840), 0.28: (1024, 3712),
    0.32: (1152, 3584), 0.33: (1152, 3456), 0.35: (1152, 3328), 0.4: (1280, 3200),
    0.42: (1280, 3072), 0.48: (1408, 2944), 0.5: (1408, 2816), 0.52: (1408, 2688),
    0.57: (1536, 2688), 0.6: (1536, 2560), 0.68: (1664, 2432), 0.72: (1664, 2304),
    0.78: (1792, 2304), 0.82: (1792, 2176), 0.88: (1920, 2176), 0.94: (1920, 2048),
    1.0: (2048, 2048), 1.07: (2048, 1920), 1.13: (2176, 1920), 1.21: (2176, 1792),
    1.29: (2304, 1792), 1.38: (2304, 1664), 1.46: (2432, 1664), 1.67: (2560, 1536),
    1.75: (2688, 1536), 2.0: (2816, 1408), 2.09: (2944, 1408), 2.4: (3072, 1280),
    2.5: (3200, 1280), 2.89: (3328, 1152), 3.0: (3456, 1152), 3.11: (3584, 1152),
    3.62: (3712, 1024), 3.75: (3840, 1024), 3.88: (3968, 1024), 4.0: (4096, 1024),
}  # fmt: skip


def bins(sample_size):
    """{ratio: (height, width)} for a model's latent side, or None where nothing is published."""
    base, factor = {16: (BINS_512, 1), 32: (BINS_512, 2), 64: (BINS_2048, 1), 128: (BINS_2048, 2)}.get(
        sample_size, (None, 1)
    )
    return base and {ratio: (h * factor, w * factor) for ratio, (h, w) in base.items()}


def check_size(height, width):
    """Raises InputError unless both are whole numbers of pixels in [1, 8192]."""
    for field, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"{field}={value!r}: must be an int, in pixels")
        if not 1 <= value <= LARGEST:
            near = min(max(value, PATCH), LARGEST)
            raise InputError(f"{field}={value}: must be in [1, {LARGEST}]; nearest valid {near}")


def painted_size(height, width, sample_size, bin_resolution=True):
    """(height, width) that the model paints for a requested size, both multiples of 32.

    With `bin_resolution`, the published size of the nearest aspect ratio, where there is a table for
    `sample_size`; elsewhere the size itself, rounded up to multiples of 32.
    Raises InputError: out of range; or not a multiple of 32 with `bin_resolution=False`.
    """
    check_size(height, width)
    table = bins(sample_size)
    if bin_resolution and table:
        return table[min(table, key=lambda ratio: abs(ratio - height / width))]
    if not bin_resolution:
        for field, value in (("height", height), ("width", width)):
            if value % PATCH:
                near = max(PATCH, round(value / PATCH) * PATCH)
                raise InputError(
                    f"{field}={value}: must be a multiple of {PATCH} without bin_resolution; nearest valid {near}"
                )
    return tuple(-(-int(side) // PATCH) * PATCH for side in (height, width))


def resize_and_crop(images, height, width):
    """[b H W c] -> [b height width c]: bilinear to cover, then the centre.

    Half-pixel centres and no antialiasing, as torch's interpolate(align_corners=False).  Where the
    published arithmetic truncates to one pixel less than asked for, the size asked for is kept.
    """
    _, h, w, _ = images.shape
    if (h, w) == (height, width):
        return images
    ratio = max(height / h, width / w)
    tall, wide = max(int(h * ratio), height), max(int(w * ratio), width)
    shape = (images.shape[0], tall, wide, images.shape[-1])
    images = jax.image.resize(images, shape, "bilinear", antialias=False)
    top, left = (tall - height) // 2, (wide - width) // 2
    return images[:, top : top + height, left : left + width]


def to_unit(images):
    """[-1, 1] -> [0, 1], clipped, float32."""
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
