"""Plain JAX: nine shifted multiply-adds that XLA fuses into one pass, no library convolution.

On a GPU SiLU stands inside each of the nine: XLA then reads y itself and keeps nothing, where a SiLU
before them becomes a float32 array of its own.  On a CPU, where exp is dear, it is computed once.
The backward pass computes all from y again.  Formulas: `__init__.py`.
"""

import functools

import jax
import jax.numpy as jnp

TAPS = [(dy, dx) for dy in range(3) for dx in range(3)]


def activate(y, first_silu):
    y = y.astype(jnp.float32)
    return jax.nn.silu(y) if first_silu else y


def shifts(y, first_silu=False, early=False):
    """For each tap, [b h w c] float32: what it sees from each pixel, zero outside."""
    _, h, w, _ = y.shape
    y = activate(y, first_silu) if early else y
    padded = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [padded[:, dy : dy + h, dx : dx + w] for dy, dx in TAPS]
    return parts if early else [activate(part, first_silu) for part in parts]  # of zero: zero


def weighted(parts, kernel):
    return sum(x * kernel[tap] for x, tap in zip(parts, TAPS))


def slope(x):
    """The derivative of SiLU."""
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


def _forward(y, kernel, bias, *, first_silu, early):
    value, gate = jnp.split(weighted(shifts(y, first_silu, early), kernel) + bias, 2, axis=-1)
    return (value * jax.nn.silu(gate)).astype(y.dtype)


def _backward(y, kernel, bias, gradient, *, first_silu, early):
    gradient = gradient.astype(jnp.float32)
    value, gate = jnp.split(weighted(shifts(y, first_silu, early), kernel) + bias, 2, axis=-1)
    # Rounded to y's dtype, like a gradient that leaves an operation: half the memory between the passes.
    down = jnp.concatenate([gradient * jax.nn.silu(gate), gradient * value * slope(gate)], axis=-1).astype(y.dtype)
    y, down = jax.lax.optimization_barrier((y, down))  # or XLA would keep the nine shifts of y until below
    dx = weighted(shifts(down), kernel[::-1, ::-1])
    dy = dx * slope(y.astype(jnp.float32)) if first_silu else dx
    down = down.astype(jnp.float32)
    dkernel = jnp.stack([jnp.sum(part * down, axis=(0, 1, 2)) for part in shifts(y, first_silu, early)])
    return dy.astype(y.dtype), dkernel.reshape(kernel.shape), jnp.sum(down, axis=(0, 1, 2))


def _by_platform(fn, *args, first_silu):
    cpu, default = (functools.partial(fn, first_silu=first_silu, early=early) for early in (True, False))
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def forward(y, kernel, bias, first_silu):
    return _by_platform(_forward, y, kernel, bias, first_silu=first_silu)


def backward(y, kernel, bias, gradient, first_silu):
    return _by_platform(_backward, y, kernel, bias, gradient, first_silu=first_silu)
