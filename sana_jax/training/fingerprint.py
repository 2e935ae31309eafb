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
    """Leaves -> uint32 [leaves 3].  Replicated, or a process could not read it."""
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=sharding)


def fingerprint(tree):
    """({name: [sum, sum, dtype, shape]}, names of the arrays that hold NaN or infinity), JSON-ready.

    Arrays on devices go through one program, which all processes must call together.  (One for each
    leaf would be smaller to compile, but their collectives may meet in another order elsewhere, and
    wait for each other for ever.)  Arrays of the host go one by one: a device may not hold them all.
    """
    names, leaves = zip(*named_leaves(tree)) if jax.tree.leaves(tree) else ((), ())
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        sums = [np.asarray(_program(None)([leaf]))[0] for leaf in leaves]
    else:
        meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(getattr(leaf, "sharding", None), NamedSharding)]
        everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
        sums = np.asarray(_program(everywhere)(list(leaves)))
    prints = {
        name: [int(found[0]), int(found[1]), *describe(leaf)]
        for name, leaf, found in zip(names, leaves, sums, strict=True)
    }
    return prints, [name for name, found in zip(names, sums, strict=True) if found[2]]


def describe(leaf):
    """[dtype name, shape] of an array, real or abstract."""
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def state_hash(tree):
    """64 hex digits that two trees share only if names, types, shapes and all bits are the same."""
    return hashlib.sha256(json.dumps(fingerprint(tree)[0], sort_keys=True).encode()).hexdigest()
