"""The specification: the formula of the operation in float32 (float64 if the arguments are)."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def add_rms_norm(x, y, scale, bias, eps):
    """x and y [b n d], scale and bias [d] -> [b n d] in x's dtype."""
    wide, scale, bias = (a.astype(dispatch.wide(y.dtype)) for a in (y, scale, bias))
    normal = wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return x + (normal * scale + bias).astype(y.dtype)


forward = add_rms_norm


def backward(y, scale, gradient, eps):
    # Neither x nor the bias leaves a trace in any gradient.
    bias, x = jnp.zeros_like(scale), jnp.zeros_like(y)
    return jax.vjp(lambda *args: add_rms_norm(x, *args, eps), y, scale, bias)[1](gradient)
