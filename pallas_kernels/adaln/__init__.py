"""What surrounds the two branches of a SANA block (adaLN, section 4 of https://arxiv.org/abs/2212.09748).

    modulate:   out = x' (1 + scale) + shift,   x' = (x - mean x) r,   r = 1 / sqrt(var x + eps)
    add_gated:  out = x + gate y

with mean and variance over the channels of a token.  Backward, from the gradient g of out, where the
gradient of what serves all tokens of an image is a sum over them:

    modulate:   a = g (1 + scale)     dx = r (a - mean a - x' mean(a x'))
                dshift = sum g        dscale = sum g x'
    add_gated:  dx = g                dy = gate g               dgate = sum g y

What is kept for it is the arguments alone.  A program has the whole row in registers, since it needs all
of it for dx: mean and r cost it no memory traffic, while keeping them would.
Shapes: b images, n tokens, d channels.
"""

import functools
import pathlib

import jax

from pallas_kernels import dispatch, rows
from pallas_kernels.dispatch import Cut, require

FOLDER = pathlib.Path(__file__).parent


def modulate(x, shift, scale, eps=1e-6, implementation="auto", partition=None):
    """LayerNorm without affine parameters of its own, then (1 + scale) and shift.

    Args:
      x: [b, n, d].  Kernels take bfloat16 and float32, and d up to what a tile holds.
      shift, scale: [b, d], or [1, d] for all images; used in float32.
      eps: added to the variance.
      implementation: "auto", or one of dispatch.IMPLEMENTATIONS, which works or raises.
      partition: None, or how a kernel is cut over devices, see dispatch.Cut.
    Returns:
      [b, n, d] in the dtype of x, rounded once.  All sums run in float32, in an order that does not
      change.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    rows.check("modulate", {"x": x}, {"shift": shift, "scale": scale}, lambda b, d: [(b, d), (1, d)])
    require(eps > 0, "modulate", "eps", eps, "a positive number")
    name = choose("modulate", x, implementation)
    shift, scale = (a.astype(dispatch.wide(x.dtype)) for a in (shift, scale))
    return _modulate(x, shift, scale, float(eps), dispatch.How(name, implementation == "auto", partition))


def add_gated(x, gate, y, implementation="auto", partition=None):
    """x + gate * y.

    Args:
      x, y: [b, n, d] of one dtype, as for `modulate`.
      gate: [b, d], or [1, d] for all images; used in float32.
      implementation, partition: as for `modulate`.
    Returns:
      [b, n, d] in the dtype of x, rounded once.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    rows.check("add_gated", {"x": x, "y": y}, {"gate": gate}, lambda b, d: [(b, d), (1, d)])
    name = choose("add_gated", x, implementation)
    gate = gate.astype(dispatch.wide(x.dtype))
    return _add_gated(x, gate, y, dispatch.How(name, implementation == "auto", partition))


def check(op, x):
    """Raises KernelError where no kernel of "modulate" or "add_gated" takes this x."""
    rows.require_for_kernels(op, "x", x, lambda: dispatch.tiles(FOLDER, x.dtype, op))


def choose(op, x, implementation):
    """The name of the implementation to run."""
    b, n, d = x.shape
    sizes = dict(tokens=b * n, b=b, n=n, d=d, gated=int(op == "add_gated"))  # two operations share the rows of "auto"
    return dispatch.choose(op, FOLDER, implementation, x.dtype, sizes, functools.partial(check, op, x))


def _passes(op, how, array, vector, **options):
    """(forward, backward) of an implementation, for arrays and vectors such as these."""
    cuts, names = CUTS[op, vector.shape[0] == array.shape[0]], (f"{op}_forward", f"{op}_backward")
    tiles = functools.partial(dispatch.tiles, FOLDER, array.dtype, op)
    return dispatch.passes(__name__, how, tiles, cuts, names, **options)


# By operation, and whether each image has a row of its own.
CUTS = {
    ("modulate", True): (
        Cut("b n d, b d, b d -> b n d", "b n"),
        Cut("b n d, b d, b n d -> b n d, b d, b d", "b n"),
    ),
    ("modulate", False): (
        Cut("b n d, r d, r d -> b n d", "b n"),
        Cut("b n d, r d, b n d -> b n d, r d, r d", "b n"),
    ),
    ("add_gated", True): (
        Cut("b n d, b d, b n d -> b n d", "b n"),
        Cut("b d, b n d, b n d -> b d, b n d", "b n"),
    ),
    ("add_gated", False): (
        Cut("b n d, r d, b n d -> b n d", "b n"),
        Cut("r d, b n d, b n d -> r d, b n d", "b n"),
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _modulate(x, shift, scale, eps, how):
    return _passes("modulate", how, x, scale, eps=eps)[0](x, shift, scale)


def _modulate_forward(x, shift, scale, eps, how):
    return _modulate(x, shift, scale, eps, how), (x, scale)


def _modulate_backward(eps, how, kept, gradient):
    return _passes("modulate", how, *kept, eps=eps)[1](*kept, gradient)


_modulate.defvjp(_modulate_forward, _modulate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _add_gated(x, gate, y, how):
    return _passes("add_gated", how, x, gate)[0](x, gate, y)


def _add_gated_forward(x, gate, y, how):
    return _add_gated(x, gate, y, how), (gate, y)


def _add_gated_backward(how, kept, gradient):
    gate, y = kept
    return gradient, *_passes("add_gated", how, y, gate)[1](gate, y, gradient)


_add_gated.defvjp(_add_gated_forward, _add_gated_backward)
