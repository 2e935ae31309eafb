"""Guidance as wrappers: velocity functions in, a velocity function out."""

import jax
import jax.numpy as jnp


def classifier_free(both, scale):
    """v_u + scale (v_c - v_u), in float32 (https://arxiv.org/abs/2207.12598).

    Args:
      both: both(x, t) -> (unconditional, conditional) velocities of x.
      scale: the guidance scale w; 1 is no guidance.
    """

    def velocity(x, t):
        unconditional, conditional = (v.astype(jnp.float32) for v in both(x, t))
        return unconditional + scale * (conditional - unconditional)

    return velocity


def within(guided, conditional, interval, sigma):
    """Guidance inside an interval of noise levels only (https://arxiv.org/abs/2404.07724).

    Args:
      guided, conditional: velocities inside and outside; outside costs half as much.
      interval: (low, high), open at both ends; (0, 1) is everywhere.
      sigma: sigma(t) -> noise level in [0, 1] of what the sampler passes as t.
    """
    low, high = interval

    def velocity(x, t):
        inside = (low < sigma(t)) & (sigma(t) < high)
        return jax.lax.cond(
            inside,
            lambda: guided(x, t).astype(jnp.float32),
            lambda: conditional(x, t).astype(jnp.float32),
        )

    return velocity
