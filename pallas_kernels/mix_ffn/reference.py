"""The specification: the formula of the operation in float32 (float64 if the arguments are)."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def mix_ffn(y, kernel, bias, first_silu):
    """y [b h w 2c], kernel [3 3 2c], bias [2c] -> [b h w c] in y's dtype."""
    x, kernel, bias = (a.astype(dispatch.wide(y.dtype)) for a in (y, kernel, bias))
    x = jax.nn.silu(x) if first_silu else x
    x = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=jax.lax.Precision.HIGHEST,
    )
    value, gate = jnp.split(x + bias, 2, axis=-1)
    return (value * jax.nn.silu(gate)).astype(y.dtype)


def forward(y, kernel, bias, first_silu):
    return mix_ffn(y, kernel, bias, first_silu)


def backward(y, kernel, bias, gradient, first_silu):
    return jax.vjp(lambda *args: mix_ffn(*args, first_silu), y, kernel, bias)[1](gradient)
