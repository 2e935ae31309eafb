"""The depthwise convolution has a backward pass of its own; it is that of the plain sum of taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import ops
from sana_jax.errors import InputError


def arrays(size, dtype, bias=True):
    keys = jax.random.split(jax.random.key(size), 4)
    shapes = (2, 5, 4, 6), (size, size, 6), (6,), (2, 5, 4, 6)
    x, kernel, offset, gradient = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes))
    return (x, kernel, offset) if bias else (x, kernel), gradient


def library(x, kernel, bias=0.0):
    conv = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1], precision="highest",
    )  # fmt: skip
    return conv + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_depthwise_conv_and_its_gradients(size, bias):
    arguments, gradient = arrays(size, jnp.float32, bias)
    out, pull = jax.vjp(ops.depthwise_conv, *arguments)
    expected, expected_pull = jax.vjp(library, *arguments)
    for ours, theirs in zip((out, *pull(gradient)), (expected, *expected_pull(gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    flipped = jax.vjp(library, arguments[0], arguments[1][::-1, ::-1], *arguments[2:])[1](gradient)
    assert size == 1 or np.abs(flipped[0] - pull(gradient)[0]).max() > 0.1, "negative control"


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    arguments, gradient = arrays(3, jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in arguments]
    ours = jax.vjp(ops.depthwise_conv, *arguments)[1](gradient)
    theirs = jax.vjp(ops.depthwise_conv, *wide)[1](gradient.astype(jnp.float32))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_the_two_forms_of_the_kernel_gradient_agree():
    """That of the CPU and that of every other platform; the latter runs here nowhere else."""
    (x, _, _), gradient = arrays(5, jnp.float32)
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    one, other = (taps(padded, gradient, 5) for taps in (ops.taps_in_turn, ops.taps_at_once))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 6), (4, 4, 6), (3, 5, 6)])
def test_a_kernel_without_a_centre(shape):
    with pytest.raises(InputError, match="kernel: .* must be .* odd"):
        ops.depthwise_conv(jnp.zeros((1, 4, 4, 6)), jnp.zeros(shape))
