"""What the operations on rows share: a token's channels from its own, and sums over tokens.

Such an operation is a function of whole rows,

    fn(mean, *arrays, *vectors) -> (out, *summands)

float32 all of it: arrays, out and summands [... n d], vectors [... 1 d], and `mean` the mean over the
channels, kept as an axis.  It is said once, in the `xla.py` of the operation, and run here in either of
two ways, which give out in the dtype of the arrays and the sum of each summand over the tokens of each
image, or over all where one vector serves all images.

In a kernel a program takes a run of tiles, each of as many rows as `elements` hold at the width, padded
to a power of two.  It reads each array once and writes out once; vectors and sums stay in registers for
the whole run, and what remains of the sums, [b runs d], XLA adds.  No program writes what another does.
Masked are the channels past the last and the tokens past the last: they are loaded as zeros, which add
nothing to a sum, and not stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.dispatch import listed, require

F32 = jnp.float32


def check(op, arrays, vectors, shapes):
    """Raises KernelError unless the arrays are [b n d] of one float type and the vectors one of `shapes`.

    Args:
      arrays, vectors: {name: array}.
      shapes: function of (b, d) that gives the shapes allowed.
    """
    (first, array), *_ = arrays.items()
    for name, a in arrays.items():
        require(jnp.ndim(a) == 3, op, f"{name}.shape", jnp.shape(a), "[b, n, d]")
        dispatch.require_float(op, name, a)
        require(0 not in a.shape, op, f"{name}.shape", a.shape, "without an empty axis")
        require(a.shape == array.shape, op, f"{name}.shape", a.shape, f"that of {first}, {array.shape}")
        require(a.dtype == array.dtype, op, f"{name}.dtype", a.dtype, f"that of {first}, {array.dtype}")
    allowed = list(dict.fromkeys(shapes(array.shape[0], array.shape[2])))
    (first, vector), *_ = vectors.items()
    for name, v in vectors.items():
        require(jnp.shape(v) in allowed, op, f"{name}.shape", jnp.shape(v), listed(allowed))
        dispatch.require_float(op, name, v)
        require(v.shape == vector.shape, op, f"{name}.shape", v.shape, f"that of {first}, {vector.shape}")


def require_for_kernels(op, name, array, tiles):
    """Raises KernelError where no kernel takes arrays such as this one, called `name`.

    `tiles` is a function that gives {pass: tile}."""
    dispatch.require_for_kernels(op, name, array)
    d, widest = array.shape[-1], min(tile["elements"] for tile in tiles().values())
    require(d <= widest, op, "d", d, f"at most {widest} for a kernel, which holds whole rows")


def mean_of_channels(x):
    return jnp.mean(x, axis=-1, keepdims=True)


def total(parts, vector):
    """The sum of [b p d] over p, and over b too where `vector`, [b or 1, d], is one for all images."""
    return parts.sum(axis=1) if vector.shape[0] == parts.shape[0] else parts.sum(axis=(0, 1))[None]


def plain(fn, arrays, vectors):
    """`fn` in plain JAX; -> (out, *sums)."""
    wide = dispatch.wide(arrays[0].dtype)
    out, *summands = fn(mean_of_channels, *(a.astype(wide) for a in arrays), *(v[:, None] for v in vectors))
    return out.astype(arrays[0].dtype), *(total(s, vectors[0]) for s in summands)


# --- The kernel.


def blocks(b, n, d, tile):
    """How [b n d] is divided: (padded width, rows of a tile, tiles of a run, runs of an image)."""
    padded = pl.next_power_of_2(d)
    rows = max(1, tile["elements"] // padded)
    tiles = pl.cdiv(n, rows)
    each = pl.cdiv(tiles, max(1, min(tiles, pl.cdiv(tile["programs"], b))))
    return padded, rows, each, pl.cdiv(tiles, each)


def _mask(inside, exists, shape):
    """Which elements of a tile exist, from which channels do and which rows do; None: all of them."""
    masks = [jnp.broadcast_to(m, shape) for m in (inside, exists) if m is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def load(ref, mask):
    return plt.load(ref, mask=mask, other=None if mask is None else 0.0)


def masked_mean(x, inside, d):
    return jnp.sum(x if inside is None else jnp.where(inside, x, 0.0), axis=1, keepdims=True) / d


def _kernel(*refs, fn, counts, n, d, rows, each):
    arrays, refs = refs[: counts[0]], refs[counts[0] :]
    vectors, (out_ref, *sum_refs) = refs[: counts[1]], refs[counts[1] :]
    padded, first = out_ref.shape[-1], pl.program_id(0) * each * rows
    inside = None if d == padded else jnp.arange(padded) < d
    columns = None if inside is None else inside[None]
    vectors = [load(ref.at[pl.ds(0, padded)], inside)[None] for ref in vectors]
    mean = functools.partial(masked_mean, inside=columns, d=d)

    def body(i, sums):
        row = first + i * rows + jnp.arange(rows)
        mask = _mask(columns, (row < n)[:, None] if n % (rows * each) else None, (rows, padded))
        tile = pl.ds(i * rows, rows), slice(None)
        out, *summands = fn(mean, *(load(ref.at[tile], mask).astype(F32) for ref in arrays), *vectors)
        plt.store(out_ref.at[tile], out.astype(out_ref.dtype), mask=mask)
        return tuple(a + b for a, b in zip(sums, summands))

    sums = jax.lax.fori_loop(0, each, body, (jnp.zeros((rows, padded), F32),) * len(sum_refs))
    for ref, x in zip(sum_refs, sums):
        plt.store(ref.at[pl.ds(0, padded)], jnp.sum(x, axis=0), mask=inside)


def kernel(fn, arrays, vectors, sums, tile, name, interpret):
    """`fn` in Pallas for its Triton backend; `sums` is how many summands it has.  -> (out, *sums)."""
    b, n, d = arrays[0].shape
    padded, rows, each, runs = blocks(b, n, d, tile)
    whole = pl.BlockSpec((None, rows * each, padded), lambda t, i: (i, t, 0))
    one = pl.BlockSpec((None, padded), lambda t, i: (0, 0))
    own = pl.BlockSpec((None, padded), lambda t, i: (i, 0))
    out, *parts = pl.pallas_call(
        functools.partial(_kernel, fn=fn, counts=(len(arrays), len(vectors)), n=n, d=d, rows=rows, each=each),
        out_shape=[jax.ShapeDtypeStruct((b, n, d), arrays[0].dtype)] + [jax.ShapeDtypeStruct((b, runs, d), F32)] * sums,
        grid=(runs, b),
        in_specs=[whole] * len(arrays) + [one if v.shape[0] == 1 else own for v in vectors],
        out_specs=[whole] + [pl.BlockSpec((None, None, padded), lambda t, i: (i, t, 0))] * sums,
        compiler_params=plt.CompilerParams(num_warps=tile["warps"], num_stages=tile["stages"]),
        interpret=interpret,
        name=name,
    )(*arrays, *vectors)
    return out, *(total(part, vectors[0]) for part in parts)
