"""ReLU linear attention, equation (1) of SANA (https://arxiv.org/abs/2410.10629).

    out_n = q_n S / w_n,   w_n = q_n . z + eps,   S = sum_n k_n^T v_n,   z = sum_n k_n

with q and k after ReLU, and before it, where a norm is given (SANA-1.5), after an RMS normalisation
over all heads and channels of a token.  Backward, from the gradient g of out:

    r_n  = g_n S^T / w_n                dq_n = r_n + dw_n z
    dw_n = -(q_n . r_n) / w_n           dk_n = v_n dS^T + dz
    dS   = sum_n q_n^T g_n / w_n        dv_n = k_n dS
    dz   = sum_n dw_n q_n

What is kept for it is qkv, S and z: out is not needed, since g_n . out_n = q_n . r_n.
Shapes: b images, n tokens, k heads, c channels of a head.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import MAX_GRID, Cut, listed, require

OP = "linear_attention"
FOLDER = pathlib.Path(__file__).parent
# Channels of a head: tensor cores have no product of fewer than 16, and of 128 `dkv` needs more registers
# than a thread has, in every tile of 16 or 32 tokens and 8 or 16 warps (from 36 bytes spilled on an A100).
HEADS = (16, 32, 64)
NORMED_HEADS = (16, 32)  # with a norm: `dq` of 64 spills 28 to 1260 bytes on an A100 or L4 in every tile tried


def linear_attention(qkv, eps, norm_scale=None, norm_eps=1e-5, implementation="auto", partition=None):
    """ReLU linear attention.

    Args:
      qkv: [b, n, k, 3 * c], for each head its query, key and value side by side, as a dense layer
        emits them.  Kernels take bfloat16 and float32 and c in HEADS, with a norm in NORMED_HEADS; "xla"
        and "reference" take any.
      eps: added to the denominator.
      norm_scale: None, or the scales of the RMS normalisation of queries and keys, [2, k, c].
      norm_eps: of that normalisation.
      implementation: "auto", or one of dispatch.IMPLEMENTATIONS, which works or raises.
      partition: None, or how a kernel is cut over devices, see dispatch.Cut.
    Returns:
      [b, n, k, c] in the dtype of qkv.  All sums run in float32, in an order that does not change.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    require(jnp.ndim(qkv) == 4, OP, "qkv.shape", jnp.shape(qkv), "[b, n, k, 3 * c]")
    dispatch.require_float(OP, "qkv", qkv)
    require(0 not in qkv.shape, OP, "qkv.shape", qkv.shape, "without an empty axis")
    require(qkv.shape[-1] % 3 == 0, OP, "qkv.shape", qkv.shape, "[b, n, k, 3 * c]: the last axis divisible by 3")
    require(eps > 0, OP, "eps", eps, "a positive number")
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    norm = None
    if norm_scale is not None:
        shape = jnp.shape(norm_scale)
        require(shape == (2, k, c), OP, "norm_scale.shape", shape, f"[2, k, c], here {(2, k, c)}")
        dispatch.require_float(OP, "norm_scale", norm_scale)
        require(norm_eps > 0, OP, "norm_eps", norm_eps, "a positive number")
        norm = reciprocal_rms(qkv, norm_eps), norm_scale.astype(dispatch.wide(qkv.dtype))
    sizes = dict(tokens=b * n, b=b, n=n, k=k, c=c)
    name = dispatch.choose(OP, FOLDER, implementation, qkv.dtype, sizes, functools.partial(check, qkv, norm))
    how = dispatch.How(name, implementation == "auto", partition)
    return _linear_attention(qkv, norm, float(eps), how)


def check(qkv, norm):
    """Raises KernelError where no kernel takes this qkv with this norm."""
    dispatch.require_for_kernels(OP, "qkv", qkv)
    n, c = qkv.shape[1], qkv.shape[3] // 3
    heads, which = (HEADS, "a kernel") if norm is None else (NORMED_HEADS, "a kernel with a norm")
    require(c in heads, OP, "c", c, f"{listed(heads)} for {which}")
    most = MAX_GRID * min(tile["rows"] for tile in dispatch.tiles(FOLDER, qkv.dtype, c).values())
    require(n <= most, OP, "n", n, f"at most {most} for a kernel")


@functools.partial(jax.checkpoint, static_argnums=1)  # or its backward pass would keep qkv in float32
def reciprocal_rms(qkv, eps):
    """[2 b n]: 1 / sqrt(mean of squares over heads and channels + eps) of queries and of keys."""
    q, k, _ = jnp.split(qkv.astype(dispatch.wide(qkv.dtype)), 3, axis=-1)
    return jnp.stack([jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3)) + eps) for x in (q, k)])


def _cuts(normed):
    """Of forward and backward.  Sums over tokens end inside a pass, so tokens stay together."""
    norm, state = ", r b n, r k c" * normed, ", b k c e, b k c"
    return (
        Cut(f"b n k m{norm} -> b n k c{state}", "b k"),
        Cut(f"b n k m{norm}{state}, b n k c -> b n k m{norm}", "b k"),
    )


def _passes(how, qkv, norm, eps):
    """(forward, backward) of an implementation."""
    tiles = functools.partial(dispatch.tiles, FOLDER, qkv.dtype, qkv.shape[-1] // 3)
    return dispatch.passes(__name__, how, tiles, _cuts(norm is not None), eps=eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_attention(qkv, norm, eps, how):
    return _forward(qkv, norm, eps, how)[0]


def _forward(qkv, norm, eps, how):
    out, state = _passes(how, qkv, norm, eps)[0](qkv, norm)
    return out, (qkv, norm, state)


def _backward(eps, how, kept, gradient):
    qkv, norm, state = kept
    return _passes(how, qkv, norm, eps)[1](qkv, norm, state, gradient)


_linear_attention.defvjp(_forward, _backward)
