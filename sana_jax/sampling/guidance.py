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


def perturbed_attention(branches, scale, strength):
    """Away from the velocity of a network whose attention is switched off in some layers, in float32
    (https://arxiv.org/abs/2403.17377):  v_c + s (v_c - v_p), with both, v_u + w (v_c - v_u) + s (v_c - v_p).

    Args:
      branches: branches(x, t) -> velocities of x: conditional and perturbed, or unconditional before them.
      scale: w of classifier-free guidance, used where there is an unconditional velocity.
      strength: strength(t) -> s, see `fading`.
    """

    def velocity(x, t):
        *unconditional, conditional, perturbed = (v.astype(jnp.float32) for v in branches(x, t))
        away = strength(t) * (conditional - perturbed)
        for v in unconditional:  # one, or none
            conditional = v + scale * (conditional - v)
        return conditional + away

    return velocity


def fading(scale, decay, t):
    """max(scale - decay (1000 - t), 0): perturbed-attention guidance that fades as t falls from 1000."""
    return jnp.maximum(scale - decay * (1000 - t), 0)


def within(guided, conditional, interval, sigma):
    """Guidance inside an interval of noise levels only (https://arxiv.org/abs/2404.07724).

    Args:
      guided, conditional: velocities inside and outside; outside costs half as much, or less.
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
