"""The end of a branch of the DC-AE (`trms2d`, docs/numerics.md 1.9): RMS normalisation, then the residual.

    out = x + (y' scale + bias),   y' = y r,   r = 1 / sqrt(mean(y^2) + eps)

with the mean over the channels of a token.  The branch rounds to its dtype, then the sum does.  Backward,
from the gradient g of out, with sums over all tokens:

    dx = g          a  = g scale                     dscale = sum g y'
                    dy = r (a - y' mean(a y'))       dbias  = sum g

What is kept for it is y and scale.  A program has the whole row in registers, since it needs all of it
for dy: r costs it no memory traffic, while keeping it would.
Shapes: b images, n tokens, d channels.
"""

import functools
import pathlib

import jax

from pallas_kernels import dispatch, rows
from pallas_kernels.dispatch import Cut, require

OP = "add_rms_norm"
FOLDER = pathlib.Path(__file__).parent
WIDTH = "any"  # one row of tiles for all numbers of channels
CUTS = (
    Cut("b n d, b n d, d, d -> b n d", "b n"),
    Cut("b n d, d, b n d -> b n d, d, d", "b n"),
)


def add_rms_norm(x, y, scale, bias, eps=1e-5, implementation="auto", partition=None):
    """x + RMS normalisation of y.

    Args:
      x, y: [b, n, d] of one dtype.  Kernels take bfloat16 and float32, and d up to what a tile holds.
      scale, bias: [d]; used in float32.
      eps: added to the mean of squares.
      implementation: "auto", or one of dispatch.IMPLEMENTATIONS, which works or raises.
      partition: None, or how a kernel is cut over devices, see dispatch.Cut.
    Returns:
      [b, n, d] in the dtype of x.  All sums run in float32, in an order that does not change.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    rows.check(OP, {"x": x, "y": y}, {"scale": scale, "bias": bias}, lambda b, d: [(d,)])
    require(eps > 0, OP, "eps", eps, "a positive number")
    b, n, d = x.shape
    sizes = dict(tokens=b * n, b=b, n=n, d=d)
    name = dispatch.choose(OP, FOLDER, implementation, x.dtype, sizes, functools.partial(check, x))
    scale, bias = (a.astype(dispatch.wide(x.dtype)) for a in (scale, bias))
    return _add_rms_norm(x, y, scale, bias, float(eps), dispatch.How(name, implementation == "auto", partition))


def check(x):
    """Raises KernelError where no kernel takes this x."""
    rows.require_for_kernels(OP, "x", x, lambda: dispatch.tiles(FOLDER, x.dtype, WIDTH))


def _passes(how, x, eps):
    """(forward, backward) of an implementation."""
    tiles = functools.partial(dispatch.tiles, FOLDER, x.dtype, WIDTH)
    return dispatch.passes(__name__, how, tiles, CUTS, eps=eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _add_rms_norm(x, y, scale, bias, eps, how):
    return _passes(how, x, eps)[0](x, y, scale, bias)


def _forward(x, y, scale, bias, eps, how):
    return _add_rms_norm(x, y, scale, bias, eps, how), (y, scale)


def _backward(eps, how, kept, gradient):
    return gradient, *_passes(how, kept[0], eps)[1](*kept, gradient)


_add_rms_norm.defvjp(_forward, _backward)
