"""ReLU linear attention, equation (1) of SANA (https://arxiv.org/abs/2410.10629).

    out_n = q_n S / w_n,   w_n = q_n . z + eps,   S = sum_n k_n^T v_n,   z = sum_n k_n

with q and k after ReLU, and before it, where a norm is given (SANA-1.5), after an RMS normalisation
over all heads and channels of a token.  Backward, from the gradient g of out:

    dw_n = -(g_n . out_n) / w_n         dq_n = g_n S^T / w_n + dw_n z
    dS   = sum_n q_n^T g_n / w_n        dk_n = v_n dS^T + dz
    dz   = sum_n dw_n q_n               dv_n = k_n dS

What is kept for it is qkv, S and z: out is computed again from them, in registers.
Shapes: b images, n tokens, k heads, c channels of a head.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import KernelError, listed, require
from pallas_kernels.linear_attention import pallas_triton, reference, xla

OP = "linear_attention"
FOLDER = pathlib.Path(__file__).parent
DTYPES = ("bfloat16", "float32")
# Channels of a head: tensor cores have no product of fewer than 16, and a state of 64 x 64 in dq takes
# more registers than an A100 has for a thread.
HEADS = (16, 32)
MAX_GRID = 65535  # CUDA's second and third axis


def linear_attention(qkv, eps, norm_scale=None, norm_eps=1e-5, implementation="auto"):
    """ReLU linear attention.

    Args:
      qkv: [b, n, k, 3 * c], for each head its query, key and value side by side, as a dense layer
        emits them.  Kernels take bfloat16 and float32 and c in HEADS; "xla" and "reference" any c.
      eps: added to the denominator.
      norm_scale: None, or the scales of the RMS normalisation of queries and keys, [2, k, c].
      norm_eps: of that normalisation.
      implementation: "auto", or one of dispatch.IMPLEMENTATIONS, which works or raises.
    Returns:
      [b, n, k, c] in the dtype of qkv.  All sums run in float32, in an order that does not change.
    Raises:
      KernelError: an argument that the implementation cannot take.
    """
    require(jnp.ndim(qkv) == 4, OP, "qkv.shape", jnp.shape(qkv), "[b, n, k, 3 * c]")
    require(jnp.issubdtype(qkv.dtype, jnp.floating), OP, "qkv.dtype", qkv.dtype, "a float type")
    require(0 not in qkv.shape, OP, "qkv.shape", qkv.shape, "without an empty axis")
    require(qkv.shape[-1] % 3 == 0, OP, "qkv.shape", qkv.shape, "[b, n, k, 3 * c]: the last axis divisible by 3")
    require(eps > 0, OP, "eps", eps, "a positive number")
    b, n, k, c = *qkv.shape[:3], qkv.shape[3] // 3
    norm = None
    if norm_scale is not None:
        shape = jnp.shape(norm_scale)
        require(shape == (2, k, c), OP, "norm_scale.shape", shape, f"[2, k, c], here {(2, k, c)}")
        norm = reciprocal_rms(qkv, norm_eps), norm_scale.astype(dispatch.wide(qkv.dtype))
    name = dispatch.choose(OP, FOLDER, implementation, qkv.dtype, dict(b=b, n=n, k=k, c=c), obstacle(qkv))
    return _linear_attention(qkv, norm, float(eps), name)


def obstacle(qkv):
    """The KernelError that says why no kernel takes this qkv, or None."""
    b, n, _, width = qkv.shape
    try:
        require(str(qkv.dtype) in DTYPES, OP, "qkv.dtype", qkv.dtype, f"{listed(DTYPES)} for a kernel")
        require(width // 3 in HEADS, OP, "c", width // 3, f"{listed(HEADS)} for a kernel")
        limit = f"at most {dispatch.MAX_ELEMENTS} for a kernel, whose offsets are int32 (here n={n})"
        require(qkv.size <= dispatch.MAX_ELEMENTS, OP, "qkv.size", qkv.size, limit)
        smallest = min(tile["rows"] for tile in dispatch.tiles(FOLDER, qkv.dtype, width // 3).values())
        require(n <= MAX_GRID * smallest, OP, "n", n, f"at most {MAX_GRID * smallest} for a kernel")
        require(b <= MAX_GRID, OP, "b", b, f"at most {MAX_GRID} for a kernel")
    except KernelError as error:
        return error


@functools.partial(jax.checkpoint, static_argnums=1)  # or its backward pass would keep qkv in float32
def reciprocal_rms(qkv, eps):
    """[2 b n]: 1 / sqrt(mean of squares over heads and channels + eps) of queries and of keys."""
    q, k, _ = jnp.split(qkv.astype(dispatch.wide(qkv.dtype)), 3, axis=-1)
    return jnp.stack([jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3)) + eps) for x in (q, k)])


def _passes(name, qkv):
    """(forward, backward) of an implementation."""
    if name in ("reference", "xla"):
        module = {"reference": reference, "xla": xla}[name]
        return module.forward, module.backward
    options = {"tiles": dispatch.tiles(FOLDER, qkv.dtype, qkv.shape[-1] // 3)}
    if name == "jax_triton":
        from pallas_kernels.linear_attention import jax_triton as module
    else:
        module, options["interpret"] = pallas_triton, name == "pallas_interpret"
    return functools.partial(module.forward, **options), functools.partial(module.backward, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear_attention(qkv, norm, eps, name):
    return _passes(name, qkv)[0](qkv, norm, eps)[0]


def _forward(qkv, norm, eps, name):
    out, state = _passes(name, qkv)[0](qkv, norm, eps)
    return out, (qkv, norm, state)


def _backward(eps, name, kept, gradient):
    qkv, norm, state = kept
    return _passes(name, qkv)[1](qkv, norm, state, gradient, eps)


_linear_attention.defvjp(_forward, _backward)
