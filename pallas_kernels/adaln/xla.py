"""Plain JAX, which XLA fuses, and the formulas themselves as functions of rows, see `pallas_kernels.rows`.

The backward pass computes all from the arguments again.
"""

import functools

import jax

from pallas_kernels import rows


def normalised(mean, x, eps):
    """(x - mean) / sqrt(var + eps), and the reciprocal root."""
    x = x - mean(x)
    rstd = jax.lax.rsqrt(mean(x * x) + eps)
    return x * rstd, rstd


def modulated(mean, x, shift, scale, eps):
    return (normalised(mean, x, eps)[0] * (1 + scale) + shift,)


def modulated_pull(mean, x, gradient, scale, eps):
    """dx, and the summands of dshift and dscale."""
    x, rstd = normalised(mean, x, eps)
    a = gradient * (1 + scale)
    return rstd * (a - mean(a) - x * mean(a * x)), gradient, gradient * x


def gated(mean, x, y, gate):
    return (x + gate * y,)


def gated_pull(mean, y, gradient, gate):
    """dy, and the summand of dgate."""
    return gate * gradient, gradient * y


def modulate_forward(x, shift, scale, eps):
    """x [b n d], shift and scale [b or 1, d] float32 -> [b n d]."""
    return rows.plain(functools.partial(modulated, eps=eps), [x], [shift, scale])[0]


def modulate_backward(x, scale, gradient, eps):
    """-> dx [b n d], dshift and dscale as scale."""
    return rows.plain(functools.partial(modulated_pull, eps=eps), [x, gradient], [scale])


def add_gated_forward(x, gate, y):
    """x and y [b n d], gate [b or 1, d] float32 -> [b n d]."""
    return rows.plain(gated, [x, y], [gate])[0]


def add_gated_backward(gate, y, gradient):
    """-> dgate as gate, dy [b n d]; dx is the gradient itself."""
    dy, dgate = rows.plain(gated_pull, [y, gradient], [gate])
    return dgate, dy
