"""The middle of Mix-FFN, between its two products (GLUMBConv, section 2.2 of https://arxiv.org/abs/2410.10629).

    x = silu(y)                          or y, where the first SiLU has been applied
    [value, gate] = depthwise_3x3(x) + bias,   zero outside the image
    out = value * silu(gate)

Backward, from the gradient g of out, with silu'(t) = s (1 + t (1 - s)), s = sigmoid(t):

    down    = [g * silu(gate), g * value * silu'(gate)]        rounded to y's dtype, the one intermediate
    dy      = silu'(y) * depthwise_3x3(down, kernel turned by 180 degrees)
    dkernel = for each tap, sum over pixels of x, shifted, * down;    dbias = sum over pixels of down

What is kept for it is y: value and gate are computed again.
Shapes: b images, h w grid, 2c channels of y, of which the first c are the value's.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import MAX_GRID, Cut, require
from pallas_kernels.mix_ffn import pallas_triton

OP = "mix_ffn"
FOLDER = pathlib.Path(__file__).parent
WIDTH = "any"  # one row of tiles for all numbers of channels


def mix_ffn(y, kernel, bias, first_silu=True, implementation="auto", partition=None):
    """The middle of Mix-FFN.

    Args:
      y: [b, h, w, 2 * c].  Kernels take bfloat16 and float32, and any h, w and c.
      kernel: [3, 3, 2 * c], of the depthwise convolution; used in float32.
      bias: [2 * c], likewise.
      first_silu: whether the SiLU before the convolution is part of it.
      implementation: "auto", or one of dispatch.IMPLEMENTATIONS, which works or raises.
      partition: None, or how a kernel is cut over devices, see dispatch.Cut.
    Returns:
      [b, h, w, c] in the dtype of y, rounded once.  All sums run in float32, in an order that does
      not change.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    require(jnp.ndim(y) == 4, OP, "y.shape", jnp.shape(y), "[b, h, w, 2 * c]")
    for what, array in {"y": y, "kernel": kernel, "bias": bias}.items():
        dispatch.require_float(OP, what, array)
    require(0 not in y.shape, OP, "y.shape", y.shape, "without an empty axis")
    require(y.shape[-1] % 2 == 0, OP, "y.shape", y.shape, "[b, h, w, 2 * c]: an even last axis")
    width = y.shape[-1]
    require(jnp.shape(kernel) == (3, 3, width), OP, "kernel.shape", jnp.shape(kernel), f"{(3, 3, width)}")
    require(jnp.shape(bias) == (width,), OP, "bias.shape", jnp.shape(bias), f"{(width,)}")
    b, h, w, _ = y.shape
    sizes = dict(tokens=b * h * w, b=b, h=h, w=w, c=width // 2, first_silu=int(first_silu))
    name = dispatch.choose(OP, FOLDER, implementation, y.dtype, sizes, functools.partial(check, y))
    kernel, bias = (a.astype(dispatch.wide(y.dtype)) for a in (kernel, bias))
    how = dispatch.How(name, implementation == "auto", partition)
    return _mix_ffn(y, kernel, bias, bool(first_silu), how)


def check(y):
    """Raises KernelError where no kernel takes this y."""
    dispatch.require_for_kernels(OP, "y", y)
    h, w = y.shape[1:3]
    most = max(pallas_triton.blocks_of(h, w, tile) for tile in dispatch.tiles(FOLDER, y.dtype, WIDTH).values())
    require(most <= MAX_GRID, OP, "h, w", (h, w), f"cut into at most {MAX_GRID} blocks for a kernel, not {most}")


# Of forward and backward; p: values and gates.  Both of a channel are on one device, so pairs stay together.
CUTS = (
    Cut("b h w p c, y x p c, p c -> b h w c", "b c"),
    Cut("b h w p c, y x p c, p c, b h w c -> b h w p c, y x p c, p c", "b c"),
)


def in_pairs(a):
    """[.. 2*c] -> [.. 2 c]."""
    return a.reshape(*a.shape[:-1], 2, -1)


def in_a_row(a):
    """[.. 2 c] -> [.. 2*c]."""
    return a.reshape(*a.shape[:-2], -1)


def _passes(how, y, first_silu):
    """(forward, backward) of an implementation."""
    tiles = functools.partial(dispatch.tiles, FOLDER, y.dtype, WIDTH)

    def of_pairs(fn, cut):
        """Cut where values and gates have an axis of their own; `fn` has them in a row."""

        def paired(*args):
            out = fn(*map(in_a_row, args[:3]), *args[3:])
            return tuple(map(in_pairs, out)) if args[3:] else out

        def run(*args):
            out = how.partition(paired, cut)(*map(in_pairs, args[:3]), *args[3:])
            return tuple(map(in_a_row, out)) if args[3:] else out

        return run

    paired = how._replace(partition=how.partition and of_pairs)
    return dispatch.passes(__name__, paired, tiles, CUTS, first_silu=first_silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mix_ffn(y, kernel, bias, first_silu, how):
    return _passes(how, y, first_silu)[0](y, kernel, bias)


def _forward(y, kernel, bias, first_silu, how):
    return _mix_ffn(y, kernel, bias, first_silu, how), (y, kernel, bias)


def _backward(first_silu, how, kept, gradient):
    return _passes(how, kept[0], first_silu)[1](*kept, gradient)


_mix_ffn.defvjp(_forward, _backward)
