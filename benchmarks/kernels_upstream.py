"""Linear attention as the published Triton kernels arrange it, for `benchmarks.kernels` to compare with.

One program for each head of each image sums the state over all tokens, which leaves most of a card idle
where there are few heads, and the second kernel writes the undivided result in float32 beside the divided
one, twice as many bytes again as the result.  Our own code; forward alone; needs Triton and jax-triton.
"""

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from benchmarks.kernels_cases import EPS
from pallas_kernels import dispatch

ROWS, WARPS = 64, 4


@triton.jit
def _state_kernel(qkv, N, state, total, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    head, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, C)
    keys = qkv + image.to(tl.int64) * N * K * 3 * C + head * 3 * C + C
    acc, z = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for first in range(0, N, ROWS):
        at = first + tl.arange(0, ROWS)
        place = keys + at[:, None] * (K * 3 * C) + c[None, :]
        mask = (at < N)[:, None]
        key = tl.load(place, mask=mask, other=0.0)
        key = tl.where(key > 0, key, tl.zeros_like(key))
        acc += tl.dot(tl.trans(key), tl.load(place + C, mask=mask, other=0.0))
        z += tl.sum(key.to(tl.float32), axis=0)
    which = image * K + head
    tl.store(state + which * C * C + c[:, None] * C + c[None, :], acc)
    tl.store(total + which * C + c, z)


@triton.jit
def _apply_kernel(
    qkv, state, total, N, out, undivided, EPS: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    head, tile, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, at = tl.arange(0, C), tile * ROWS + tl.arange(0, ROWS)
    mask, which = (at < N)[:, None], image * K + head
    first = image.to(tl.int64) * N * K
    q = tl.load(qkv + (first + at[:, None] * K + head) * 3 * C + c[None, :], mask=mask, other=0.0)
    q = tl.where(q > 0, q, tl.zeros_like(q)).to(tl.float32)
    S = tl.load(state + which * C * C + c[:, None] * C + c[None, :])
    y = tl.dot(q, S, input_precision="tf32")
    weight = tl.sum(q * tl.load(total + which * C + c)[None, :], axis=1) + EPS
    place = (first + at[:, None] * K + head) * C + c[None, :]
    tl.store(undivided + place, y, mask=mask)
    tl.store(out + place, (y / weight[:, None]).to(out.dtype.element_ty), mask=mask)


def forward(args, gradient):
    """A set whose arguments are qkv [b n k 3c] -> [b n k c]."""
    (qkv,) = args
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    f32 = jnp.float32
    how = dict(num_warps=WARPS, num_stages=2, compute_capability=dispatch.capability(), K=k, C=c, ROWS=ROWS)
    shapes = [jax.ShapeDtypeStruct((b, k, c, c), f32), jax.ShapeDtypeStruct((b, k, c), f32)]
    state, total = jax_triton.triton_call(qkv, n, kernel=_state_kernel, out_shape=shapes, grid=(k, b), **how)
    shapes = [jax.ShapeDtypeStruct((b, n, k, c), dtype) for dtype in (qkv.dtype, f32)]
    grid = k, triton.cdiv(n, ROWS), b
    return jax_triton.triton_call(
        qkv, state, total, n, kernel=_apply_kernel, out_shape=shapes, grid=grid, EPS=EPS, **how
    )[0]  # fmt: skip
