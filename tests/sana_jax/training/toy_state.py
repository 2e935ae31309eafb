"""A state with everything that a real one has, made in no time."""

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict | None
    opt_state: tuple


def make_state(step=0, ema=True, width=64):
    """Arrays of several types and ranks that all depend on `step`, one too large for tensorstore to guard by a sum."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "blocks": {"kernel": jax.random.normal(keys[0], (2, 8, width)), "bias": jnp.full((2, 8), step, jnp.float32)},
        "embed": {"kernel": jax.random.normal(keys[1], (8, 16), jnp.bfloat16)},
        "scale": jax.random.normal(keys[2], (8,)),
    }
    mask = {"blocks": True, "embed": {"kernel": True}, "scale": False}
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.masked(optax.adamw(1e-3), mask))
    average = jax.tree.map(lambda x: x * 2, params) if ema else None
    return State(jnp.int32(step), params, average, tx.init(params))


def abstract(state, sharding=lambda leaf: leaf.sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state)
