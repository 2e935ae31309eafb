"""Depthwise convolution, stride 1, zero outside the image, in plain JAX: shifted multiply-adds that XLA
fuses into one pass.  The library's grouped convolution is 13 to 40 times slower on a CPU.

Shapes: b images, h w grid, c channels, a kernel of size x size taps, size odd.  Sums run in float32, and
in float64 of float64: "wide" below.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import require

OP = "depthwise_conv"


def widen(x):
    return x.astype(dispatch.wide(x.dtype))


def pad(x, size):
    """[b h w c] -> [b h + size - 1 w + size - 1 c], in x's dtype."""
    edge = (size // 2, size // 2)
    return jnp.pad(x, ((0, 0), edge, edge, (0, 0)))


def windows(padded, size):
    """For each tap, row by row, [b h w c]: what it sees from each pixel."""
    h, w = (n - size + 1 for n in padded.shape[1:3])
    return [padded[:, dy : dy + h, dx : dx + w] for dy in range(size) for dx in range(size)]


def convolve(x, kernel, each=widen):
    """x [b h w c], kernel [size size c] wide -> [b h w c] wide.

    `each` widens what a tap sees, and zero of zero: an activation in it is computed again for
    every tap, and keeps XLA from writing out what it makes.
    """
    taps = kernel.reshape(-1, kernel.shape[-1])
    first, *rest = (each(part) * tap for part, tap in zip(windows(pad(x, len(kernel)), len(kernel)), taps))
    return sum(rest, first)


def turned(kernel):
    """By 180 degrees: the convolution with it is the gradient of the convolution with `kernel`."""
    return kernel[::-1, ::-1]


def kernel_gradient(x, gradient, size, each=widen):
    """x, gradient [b h w c] -> [size size c]: for each tap the sum of what it saw times the gradient, all in
    one pass over memory."""
    gradient = widen(gradient)
    sums = [jnp.sum(each(part) * gradient, axis=(0, 1, 2)) for part in windows(pad(x, size), size)]
    return jnp.stack(sums).reshape(size, size, -1)


def kernel_gradient_by_row(x, gradient, size):
    """The same, one row of all images after the other, with a sum for each tap, image and column.  All at
    once XLA makes scalar code of on a CPU: two to seven times as slow.  (Rows of single images were another
    third faster, but cut an axis that may lie on several devices.)"""
    b, h, w, c = gradient.shape
    padded = widen(pad(x, size))

    def row(sums, i):
        seen = windows(jax.lax.dynamic_slice(padded, (0, i, 0, 0), (b, size, w + size - 1, c)), size)
        down = widen(jax.lax.dynamic_slice(gradient, (0, i, 0, 0), (b, 1, w, c)))
        return [total + part * down for total, part in zip(sums, seen)], None

    sums, _ = jax.lax.scan(row, [jnp.zeros((b, 1, w, c), padded.dtype)] * size**2, jnp.arange(h))
    return jnp.stack([total.sum(axis=(0, 1, 2)) for total in sums]).reshape(size, size, c)


@jax.custom_vjp
def depthwise_conv(x, kernel, bias=None):
    """The convolution as an operation of its own, which keeps its arguments alone for the backward pass.

    Args:
      x: [b, h, w, c].
      kernel: [size, size, c].
      bias: [c] or None.
    Returns:
      [b, h, w, c] in the dtype of x, rounded once.  There is no forward mode (jvp).
    Raises:
      KernelError: a kernel that is not square or of an even side, which has no centre; arrays of other
        shapes or no float type.
    """
    arrays = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    for name, array in arrays.items():
        dispatch.require_float(OP, name, array)
    require(jnp.ndim(x) == 4, OP, "x.shape", jnp.shape(x), "[b, h, w, c]")
    require(0 not in x.shape, OP, "x.shape", x.shape, "without an empty axis")
    c, shape = x.shape[-1], jnp.shape(kernel)
    square = len(shape) == 3 and shape[0] == shape[1] and shape[0] % 2 == 1
    require(square, OP, "kernel.shape", shape, "[k, k, c] with an odd k")
    require(shape[2] == c, OP, "kernel.shape", shape, f"[k, k, c], c that of x, {c}")
    if bias is not None:
        require(bias.shape == (c,), OP, "bias.shape", bias.shape, f"{(c,)}")
    wide = dispatch.wide(x.dtype)
    out = convolve(x, kernel.astype(wide))
    return (out if bias is None else out + bias.astype(wide)).astype(x.dtype)


def _backward(arguments, gradient):
    x, kernel, bias = arguments
    dx = convolve(gradient, turned(kernel.astype(dispatch.wide(x.dtype)))).astype(x.dtype)
    forms = (lambda *a, form=form: form(*a, len(kernel)) for form in (kernel_gradient_by_row, kernel_gradient))
    dkernel = jax.lax.platform_dependent(x, gradient, **dict(zip(("cpu", "default"), forms)))
    dbias = None if bias is None else jnp.sum(widen(gradient), axis=(0, 1, 2)).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


depthwise_conv.defvjp(lambda *arguments: (depthwise_conv(*arguments), arguments), _backward)
