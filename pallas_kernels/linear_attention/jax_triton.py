"""The kernels of `pallas_triton.py` once more, in Triton's own language and called through jax-triton.

The same tiles, blocks, sums and rounding; what each line is for is said there.  The number of an image is
int64, as a batch and its partial sums may have more elements than int32 can count; offsets in an image
are int32.  Imported only where this implementation is asked for: Triton and jax-triton are optional.
"""

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import dispatch
from pallas_kernels.linear_attention.pallas_triton import runs

F32 = jnp.float32


@triton.jit
def _dot(a, b, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, dtype: tl.constexpr):
    """a @ b with float32 sums.  A split factor is float32 and becomes two of `dtype`."""
    x, y = a.to(dtype), b.to(dtype)
    out = tl.dot(x, y, input_precision="ieee")
    if SPLIT_A:
        out = tl.dot((a - x.to(tl.float32)).to(dtype), y, out, input_precision="ieee")
    if SPLIT_B:
        out = tl.dot(x, (b - y.to(tl.float32)).to(dtype), out, input_precision="ieee")
    return out


@triton.jit
def _before_relu(raw, rstd, scale, at, exists, NORMED: tl.constexpr):
    """What ReLU sees of a query or key, and the factors that made it."""
    if NORMED:
        r = tl.load(rstd + at, mask=exists, other=0.0)
        return raw.to(tl.float32) * r[:, None] * scale[None, :]
    else:
        return raw


@triton.jit
def _relu(x):
    return tl.where(x <= 0, tl.zeros_like(x), x)


@triton.jit
def _at(ptr, at, exists, STRIDE: tl.constexpr, C: tl.constexpr):
    """Pointers to C channels of the tokens `at`, and their mask."""
    return ptr + at[:, None] * STRIDE + tl.arange(0, C)[None, :], tl.broadcast_to(exists[:, None], (at.shape[0], C))


@triton.jit
def _state_kernel(
    qkv, rstd, scale, N, state, total, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    h, run, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    qkv += i * N * K * 3 * C + h * 3 * C
    c = tl.arange(0, C)
    s = scale
    if NORMED:
        s = tl.load(scale + (K + h) * C + c)
        rstd += (tl.num_programs(2) + i) * N
    acc, z = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for t in range(TILES):
        at = (run * TILES + t) * ROWS + tl.arange(0, ROWS)
        k_at, mask = _at(qkv + C, at, at < N, K * 3 * C, C)
        raw, v = tl.load(k_at, mask=mask, other=0.0), tl.load(k_at + C, mask=mask, other=0.0)
        key = _relu(_before_relu(raw, rstd, s, at, at < N, NORMED))
        acc += _dot(tl.trans(key), v, NORMED and v.dtype != tl.float32, False, v.dtype)
        z += tl.sum(key.to(tl.float32), axis=0)
    part = (i * K + h) * PARTS + run
    tl.store(state + part * C * C + c[:, None] * C + c[None, :], acc)
    tl.store(total + part * C + c, z)


@triton.jit
def _apply_kernel(
    qkv, rstd, scale, state, total, N, out, EPS: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    h, tile, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, at = tl.arange(0, C), tile * ROWS + tl.arange(0, ROWS)
    q_at, mask = _at(qkv + i * N * K * 3 * C + h * 3 * C, at, at < N, K * 3 * C, C)
    raw = tl.load(q_at, mask=mask, other=0.0)
    s = scale
    if NORMED:
        s = tl.load(scale + h * C + c)
    q = _relu(_before_relu(raw, rstd + i * N, s, at, at < N, NORMED))
    S = tl.load(state + (i * K + h) * C * C + c[:, None] * C + c[None, :])
    z = tl.load(total + (i * K + h) * C + c)
    weight = tl.sum(q.to(tl.float32) * z[None, :], axis=1) + EPS
    SPLIT: tl.constexpr = raw.dtype != tl.float32
    y = _dot(q, S, NORMED and SPLIT, SPLIT, raw.dtype) / weight[:, None]
    out_at, mask = _at(out + i * N * K * C + h * C, at, at < N, K * C, C)
    tl.store(out_at, y.to(raw.dtype), mask=mask)


@triton.jit
def _dq_kernel(
    qkv, gradient, rstd, scale, state, total, N, dqkv, dstate, dtotal, drstd, dscale, EPS: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    h, run, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    image = i * N * K
    c = tl.arange(0, C)
    S = tl.load(state + (i * K + h) * C * C + c[:, None] * C + c[None, :])
    z = tl.load(total + (i * K + h) * C + c)
    s = scale
    if NORMED:
        s = tl.load(scale + h * C + c)
    dS, dz, ds = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for t in range(TILES):
        at = (run * TILES + t) * ROWS + tl.arange(0, ROWS)
        q_at, mask = _at(qkv + image * 3 * C + h * 3 * C, at, at < N, K * 3 * C, C)
        g_at, _ = _at(gradient + image * C + h * C, at, at < N, K * C, C)
        raw, g = tl.load(q_at, mask=mask, other=0.0), tl.load(g_at, mask=mask, other=0.0)
        before = _before_relu(raw, rstd + i * N, s, at, at < N, NORMED)
        q = _relu(before)
        q32 = q.to(tl.float32)
        SPLIT: tl.constexpr = g.dtype != tl.float32
        weight = (tl.sum(q32 * z[None, :], axis=1) + EPS)[:, None]
        d = _dot(g, tl.trans(S), False, SPLIT, g.dtype) / weight
        down = -tl.sum(q32 * d, axis=1)[:, None] / weight
        d = tl.where(before <= 0, 0.0, d + down * z[None, :])
        if NORMED:
            r = tl.load(rstd + i * N + at, mask=at < N, other=0.0)
            along = d * raw.to(tl.float32)
            tl.store(drstd + (i * K + h) * N + at, tl.sum(along * s[None, :], axis=1), mask=at < N)
            ds += tl.sum(along * r[:, None], axis=0)
            d = d * r[:, None] * s[None, :]
        d_at, _ = _at(dqkv + image * 3 * C + h * 3 * C, at, at < N, K * 3 * C, C)
        tl.store(d_at, d.to(g.dtype), mask=mask)
        dS += _dot(tl.trans(q), g.to(tl.float32) / weight, NORMED and SPLIT, SPLIT, g.dtype)
        dz += tl.sum(q32 * down, axis=0)
    part = (i * K + h) * PARTS + run
    tl.store(dstate + part * C * C + c[:, None] * C + c[None, :], dS)
    tl.store(dtotal + part * C + c, dz)
    if NORMED:
        tl.store(dscale + part * C + c, ds)


@triton.jit
def _dkv_kernel(
    qkv, rstd, scale, dstate, dtotal, held, N, dqkv, drstd, dscale, K: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    h, tile, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    image = i * N * K * 3 * C + h * 3 * C
    c, at = tl.arange(0, C), tile * ROWS + tl.arange(0, ROWS)
    k_at, mask = _at(qkv + image + C, at, at < N, K * 3 * C, C)
    raw, v = tl.load(k_at, mask=mask, other=0.0), tl.load(k_at + C, mask=mask, other=0.0)
    s = scale
    if NORMED:
        s = tl.load(scale + (K + h) * C + c)
        rstd += (tl.num_programs(2) + i) * N
    before = _before_relu(raw, rstd, s, at, at < N, NORMED)
    dS = tl.load(dstate + (i * K + h) * C * C + c[:, None] * C + c[None, :])
    dz = tl.load(dtotal + (i * K + h) * C + c)
    SPLIT: tl.constexpr = raw.dtype != tl.float32
    d = _dot(v, tl.trans(dS), False, SPLIT, raw.dtype) + dz[None, :]
    d = tl.where(before <= 0, 0.0, d)
    if NORMED:
        r = tl.load(rstd + at, mask=at < N, other=0.0)
        along = d * raw.to(tl.float32)
        tl.store(drstd + (i * K + h) * N + at, tl.sum(along * s[None, :], axis=1), mask=at < N)
        tl.store(dscale + ((i * K + h) * PARTS + tile) * C + c, tl.sum(along * r[:, None], axis=0))
        d = d * r[:, None] * s[None, :]
    d_at, _ = _at(dqkv + image + C, at, at < N, K * 3 * C, C)
    tl.store(d_at, d.to(raw.dtype), mask=mask)
    dv = _dot(_relu(before), dS, NORMED and SPLIT, SPLIT, raw.dtype)
    tl.store(d_at + C, dv.to(raw.dtype), mask=mask)


def _call(kernel, tile, *operands, **options):
    return jax_triton.triton_call(
        *operands,
        kernel=kernel,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        compute_capability=dispatch.capability(),
        ROWS=tile["rows"],
        **options,
    )


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def _norm(qkv, norm):
    """(rstd, scale), or any pointers where a kernel reads none."""
    return (qkv, qkv) if norm is None else norm


def _norm_out(norm, b, n, k, c, parts):
    """Shapes of the norm's gradients, or of one number each where a kernel writes none."""
    return [_float32(1)] * 2 if norm is None else [_float32(b, k, n), _float32(b, k, parts, c)]


def forward(qkv, norm, eps, tiles):
    """As `pallas_triton.forward`."""
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    sizes = dict(K=k, C=c, NORMED=norm is not None)

    @jax.custom_batching.sequential_vmap
    def run(qkv, norm):
        tile = tiles["state"]
        each, parts = runs(n, b * k, tile["rows"], tile["programs"])
        shapes = [_float32(b, k, parts, c, c), _float32(b, k, parts, c)]
        grid = (k, parts, b)
        operands = (qkv, *_norm(qkv, norm))
        state, total = _call(
            _state_kernel, tile, *operands, n, out_shape=shapes, grid=grid, TILES=each, PARTS=parts, **sizes
        )
        state, total = state.sum(axis=2), total.sum(axis=2)
        tile = tiles["apply"]
        grid = (k, triton.cdiv(n, tile["rows"]), b)
        shape = jax.ShapeDtypeStruct((b, n, k, c), qkv.dtype)
        out = _call(_apply_kernel, tile, *operands, state, total, n, out_shape=shape, grid=grid, EPS=eps, **sizes)
        return out, (state, total)

    return run(qkv, norm)


def backward(qkv, norm, residual, gradient, eps, tiles):
    """As `pallas_triton.backward`."""
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    sizes = dict(K=k, C=c, NORMED=norm is not None)
    whole = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)

    @jax.custom_batching.sequential_vmap
    def run(qkv, norm, residual, gradient):
        factors = _norm(qkv, norm)
        tile = tiles["dq"]
        each, parts = runs(n, b * k, tile["rows"], tile["programs"])
        shapes = [whole, _float32(b, k, parts, c, c), _float32(b, k, parts, c), *_norm_out(norm, b, n, k, c, parts)]
        dqkv, dstate, dtotal, *of_q = _call(
            _dq_kernel, tile, qkv, gradient, *factors, *residual, n, out_shape=shapes, grid=(k, parts, b),
            EPS=eps, TILES=each, PARTS=parts, **sizes,
        )  # fmt: skip
        tile = tiles["dkv"]
        parts = triton.cdiv(n, tile["rows"])
        operands = (qkv, *factors, dstate.sum(axis=2), dtotal.sum(axis=2), dqkv)
        dqkv, *of_k = _call(
            _dkv_kernel, tile, *operands, n, out_shape=[whole, *_norm_out(norm, b, n, k, c, parts)],
            grid=(k, parts, b), input_output_aliases={5: 0}, PARTS=parts, **sizes,
        )  # fmt: skip
        if norm is None:
            return dqkv, None
        drstd, dscale = zip(of_q, of_k)
        return dqkv, (jnp.stack([d.sum(axis=1) for d in drstd]), jnp.stack([d.sum(axis=(0, 2)) for d in dscale]))

    return run(qkv, norm, residual, gradient)
