"""The kernels, written in Pallas for its Triton backend.

    forward   y -> out
    down      y, g -> the gradients of what the convolution gives, [b h w 2 c]
    backward  these, y -> dy, and for each program a part of the sums dkernel and dbias; XLA adds them

A program handles `rows` x `columns` pixels of `channels` channels: in the first two of value and
gate, in the last of either.  Each row of input is loaded once for each of the three columns of taps
and used for all rows of output that see it.  No program writes what another does, and no sum is atomic.
Every access carries a mask: it is the zero padding too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

F32 = jnp.float32


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def slope(x):
    """The derivative of SiLU."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


class Tile:
    """Where a program works: rows from `row`, `columns` columns, `channels` channels of c."""

    def __init__(self, array, tile, c):
        self.h, self.w, self.c = *array.shape[:2], c
        across = pl.cdiv(self.w, tile["columns"])
        block = pl.program_id(1)
        self.row = block // across * tile["rows"]
        self.columns = block % across * tile["columns"] + jnp.arange(tile["columns"])
        self.channels = pl.program_id(0) * tile["channels"] + jnp.arange(tile["channels"])
        self.shape = tile["columns"], tile["channels"]

    def mask(self, row, shift=0):
        """Whether the pixel at (row, column + shift) exists, [columns channels]."""
        column = self.columns + shift
        inside = ((column >= 0) & (column < self.w))[:, None] & (self.channels < self.c)[None]
        return (row >= 0) & (row < self.h) & inside

    def load(self, ref, row, shift=0, half=None):
        """float32 [columns channels] of a whole image [h w (2) c], zero where there is none."""
        # Indices are arrays all of them, which is what the interpreter takes, and stay as they are
        # where masked: a clamped one would meet another's element.
        index = [row, self.columns[:, None] + shift, self.channels[None]]
        index[2:2] = [] if half is None else [half]
        index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), self.shape) for i in index)
        return plt.load(ref.at[index], mask=self.mask(row, shift), other=0.0).astype(F32)

    def load_channels(self, ref, *index):
        at = tuple(jnp.full(self.shape[1:], i, jnp.int32) for i in index)
        return plt.load(ref.at[*at, self.channels], mask=self.channels < self.c, other=0.0)[None]

    def store(self, ref, row, value, *half):
        """Into the program's own block [rows columns (2) channels]; `row` counts from its first."""
        index = [row, jnp.arange(self.shape[0])[:, None], *half, jnp.arange(self.shape[1])[None]]
        index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), self.shape) for i in index)
        plt.store(ref.at[index], value.astype(ref.dtype), mask=self.mask(self.row + row))


def _convolved(tile, y_ref, kernel_ref, bias_ref, half, rows, first_silu):
    """[rows] of [columns channels]: convolution and bias of one half."""
    taps = [tile.load_channels(kernel_ref, tap, half) for tap in range(9)]
    sums = [jnp.broadcast_to(tile.load_channels(bias_ref, half), tile.shape)] * rows
    for r in range(-1, rows + 1):
        for dx in range(3):
            x = tile.load(y_ref, tile.row + r, dx - 1, half)
            x = x * sigmoid(x) if first_silu else x  # of the zeros outside: zero
            for dy in range(3):
                if 0 <= r + 1 - dy < rows:
                    sums[r + 1 - dy] = sums[r + 1 - dy] + x * taps[3 * dy + dx]
    return sums


def _forward_kernel(y_ref, kernel_ref, bias_ref, out_ref, *, sizes, first_silu):
    tile, rows = Tile(y_ref, sizes, y_ref.shape[-1]), sizes["rows"]
    value, gate = (_convolved(tile, y_ref, kernel_ref, bias_ref, i, rows, first_silu) for i in range(2))
    for r in range(rows):
        tile.store(out_ref, r, value[r] * (gate[r] * sigmoid(gate[r])))


def _down_kernel(y_ref, kernel_ref, bias_ref, g_ref, down_ref, *, sizes, first_silu):
    tile, rows = Tile(y_ref, sizes, y_ref.shape[-1]), sizes["rows"]
    value, gate = (_convolved(tile, y_ref, kernel_ref, bias_ref, i, rows, first_silu) for i in range(2))
    for r in range(rows):
        g = tile.load(g_ref, tile.row + r)
        tile.store(down_ref, r, g * (gate[r] * sigmoid(gate[r])), 0)
        tile.store(down_ref, r, g * value[r] * slope(gate[r]), 1)


def _backward_kernel(down_ref, y_ref, kernel_ref, dy_ref, dkernel_ref, dbias_ref, *, sizes, first_silu):
    tile = Tile(y_ref, sizes, y_ref.shape[-1])
    taps = [tile.load_channels(kernel_ref, tap) for tap in range(9)]

    def body(r, sums):
        row = tile.row + r
        y = tile.load(y_ref, row)
        x = y * sigmoid(y) if first_silu else y
        dx, sums = jnp.zeros(tile.shape, F32), list(sums)
        for tap in range(9):  # what this pixel was to its neighbours
            down = tile.load(down_ref, row + 1 - tap // 3, 1 - tap % 3)
            dx = dx + down * taps[tap]
            sums[tap] = sums[tap] + down * x
            if tap == 4:
                sums[9] = sums[9] + down
        tile.store(dy_ref, r, dx * slope(y) if first_silu else dx)
        return tuple(sums)

    zeros = (jnp.zeros(tile.shape, F32),) * 10
    sums = jax.lax.fori_loop(0, sizes["rows"], body, zeros)
    at, exists = jnp.arange(tile.shape[1]), tile.channels < tile.c
    for tap in range(9):
        index = jnp.full(tile.shape[1:], tap, jnp.int32), at
        plt.store(dkernel_ref.at[index], jnp.sum(sums[tap], axis=0), mask=exists)
    plt.store(dbias_ref.at[at], jnp.sum(sums[9], axis=0), mask=exists)


# --- Blocks.  The grid is (channels, pixels, image): neighbours in memory are loaded together.


def blocks_of(h, w, tile):
    """How many blocks of pixels an image has."""
    return pl.cdiv(h, tile["rows"]) * pl.cdiv(w, tile["columns"])


def _image(*shape):
    """A whole image, of which a program takes what it wants."""
    return pl.BlockSpec((None, *shape), lambda c, t, i: (i,) + (0,) * len(shape))


def _whole(*shape):
    return pl.BlockSpec(shape, lambda c, t, i: (0,) * len(shape))


def _pixels(w, tile, *halves):
    """The program's own block of [b h w (2) c]."""
    across = pl.cdiv(w, tile["columns"])
    shape = (None, tile["rows"], tile["columns"], *halves, tile["channels"])
    return pl.BlockSpec(shape, lambda c, t, i: (i, t // across, t % across, *(0 for _ in halves), c))


def _call(kernel, tile, interpret, first_silu, **options):
    return pl.pallas_call(
        functools.partial(kernel, sizes=tile, first_silu=first_silu),
        compiler_params=plt.CompilerParams(num_warps=tile["warps"], num_stages=tile["stages"]),
        interpret=interpret,
        **options,
    )


def forward(y, kernel, bias, first_silu, tiles, interpret=False):
    """y [b h w 2c], kernel [3 3 2c] and bias [2c] float32 -> [b h w c]."""
    b, h, w, c = *y.shape[:3], y.shape[3] // 2
    tile = tiles["forward"]
    return _call(
        _forward_kernel,
        tile,
        interpret,
        first_silu,
        out_shape=jax.ShapeDtypeStruct((b, h, w, c), y.dtype),
        grid=(pl.cdiv(c, tile["channels"]), blocks_of(h, w, tile), b),
        in_specs=[_image(h, w, 2, c), _whole(9, 2, c), _whole(2, c)],
        out_specs=_pixels(w, tile),
        name="mix_ffn_forward",
    )(y.reshape(b, h, w, 2, c), kernel.reshape(9, 2, c), bias.reshape(2, c))


def backward(y, kernel, bias, gradient, first_silu, tiles, interpret=False):
    """-> dy [b h w 2c], dkernel [3 3 2c], dbias [2c]."""
    b, h, w, c = *y.shape[:3], y.shape[3] // 2
    tile = tiles["down"]
    down = _call(
        _down_kernel,
        tile,
        interpret,
        first_silu,
        out_shape=jax.ShapeDtypeStruct((b, h, w, 2, c), y.dtype),
        grid=(pl.cdiv(c, tile["channels"]), blocks_of(h, w, tile), b),
        in_specs=[_image(h, w, 2, c), _whole(9, 2, c), _whole(2, c), _image(h, w, c)],
        out_specs=_pixels(w, tile, 2),
        name="mix_ffn_down",
    )(y.reshape(b, h, w, 2, c), kernel.reshape(9, 2, c), bias.reshape(2, c), gradient)

    tile, c = tiles["backward"], 2 * c
    parts = blocks_of(h, w, tile)
    dy, dkernel, dbias = _call(
        _backward_kernel,
        tile,
        interpret,
        first_silu,
        out_shape=[
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            jax.ShapeDtypeStruct((b, parts, 9, c), F32),
            jax.ShapeDtypeStruct((b, parts, c), F32),
        ],
        grid=(pl.cdiv(c, tile["channels"]), parts, b),
        in_specs=[_image(h, w, c), _image(h, w, c), _whole(9, c)],
        out_specs=[
            _pixels(w, tile),
            pl.BlockSpec((None, None, 9, tile["channels"]), lambda c, t, i: (i, t, 0, c)),
            pl.BlockSpec((None, None, tile["channels"]), lambda c, t, i: (i, t, c)),
        ],
        name="mix_ffn_backward",
    )(down.reshape(y.shape), y, kernel.reshape(9, c))
    return dy, dkernel.sum(axis=(0, 1)).reshape(kernel.shape), dbias.sum(axis=(0, 1))
