"""The kernels once more, in Triton's own language and called through jax-triton.

The same runs of tiles, sums and rounding as `pallas_kernels.rows`, where the formulas are those of
`xla.py`; `rms_residual` builds on the helpers.  Imported only where this implementation is asked for:
Triton and jax-triton are optional.
"""

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import dispatch, rows

F32 = jnp.float32


@triton.jit
def tile_at(t, N, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """Where the elements of the t-th tile of an image lie, and which of them exist, [ROWS P]."""
    at, c = t * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
    return at[:, None] * D + c[None, :], (at < N)[:, None] & (c < D)[None, :]


@triton.jit
def load32(array, at, mask):
    return tl.load(array + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(array, at, value, mask):
    tl.store(array + at, value.to(array.dtype.element_ty), mask=mask)


@triton.jit
def vector_of(vector, i, D: tl.constexpr, P: tl.constexpr, OWN: tl.constexpr):
    """[1 P]: the row of image i, or, unless each has its OWN, the only one."""
    c = tl.arange(0, P)
    return tl.load(vector + (i * D if OWN else 0) + c, mask=c < D, other=0.0)[None, :]


@triton.jit
def store_sum(sums, value, D: tl.constexpr, P: tl.constexpr):
    """What this program adds to the sum over tokens."""
    c, at = tl.arange(0, P), (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(sums + at + c, tl.sum(value, axis=0), mask=c < D)


@triton.jit
def mean(x, D: tl.constexpr):
    """Over the channels of an x that is zero past the last."""
    return tl.sum(x, axis=1)[:, None] / D


@triton.jit
def _normalised(x, EPS: tl.constexpr, D: tl.constexpr):
    x = tl.where((tl.arange(0, x.shape[1]) < D)[None, :], x - mean(x, D), 0.0)
    rstd = tl.rsqrt(mean(x * x, D) + EPS)
    return x * rstd, rstd


@triton.jit
def _modulate_forward(
    x, shift, scale, N, out, EPS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    b, a = vector_of(shift, i, D, P, OWN), 1 + vector_of(scale, i, D, P, OWN)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        y, _ = _normalised(load32(x + image, at, mask), EPS, D)
        store(out + image, at, y * a + b, mask)


@triton.jit
def _modulate_backward(
    x, gradient, scale, N, dx, dshift, dscale, EPS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    factor = 1 + vector_of(scale, i, D, P, OWN)
    db, da = tl.zeros((ROWS, P), tl.float32), tl.zeros((ROWS, P), tl.float32)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        y, g = load32(x + image, at, mask), load32(gradient + image, at, mask)
        y, rstd = _normalised(y, EPS, D)
        a = g * factor
        store(dx + image, at, rstd * (a - mean(a, D) - y * mean(a * y, D)), mask)
        db += g
        da += g * y
    store_sum(dshift, db, D, P)
    store_sum(dscale, da, D, P)


@triton.jit
def _add_gated_forward(
    x, y, gate, N, out, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    factor = vector_of(gate, i, D, P, OWN)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        store(out + image, at, load32(x + image, at, mask) + factor * load32(y + image, at, mask), mask)


@triton.jit
def _add_gated_backward(
    y, gradient, gate, N, dy, dgate, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    factor, total = vector_of(gate, i, D, P, OWN), tl.zeros((ROWS, P), tl.float32)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        g, z = load32(gradient + image, at, mask), load32(y + image, at, mask)
        store(dy + image, at, factor * g, mask)
        total += g * z
    store_sum(dgate, total, D, P)


def call(kernel, arrays, vectors, sums, tile, **constants):
    """A kernel as `rows.kernel` would call it; -> (out, *sums)."""

    @jax.custom_batching.sequential_vmap
    def run(arrays, vectors):
        b, n, d = arrays[0].shape
        padded, height, each, runs = rows.blocks(b, n, d, tile)
        shapes = [((b, n, d), arrays[0].dtype)] + [((b, runs, d), F32)] * sums
        out, *parts = jax_triton.triton_call(
            *arrays, *vectors, n, kernel=kernel, out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
            grid=(runs, b), num_warps=tile["warps"], num_stages=tile["stages"],
            compute_capability=dispatch.capability(), D=d, P=padded, ROWS=height, TILES=each,
            OWN=vectors[0].shape[0] == b, **constants,
        )  # fmt: skip
        return out, *(rows.total(part, vectors[0]) for part in parts)

    return run(arrays, vectors)


def modulate_forward(x, shift, scale, eps, tiles):
    """As `xla.modulate_forward`."""
    return call(_modulate_forward, [x], [shift, scale], 0, tiles["forward"], EPS=eps)[0]


def modulate_backward(x, scale, gradient, eps, tiles):
    """As `xla.modulate_backward`."""
    return call(_modulate_backward, [x, gradient], [scale], 2, tiles["backward"], EPS=eps)


def add_gated_forward(x, gate, y, tiles):
    """As `xla.add_gated_forward`."""
    return call(_add_gated_forward, [x, y], [gate], 0, tiles["forward"])[0]


def add_gated_backward(gate, y, gradient, tiles):
    """As `xla.add_gated_backward`."""
    dy, dgate = call(_add_gated_backward, [y, gradient], [gate], 1, tiles["backward"])
    return dgate, dy
