"""Plain JAX: nine shifted multiply-adds that XLA fuses into one pass, no library convolution.

On a GPU SiLU stands inside each of the nine: XLA then reads y itself and keeps nothing, where a SiLU
before them becomes a float32 array of its own.  On a CPU, where exp is dear, it is computed once.
The backward pass computes all from y again.  Formulas: `__init__.py`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.depthwise import convolve, kernel_gradient, kernel_gradient_by_row, turned, widen


def activate(y, first_silu):
    return jax.nn.silu(widen(y)) if first_silu else widen(y)


def split(x, each, kernel, bias):
    """Value and gate, wide."""
    return jnp.split(convolve(x, kernel, each) + bias, 2, axis=-1)


def slope(x):
    """The derivative of SiLU."""
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


def _forward(y, kernel, bias, *, first_silu, early):
    each = functools.partial(activate, first_silu=first_silu)
    value, gate = split(each(y), widen, kernel, bias) if early else split(y, each, kernel, bias)
    return (value * jax.nn.silu(gate)).astype(y.dtype)


def _backward(y, kernel, bias, gradient, *, first_silu, early):
    each = functools.partial(activate, first_silu=first_silu)
    gradient = widen(gradient)
    value, gate = split(each(y), widen, kernel, bias) if early else split(y, each, kernel, bias)
    # Rounded to y's dtype, like a gradient that leaves an operation: half the memory between the passes.
    down = jnp.concatenate([gradient * jax.nn.silu(gate), gradient * value * slope(gate)], axis=-1).astype(y.dtype)
    if not early:
        y, down = jax.lax.optimization_barrier((y, down))  # or XLA would keep the nine shifts of y until below
    dx = convolve(down, turned(kernel))
    dy = dx * slope(widen(y)) if first_silu else dx
    dkernel = kernel_gradient_by_row(each(y), down, 3) if early else kernel_gradient(y, down, 3, each)
    return dy.astype(y.dtype), dkernel, jnp.sum(widen(down), axis=(0, 1, 2))


def _by_platform(fn, *args, first_silu):
    cpu, default = (functools.partial(fn, first_silu=first_silu, early=early) for early in (True, False))
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def forward(y, kernel, bias, first_silu):
    return _by_platform(_forward, y, kernel, bias, first_silu=first_silu)


def backward(y, kernel, bias, gradient, first_silu):
    return _by_platform(_backward, y, kernel, bias, gradient, first_silu=first_silu)
