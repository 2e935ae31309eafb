"""The kernels of `pallas_triton.py` once more, in Triton's own language and called through jax-triton.

The same three passes and the same sums; a program takes a run of pixels in the order of memory,
`rows` * `columns` of them, instead of a rectangle, since Triton has no lists of arrays to hold several
rows.  The number of an image is int64, as a batch and its partial sums may have more elements than int32
can count; offsets in an image are int32.  Imported only where this implementation is asked for: Triton and
jax-triton are optional.
"""

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import dispatch

F32 = jnp.float32


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _slope(x):
    """The derivative of SiLU."""
    s = 1 / (1 + tl.exp(-x))
    return s * (1 + x * (1 - s))


@triton.jit
def _neighbour(image, pixel, dy, dx, channel, inside, H, W, WIDTH: tl.constexpr):
    """float32 [pixels channels]: the neighbours of the pixels, zero where there is none."""
    row, column = pixel // W + dy, pixel % W + dx
    exists = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (row * W + column)[:, None] * WIDTH + channel[None, :]
    return tl.load(image + at, mask=exists[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    image, kernel, bias, pixel, channel, inside, H, W, WIDTH: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """float32 [pixels channels]: convolution and bias."""
    real = channel < WIDTH
    out = tl.zeros(inside.shape, tl.float32) + tl.load(bias + channel, mask=real, other=0.0)[None, :]
    for dy in range(3):  # a loop: all nine loads at once would take too many registers
        for dx in tl.static_range(3):
            x = _neighbour(image, pixel, dy - 1, dx - 1, channel, inside, H, W, WIDTH)
            if FIRST:
                x = _silu(x)
            out += x * tl.load(kernel + (3 * dy + dx) * WIDTH + channel, mask=real, other=0.0)[None, :]
    return out


@triton.jit
def _both_kernel(
    y, kernel, bias, gradient, H, W, out, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    FIRST: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """The forward pass, or, with DOWN, the gradients of what the convolution gives."""
    i = tl.program_id(2).to(tl.int64) * H * W
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < H * W)[:, None] & (channel < C)[None, :]
    image = y + i * 2 * C
    value = _convolved(image, kernel, bias, pixel, channel, inside, H, W, 2 * C, FIRST)
    gate = _convolved(image, kernel, bias, pixel, C + channel, inside, H, W, 2 * C, FIRST)
    if DOWN:
        g = tl.load(gradient + i * C + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        at = out + i * 2 * C + pixel[:, None] * 2 * C + channel[None, :]
        tl.store(at, (g * _silu(gate)).to(out.dtype.element_ty), mask=inside)
        tl.store(at + C, (g * value * _slope(gate)).to(out.dtype.element_ty), mask=inside)
    else:
        at = out + i * C + pixel[:, None] * C + channel[None, :]
        tl.store(at, (value * _silu(gate)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    down, y, kernel, H, W, PARTS, dy, dkernel, dbias, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, TILES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i = image * H * W * WIDTH
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < WIDTH
    sums = image * PARTS + part
    # One tap after the other, so that few sums are held; y and its neighbours come from the cache.
    for tap in range(9):
        dk = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for tile in range(TILES):
            pixel = (part * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
            inside = (pixel < H * W)[:, None] & real[None, :]
            x = tl.load(y + i + pixel[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            if FIRST:
                x = _silu(x)
            dk += x * _neighbour(down + i, pixel, 1 - tap // 3, 1 - tap % 3, channel, inside, H, W, WIDTH)
        tl.store(dkernel + (sums * 9 + tap) * WIDTH + channel, tl.sum(dk, axis=0), mask=real)
    db = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tile in range(TILES):
        pixel = (part * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < H * W)[:, None] & real[None, :]
        db += _neighbour(down + i, pixel, 0, 0, channel, inside, H, W, WIDTH)
        dx = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for tap in range(9):
            d = _neighbour(down + i, pixel, 1 - tap // 3, 1 - tap % 3, channel, inside, H, W, WIDTH)
            dx += d * tl.load(kernel + tap * WIDTH + channel, mask=real, other=0.0)[None, :]
        at = i + pixel[:, None] * WIDTH + channel[None, :]
        if FIRST:
            dx *= _slope(tl.load(y + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(dy + at, dx.to(dy.dtype.element_ty), mask=inside)
    tl.store(dbias + sums * WIDTH + channel, tl.sum(db, axis=0), mask=real)


def _call(kernel, tile, *operands, **options):
    return jax_triton.triton_call(
        *operands,
        kernel=kernel,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        compute_capability=dispatch.capability(),
        CHANNELS=tile["channels"],
        **options,
    )


def _both(tile, y, kernel, bias, gradient, shape, first_silu, down):
    b, h, w, c = *y.shape[:3], y.shape[3] // 2
    pixels = tile["rows"] * tile["columns"]
    return _call(
        _both_kernel, tile, y, kernel, bias, gradient, h, w, out_shape=jax.ShapeDtypeStruct(shape, y.dtype),
        grid=(triton.cdiv(c, tile["channels"]), triton.cdiv(h * w, pixels), b), C=c, PIXELS=pixels,
        FIRST=first_silu, DOWN=down,
    )  # fmt: skip


def forward(y, kernel, bias, first_silu, tiles):
    """As `pallas_triton.forward`."""

    @jax.custom_batching.sequential_vmap
    def run(y, kernel, bias):
        shape = (*y.shape[:3], y.shape[3] // 2)
        return _both(tiles["forward"], y, kernel, bias, y, shape, first_silu, False)

    return run(y, kernel, bias)


def backward(y, kernel, bias, gradient, first_silu, tiles):
    """As `pallas_triton.backward`."""

    @jax.custom_batching.sequential_vmap
    def run(y, kernel, bias, gradient):
        b, h, w, width = y.shape
        down = _both(tiles["down"], y, kernel, bias, gradient, y.shape, first_silu, True)
        tile = tiles["backward"]
        parts = triton.cdiv(h * w, tile["columns"] * tile["rows"])
        shapes = [y.shape, (b, parts, 9, width), (b, parts, width)]
        dy, dkernel, dbias = _call(
            _backward_kernel, tile, down, y, kernel, h, w, parts,
            out_shape=[jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (y.dtype, F32, F32))],
            grid=(triton.cdiv(width, tile["channels"]), parts, b), WIDTH=width, PIXELS=tile["columns"],
            TILES=tile["rows"], FIRST=first_silu,
        )  # fmt: skip
        return dy, dkernel.sum(axis=(0, 1)).reshape(kernel.shape), dbias.sum(axis=(0, 1))

    return run(y, kernel, bias, gradient)
