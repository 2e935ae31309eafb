"""Relative errors against float64, and the bounds that every implementation of an operation keeps."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

NIGHT = os.environ.get("SANA_JAX_NIGHT") == "1"
FORWARD = 2e-6  # float32
GRADIENT = 1e-5
NARROW = 1.1  # bfloat16: times the error of the exact result rounded to bfloat16


def double(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def exact(fn, *args):
    """fn in float64, as numpy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(fn)(*double(args)))


def quickly_compiled(fn):
    """jax.jit for what runs once: LLVM's optimisation of an interpreted kernel takes longer than all else,
    but for the large arrays of the night."""
    if NIGHT:
        return jax.jit(fn)
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def coarse(monkeypatch, **sizes):
    """Tiles of these sizes instead of the table's: what the interpreter does for one program takes a time
    that grows with the arrays, so it is to have few of them where these are large."""
    tiles = dispatch.tiles

    def larger(*call):
        return {name: {**tile, **{k: v for k, v in sizes.items() if k in tile}} for name, tile in tiles(*call).items()}

    monkeypatch.setattr(dispatch, "tiles", larger)


def with_gradients(fn):
    """(args, gradient of the result) -> (result, gradients of args)."""

    def run(args, gradient):
        out, pull = jax.vjp(fn, *args)
        return out, pull(gradient)

    return run


def error(got, want):
    """|got - want| / |want|; infinite where got is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    found = np.linalg.norm(got - want) / np.linalg.norm(want)
    return found if np.isfinite(found) else np.inf


def rounding(want, dtype):
    """The error of `want` rounded to `dtype`."""
    return error(want.astype(jnp.dtype(dtype)), want)


def problems(got, want, gradient_rounding=NARROW):
    """What of (result, gradients) is worse than the bounds: [(which, error, bound)]."""
    found = []
    leaves = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    for i, (a, b) in enumerate(leaves):
        # The gradient of a float32 parameter is no better than the narrow arrays that it is summed from.
        dtype = leaves[0][0].dtype
        if dtype == jnp.float32:
            bound = FORWARD if i == 0 else GRADIENT
        else:
            bound = rounding(b, dtype) * (NARROW if i == 0 else gradient_rounding)
        if not error(a, b) <= bound:
            found.append((i, error(a, b), bound))
    return found


def agree(one, other):
    """Whether two implementations gave float32 (result, gradients) that are the same within FORWARD."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(error(a, b) <= FORWARD for a, b in pairs)


def check_transformations(fn, x):
    """scan over remat over vmap over the images of x [4 ...], with the gradient: what the plain call gives."""

    def transformed(x):
        images = jax.checkpoint(jax.vmap(lambda one: fn(one[None])[0]))
        _, out = jax.lax.scan(lambda carry, some: (carry, images(some)), None, x.reshape(2, 2, *x.shape[1:]))
        return out.reshape(4, *out.shape[2:])

    want, got = (quickly_compiled(with_gradients(f))((x,), jnp.cos(fn(x))) for f in (fn, transformed))
    assert all(error(a, b) < FORWARD for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
