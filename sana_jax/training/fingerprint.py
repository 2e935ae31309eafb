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
    """uint32 [3]: the two sums, and how many numbers are not finite."""
    infinite = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # no reshape: it would gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(0x9E3779B1)  # neighbours get unrelated weights (Fibonacci hashing)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    first = place << 1 | jnp.uint32(1)
    second = (place ^ jnp.uint32(0x5BD1E995)) * jnp.uint32(0xC2B2AE3D) | jnp.uint32(1)
    return jnp.stack([jnp.sum(n, dtype=jnp.uint32) for n in (words * first, words * second, infinite)])


@functools.cache
def _program(sharding):
    return jax.jit(_sums, out_shardings=sharding)


def _everywhere(leaf):
    """Where the sums of an array go: to all devices, or a process could not read them."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def fingerprint(tree):
    """({name: [sum, sum, dtype, shape]}, names of the arrays that hold NaN or infinity), JSON-ready.

    All processes must call it together if an array spans them.  One small program for each shape:
    hundreds of leaves share few, and one program for all of an autoencoder takes half a minute to
    compile.  Each is waited for before the next begins: collectives of two programs that run at once
    may meet in another order in another process, and wait for each other for ever.
    """
    leaves = named_leaves(tree)
    sums = [np.asarray(_program(_everywhere(leaf))(leaf)) for _, leaf in leaves]
    prints = {
        name: [int(found[0]), int(found[1]), *describe(leaf)]
        for (name, leaf), found in zip(leaves, sums, strict=True)
    }
    return prints, [name for (name, _), found in zip(leaves, sums, strict=True) if found[2]]


def describe(leaf):
    """[dtype name, shape] of an array, real or abstract."""
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def state_hash(tree):
    """64 hex digits that two trees share only if names, types, shapes and all bits are the same."""
    return hashlib.sha256(json.dumps(fingerprint(tree)[0], sort_keys=True).encode()).hexdigest()
