"""Content fingerprints of trees of arrays: what a checkpoint holds, told without its files.

Two weighted sums of a leaf's 32-bit words modulo 2^32, in one pass on the device.  The weights are odd,
so any change within one word changes both sums; they depend on the word's place, so words that change
places change them too.  Sums of integers are exact in any order: sharding does not matter.
"""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # bytes of an element: what it is read as


def named_leaves(tree):
    """[("params/blocks/self_attn/qkv/kernel", leaf), ...] of any tree, in its order."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _sums(x):
    """uint32 [3]: the two sums, and 1 if every number is finite."""
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # no reshape: it would gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(0x9E3779B1)  # neighbours get unrelated weights (Fibonacci hashing)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    first = place << 1 | jnp.uint32(1)
    second = (place ^ jnp.uint32(0x5BD1E995)) * jnp.uint32(0xC2B2AE3D) | jnp.uint32(1)
    sums = (jnp.sum(words * weight, dtype=jnp.uint32) for weight in (first, second))
    return jnp.stack([*sums, finite.astype(jnp.uint32)])


@functools.cache
def _program(sharding):
    return jax.jit(_sums, out_shardings=sharding)  # replicated, or a process could not read it


def _everywhere(leaf):
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def fingerprint(tree):
    """({name: [sum, sum, dtype, shape]}, names of the arrays that hold NaN or infinity), JSON-ready.

    One small program for each shape, not one for the tree: hundreds of leaves share few shapes.  All
    processes must call it together if an array spans them.
    """
    leaves = named_leaves(tree)
    sums = jax.device_get([_program(_everywhere(leaf))(leaf) for _, leaf in leaves])
    prints = {
        name: [int(found[0]), int(found[1]), *describe(leaf)]
        for (name, leaf), found in zip(leaves, sums, strict=True)
    }
    return prints, [name for (name, _), found in zip(leaves, sums, strict=True) if not found[2]]


def describe(leaf):
    """[dtype name, shape] of an array, real or abstract."""
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def state_hash(tree):
    """64 hex digits that two trees share only if names, types, shapes and all bits are the same."""
    return hashlib.sha256(json.dumps(fingerprint(tree)[0], sort_keys=True).encode()).hexdigest()
