"""The kernels once more, in Triton's own language and called through jax-triton.

As those of `adaln`, whose helpers they are made of.  Imported only where this implementation is asked
for: Triton and jax-triton are optional.
"""

import triton
import triton.language as tl

from pallas_kernels.adaln.jax_triton import call, load32, mean, store, store_sum, tile_at, vector_of


@triton.jit
def _forward_kernel(
    x, y, scale, bias, N, out, EPS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    a, b = vector_of(scale, 0, D, P, False), vector_of(bias, 0, D, P, False)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        z, residual = load32(y + image, at, mask), load32(x + image, at, mask)
        norm = z * tl.rsqrt(mean(z * z, D) + EPS) * a + b
        norm = norm.to(out.dtype.element_ty).to(tl.float32)
        store(out + image, at, residual + norm, mask)


@triton.jit
def _backward_kernel(
    y, gradient, scale, N, dy, dscale, dbias, EPS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    run, i = tl.program_id(0), tl.program_id(1)
    image = i.to(tl.int64) * N * D
    factor = vector_of(scale, 0, D, P, False)
    da, db = tl.zeros((ROWS, P), tl.float32), tl.zeros((ROWS, P), tl.float32)
    for t in range(TILES):
        at, mask = tile_at(run * TILES + t, N, D, P, ROWS)
        z, g = load32(y + image, at, mask), load32(gradient + image, at, mask)
        rstd = tl.rsqrt(mean(z * z, D) + EPS)
        z *= rstd
        da += g * z
        db += g
        g *= factor
        store(dy + image, at, rstd * (g - z * mean(g * z, D)), mask)
    store_sum(dscale, da, D, P)
    store_sum(dbias, db, D, P)


def forward(x, y, scale, bias, eps, tiles):
    """As `xla.forward`."""
    return call(_forward_kernel, [x, y], [scale[None], bias[None]], 0, tiles["forward"], EPS=eps)[0]


def backward(y, scale, gradient, eps, tiles):
    """As `xla.backward`."""
    dy, dscale, dbias = call(_backward_kernel, [y, gradient], [scale[None]], 2, tiles["backward"], EPS=eps)
    return dy, dscale[0], dbias[0]
