"""The specification: the formulas of the operations in float32 (float64 if the arguments are)."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def modulate(x, shift, scale, eps):
    """x [b n d], shift and scale [b or 1, d] -> [b n d] in x's dtype."""
    wide, shift, scale = (a.astype(dispatch.wide(x.dtype)) for a in (x, shift[:, None], scale[:, None]))
    variance = jnp.var(wide, axis=-1, keepdims=True)
    normal = (wide - jnp.mean(wide, axis=-1, keepdims=True)) / jnp.sqrt(variance + eps)
    return (normal * (1 + scale) + shift).astype(x.dtype)


def add_gated(x, gate, y):
    """x and y [b n d], gate [b or 1, d] -> [b n d] in x's dtype."""
    wide = dispatch.wide(x.dtype)
    return (x.astype(wide) + gate[:, None].astype(wide) * y.astype(wide)).astype(x.dtype)


modulate_forward, add_gated_forward = modulate, add_gated


def modulate_backward(x, scale, gradient, eps):
    # The shift's value leaves no trace in any gradient.
    return jax.vjp(lambda *args: modulate(*args, eps), x, jnp.zeros_like(scale), scale)[1](gradient)


def add_gated_backward(gate, y, gradient):
    return jax.vjp(add_gated, jnp.zeros_like(y), gate, y)[1](gradient)[1:]
