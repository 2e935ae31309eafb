"""Plain JAX, which XLA fuses, and the formulas themselves as functions of rows, see `pallas_kernels.rows`.

The backward pass computes all from the arguments again.
"""

import functools

import jax

from pallas_kernels import rows


def normalised(mean, y, eps):
    """y / sqrt(mean of squares + eps), and the reciprocal root."""
    rstd = jax.lax.rsqrt(mean(y * y) + eps)
    return y * rstd, rstd


def added(mean, x, y, scale, bias, eps, dtype):
    norm = normalised(mean, y, eps)[0] * scale + bias
    return (x + norm.astype(dtype).astype(norm.dtype),)


def added_pull(mean, y, gradient, scale, eps):
    """dy, and the summands of dscale and dbias."""
    y, rstd = normalised(mean, y, eps)
    a = gradient * scale
    return rstd * (a - y * mean(a * y)), gradient * y, gradient


def forward(x, y, scale, bias, eps):
    """x and y [b n d], scale and bias [d] float32 -> [b n d]."""
    fn = functools.partial(added, eps=eps, dtype=x.dtype)
    return rows.plain(fn, [x, y], [scale[None], bias[None]])[0]


def backward(y, scale, gradient, eps):
    """-> dy [b n d], dscale and dbias [d]; dx is the gradient itself."""
    dy, dscale, dbias = rows.plain(functools.partial(added_pull, eps=eps), [y, gradient], [scale[None]])
    return dy, dscale[0], dbias[0]
