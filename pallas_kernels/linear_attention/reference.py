"""The specification: the formula of the operation in float32 (float64 if the arguments are)."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def linear_attention(qkv, norm, eps):
    """qkv [b n k 3c], norm None or (rstd [2 b n], scale [2 k c]) -> [b n k c] in qkv's dtype."""
    wide = dispatch.wide(qkv.dtype)
    q, k, v = jnp.split(qkv.astype(wide), 3, axis=-1)
    if norm is not None:
        rstd, scale = (a.astype(wide) for a in norm)
        q, k = (x * rstd[i][:, :, None, None] * scale[i] for i, x in enumerate((q, k)))
    q, k = (jnp.where(x <= 0, 0, x) for x in (q, k))
    with jax.default_matmul_precision("highest"):
        state = jnp.einsum("bnkc,bnke->bkce", k, v)
        weight = jnp.einsum("bnkc,bkc->bnk", q, k.sum(axis=1))
        out = jnp.einsum("bnkc,bkce->bnke", q, state) / (weight[..., None] + eps)
    return out.astype(qkv.dtype)


def forward(qkv, norm, eps):
    return linear_attention(qkv, norm, eps), None


def backward(qkv, norm, state, gradient, eps):
    return jax.vjp(lambda qkv, norm: linear_attention(qkv, norm, eps), qkv, norm)[1](gradient)
