"""The kernels, written in Pallas for its Triton backend.

Tokens are cut into tiles of `rows`; a program handles one tile, or a run of them, of one head.

    state     k, v -> for each run of tiles, S and z; XLA adds the runs, always in the same order
    apply     q, S, z -> out
    backward  q, g, S, z -> dq, and for each run dS and dz
              k, v, dS, dz -> dk, dv, into the array that holds dq

Each reads its part of qkv once.  No program writes what another does, and no sum is atomic.
Blocks reach past the end where n is no multiple of `rows`, and Triton's lowering does not mask them
(before jax 0.12): every access carries the mask of the tokens that exist.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

F32 = jnp.float32


def dot(a, b, over, dtype):
    """The 2-D product over axis over[0] of a and over[1] of b, with float32 sums and no TF32.

    Tensor cores take factors of `dtype`.  A float32 factor becomes two narrow ones, its rounding and
    what that left; the product of two such remainders is dropped (2^-18 of the whole).
    """

    def narrow(a, b):
        dimensions = (((over[0],), (over[1],)), ((), ()))
        precision = jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=F32)

    a, b = parts(a, dtype), parts(b, dtype)
    return sum((narrow(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j == 1), narrow(a[0], b[0]))


def parts(x, dtype):
    """x as a sum of arrays of `dtype`, the largest first."""
    if x.dtype == dtype:
        return [x]
    high = x.astype(dtype)
    return [high, (x - high.astype(F32)).astype(dtype)]


def relu(x):
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


class Tile:
    """`rows` tokens from `start` of a block whose first token is `first`."""

    def __init__(self, first, start, rows, n, ragged):
        self.at = pl.ds(start, rows)
        self.exists = first + start + jnp.arange(rows) < n if ragged else None

    def _mask(self, width):
        return None if self.exists is None else jnp.broadcast_to(self.exists[:, None], (self.exists.shape[0], width))

    def load(self, ref, channels=slice(None)):
        part = ref.at[self.at, channels]
        return plt.load(part, mask=self._mask(part.shape[-1]), other=None if self.exists is None else 0.0)

    def load_tokens(self, ref):
        return plt.load(ref.at[self.at], mask=self.exists, other=None if self.exists is None else 0.0)

    def store(self, ref, value, channels=slice(None)):
        plt.store(ref.at[self.at, channels], value.astype(ref.dtype), mask=self._mask(value.shape[-1]))

    def store_tokens(self, ref, value):
        plt.store(ref.at[self.at], value, mask=self.exists)


class Feature:
    """A query or key: `raw` as stored, `before` and `after` the ReLU.  Where there is a norm, the last two
    are float32."""

    def __init__(self, tile, ref, norm):
        self.raw = self.before = tile.load(ref)
        self.norm = bool(norm)
        if self.norm:
            rstd, scale = norm
            self.rstd, self.scale = tile.load_tokens(rstd)[:, None], scale[...][None]
            self.before = self.raw.astype(F32) * self.rstd * self.scale
        self.after = relu(self.before)

    def pull(self, gradient):
        """The gradients of what is stored, of rstd [t] and of scale [c] (None, None without a norm)."""
        gradient = jnp.where(self.before <= 0, jnp.zeros_like(gradient), gradient)
        if not self.norm:
            return gradient, None, None
        along = gradient * self.raw.astype(F32)
        drstd, dscale = jnp.sum(along * self.scale, axis=1), jnp.sum(along * self.rstd, axis=0)
        return gradient * self.rstd * self.scale, drstd, dscale


def _state_kernel(k_ref, v_ref, *refs, n, rows, tiles):
    *norm, state_ref, total_ref = refs
    c, first = k_ref.shape[-1], pl.program_id(1) * rows * tiles

    def body(i, carry):
        state, total = carry
        tile = Tile(first, i * rows, rows, n, n % (rows * tiles))
        key, v = Feature(tile, k_ref, norm), tile.load(v_ref)
        return state + dot(key.after, v, (0, 0), v.dtype), total + jnp.sum(key.after.astype(F32), axis=0)

    state, total = jax.lax.fori_loop(0, tiles, body, (jnp.zeros((c, c), F32), jnp.zeros((c,), F32)))
    state_ref[...] = state
    total_ref[...] = total


def _apply_kernel(q_ref, *refs, n, rows, eps):
    *norm, state_ref, total_ref, out_ref = refs
    tile = Tile(pl.program_id(1) * rows, 0, rows, n, n % rows)
    q = Feature(tile, q_ref, norm).after
    weight = jnp.sum(q.astype(F32) * total_ref[...][None], axis=1) + eps
    tile.store(out_ref, dot(q, state_ref[...], (1, 0), out_ref.dtype) / weight[:, None])


def _dq_kernel(q_ref, g_ref, *refs, n, rows, tiles, eps, normed):
    norm, (state_ref, total_ref, dq_ref, dstate_ref, dtotal_ref, *dnorm) = refs[: 2 * normed], refs[2 * normed :]
    c, first = q_ref.shape[-1], pl.program_id(1) * rows * tiles
    state, total = state_ref[...], total_ref[...]

    def body(i, carry):
        dstate, dtotal, dscale = carry
        tile = Tile(first, i * rows, rows, n, n % (rows * tiles))
        query, g = Feature(tile, q_ref, norm), tile.load(g_ref)
        q = query.after.astype(F32)
        weight = (jnp.sum(q * total[None], axis=1) + eps)[:, None]
        dq = dot(g, state, (1, 1), g.dtype) / weight
        down = -jnp.sum(q * dq, axis=1)[:, None] / weight
        dq, drstd, more = query.pull(dq + down * total[None])
        tile.store(dq_ref, dq, pl.ds(0, c))
        if normed:
            tile.store_tokens(dnorm[0], drstd)
            dscale = dscale + more
        dstate = dstate + dot(query.after, g.astype(F32) / weight, (0, 0), g.dtype)
        return dstate, dtotal + jnp.sum(q * down, axis=0), dscale

    zeros = jnp.zeros((c,), F32)
    dstate, dtotal, dscale = jax.lax.fori_loop(0, tiles, body, (jnp.zeros((c, c), F32), zeros, zeros))
    dstate_ref[...] = dstate
    dtotal_ref[...] = dtotal
    if normed:
        dnorm[1][...] = dscale


def _dkv_kernel(k_ref, v_ref, *refs, n, rows, normed):
    norm, (dstate_ref, dtotal_ref, _, dqkv_ref, *dnorm) = refs[: 2 * normed], refs[2 * normed :]
    c = k_ref.shape[-1]
    tile = Tile(pl.program_id(1) * rows, 0, rows, n, n % rows)
    key, v, dstate = Feature(tile, k_ref, norm), tile.load(v_ref), dstate_ref[...]
    dk, drstd, dscale = key.pull(dot(v, dstate, (1, 1), v.dtype) + dtotal_ref[...][None])
    tile.store(dqkv_ref, dk, pl.ds(c, c))
    tile.store(dqkv_ref, dot(key.after, dstate, (1, 0), v.dtype), pl.ds(2 * c, c))
    if normed:
        tile.store_tokens(dnorm[0], drstd)
        dnorm[1][...] = dscale


# --- Blocks.  The grid is (head, run or tile of tokens, image): neighbouring heads share cache lines.


def _tokens(rows, width, slot=0):
    """Of [b n k ...]: `rows` tokens of one head, the slot-th run of `width` channels."""
    return pl.BlockSpec((None, rows, None, width), lambda h, t, i: (i, t, h, slot))


def _norm(norm, which, rows):
    """([operands], [blocks]) of the norm of queries (0) or keys (1)."""
    if norm is None:
        return [], []
    rstd, scale = norm
    blocks = [
        pl.BlockSpec((None, rows), lambda h, t, i: (i, t)),
        pl.BlockSpec((None, scale.shape[-1]), lambda h, t, i: (h, 0)),
    ]
    return [rstd[which], scale[which]], blocks


def _norm_out(norm, b, n, k, c, parts, rows):
    """([shapes], [blocks]) of the norm's gradients: [b k n] and, for each program, [b k parts c]."""
    if norm is None:
        return [], []
    blocks = [
        pl.BlockSpec((None, None, rows), lambda h, t, i: (i, h, t)),
        pl.BlockSpec((None, None, None, c), lambda h, t, i: (i, h, t, 0)),
    ]
    return [jax.ShapeDtypeStruct((b, k, n), F32), jax.ShapeDtypeStruct((b, k, parts, c), F32)], blocks


def _whole_state(c):
    """Of [b k c c] and [b k c]: that of the program's head."""
    square = pl.BlockSpec((None, None, c, c), lambda h, t, i: (i, h, 0, 0))
    return [square, pl.BlockSpec((None, None, c), lambda h, t, i: (i, h, 0))]


def _state_parts(b, k, c, parts):
    """([shapes], [blocks]) of what each program adds to a state."""
    blocks = [
        pl.BlockSpec((None, None, None, c, c), lambda h, t, i: (i, h, t, 0, 0)),
        pl.BlockSpec((None, None, None, c), lambda h, t, i: (i, h, t, 0)),
    ]
    return [jax.ShapeDtypeStruct((b, k, parts, c, c), F32), jax.ShapeDtypeStruct((b, k, parts, c), F32)], blocks


def runs(n, heads, rows, programs):
    """(tiles in a run, runs): about `programs` programs in all, for as many heads of all images."""
    tiles = pl.cdiv(n, rows)
    each = pl.cdiv(tiles, max(1, min(tiles, pl.cdiv(programs, heads))))
    return each, pl.cdiv(tiles, each)


def _call(kernel, tile, interpret, **options):
    params = plt.CompilerParams(num_warps=tile["warps"], num_stages=tile["stages"])
    return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **options)


def forward(qkv, norm, eps, tiles, interpret=False):
    """-> out [b n k c], (state [b k c c], total [b k c])."""
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    tile = tiles["state"]
    rows = tile["rows"]
    each, parts = runs(n, b * k, rows, tile["programs"])
    shapes, blocks = _state_parts(b, k, c, parts)
    operands, norm_blocks = _norm(norm, 1, rows * each)
    state, total = _call(
        functools.partial(_state_kernel, n=n, rows=rows, tiles=each),
        tile,
        interpret,
        out_shape=shapes,
        grid=(k, parts, b),
        in_specs=[_tokens(rows * each, c, 1), _tokens(rows * each, c, 2), *norm_blocks],
        out_specs=blocks,
        name="linear_attention_state",
    )(qkv, qkv, *operands)
    state, total = state.sum(axis=2), total.sum(axis=2)

    tile = tiles["apply"]
    rows = tile["rows"]
    operands, norm_blocks = _norm(norm, 0, rows)
    out = _call(
        functools.partial(_apply_kernel, n=n, rows=rows, eps=eps),
        tile,
        interpret,
        out_shape=jax.ShapeDtypeStruct((b, n, k, c), qkv.dtype),
        grid=(k, pl.cdiv(n, rows), b),
        in_specs=[_tokens(rows, c), *norm_blocks, *_whole_state(c)],
        out_specs=_tokens(rows, c),
        name="linear_attention_apply",
    )(qkv, *operands, state, total)
    return out, (state, total)


def backward(qkv, norm, residual, gradient, eps, tiles, interpret=False):
    """-> dqkv [b n k 3c], None or (drstd [2 b n], dscale [2 k c])."""
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    normed = norm is not None
    whole = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)

    tile = tiles["dq"]
    rows = tile["rows"]
    each, parts = runs(n, b * k, rows, tile["programs"])
    span = rows * each
    shapes, blocks = _state_parts(b, k, c, parts)
    norm_shapes, norm_out = _norm_out(norm, b, n, k, c, parts, span)
    operands, norm_blocks = _norm(norm, 0, span)
    dqkv, dstate, dtotal, *of_q = _call(
        functools.partial(_dq_kernel, n=n, rows=rows, tiles=each, eps=eps, normed=normed),
        tile,
        interpret,
        out_shape=[whole, *shapes, *norm_shapes],
        grid=(k, parts, b),
        in_specs=[_tokens(span, c), _tokens(span, c), *norm_blocks, *_whole_state(c)],
        out_specs=[_tokens(span, 3 * c), *blocks, *norm_out],
        name="linear_attention_dq",
    )(qkv, gradient, *operands, *residual)
    dstate, dtotal = dstate.sum(axis=2), dtotal.sum(axis=2)

    tile = tiles["dkv"]
    rows = tile["rows"]
    parts = pl.cdiv(n, rows)
    norm_shapes, norm_out = _norm_out(norm, b, n, k, c, parts, rows)
    operands, norm_blocks = _norm(norm, 1, rows)
    dqkv, *of_k = _call(
        functools.partial(_dkv_kernel, n=n, rows=rows, normed=normed),
        tile,
        interpret,
        out_shape=[whole, *norm_shapes],
        grid=(k, parts, b),
        in_specs=[_tokens(rows, c, 1), _tokens(rows, c, 2), *norm_blocks, *_whole_state(c), _tokens(rows, 3 * c)],
        out_specs=[_tokens(rows, 3 * c), *norm_out],
        input_output_aliases={4 + len(operands): 0},
        name="linear_attention_dkv",
    )(qkv, qkv, *operands, dstate, dtotal, dqkv)
    if not normed:
        return dqkv, None
    drstd, dscale = zip(of_q, of_k)
    return dqkv, (jnp.stack([d.sum(axis=1) for d in drstd]), jnp.stack([d.sum(axis=(0, 2)) for d in dscale]))
