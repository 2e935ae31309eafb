"""Plain JAX: nine shifted multiply-adds that XLA fuses into one pass, no library convolution.

On a GPU SiLU stands inside each of the nine: XLA then reads y itself and keeps nothing, where a SiLU
before them becomes a float32 array of its own.  On a CPU, where exp is dear, it is computed once.
The backward pass computes all from y again, on a GPU gates even twice: nothing but the two halves of `down` is
written out, in y's dtype.  Formulas: `__init__.py`.
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


def _forward_early(y, kernel, bias, *, first_silu):
    value, gate = split(activate(y, first_silu), widen, kernel, bias)
    return (value * jax.nn.silu(gate)).astype(y.dtype)


def _forward(y, kernel, bias, *, first_silu):
    value, gate = split(y, functools.partial(activate, first_silu=first_silu), kernel, bias)
    return (value * jax.nn.silu(gate)).astype(y.dtype)


def _down(gradient, value, gate):
    """The gradients of value and gate, float32."""
    gradient = widen(gradient)
    return gradient * jax.nn.silu(gate), gradient * value * slope(gate)


def _dy(y, down, kernel, first_silu):
    dx = convolve(down, turned(kernel))
    return (dx * slope(widen(y)) if first_silu else dx).astype(y.dtype)


# `down` is rounded to y's dtype, like a gradient that leaves an operation: half the memory between the passes.


def _backward_early(y, kernel, bias, gradient, *, first_silu):
    x = activate(y, first_silu)
    down = jnp.concatenate(_down(gradient, *split(x, widen, kernel, bias)), axis=-1).astype(y.dtype)
    dkernel = kernel_gradient_by_row(x, down, 3)
    return _dy(y, down, kernel, first_silu), dkernel, jnp.sum(widen(down), axis=(0, 1, 2))


def _backward(y, kernel, bias, gradient, *, first_silu):
    each, downs = functools.partial(activate, first_silu=first_silu), []
    for i in range(2):  # each half in a pass from y
        down = _down(gradient, *split(y, each, kernel, bias))[i].astype(y.dtype)
        # Or XLA would write out in float32 what the passes share: gates, then the nine shifts of y.
        y, *downs = jax.lax.optimization_barrier((y, *downs, down))
    ys, kernels = (jnp.split(a, 2, axis=-1) for a in (y, kernel))
    dy = [_dy(y, down, kernel, first_silu) for y, down, kernel in zip(ys, downs, kernels)]
    dkernel = [kernel_gradient(y, down, 3, each) for y, down in zip(ys, downs)]
    dbias = [jnp.sum(widen(down), axis=(0, 1, 2)) for down in downs]
    return tuple(jnp.concatenate(halves, axis=-1) for halves in (dy, dkernel, dbias))


def _by_platform(cpu, default, *args, first_silu):
    cpu, default = (functools.partial(fn, first_silu=first_silu) for fn in (cpu, default))
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def forward(y, kernel, bias, first_silu):
    return _by_platform(_forward_early, _forward, y, kernel, bias, first_silu=first_silu)


def backward(y, kernel, bias, gradient, first_silu):
    return _by_platform(_backward_early, _backward, y, kernel, bias, gradient, first_silu=first_silu)
