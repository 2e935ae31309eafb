"""Plain JAX: products with float32 sums, and a backward pass from qkv and the state alone.

Factors keep their dtype: a bfloat16 q is exact in bfloat16, and the float32 state is two bfloat16
numbers, so tensor cores give what a float32 product would, without a float32 copy of q.
Formulas of the gradients: `__init__.py`.
"""

import jax
import jax.numpy as jnp


def product(equation, a, b, dtype):
    """einsum of two factors, each of `dtype` or float32, with float32 sums and result.

    Where `dtype` is narrow, a float32 factor becomes two of it, and the product of two remainders is
    dropped.
    """

    def parts(x):
        if x.dtype == dtype:
            return [x]
        high = x.astype(dtype)
        return [high, (x - high.astype(jnp.float32)).astype(dtype)]

    def narrow(a, b):
        pairs = [(x, y) for i, x in enumerate(parts(a)) for j, y in enumerate(parts(b)) if i + j < 2]
        return sum(jnp.einsum(equation, *pair, preferred_element_type=jnp.float32) for pair in pairs)

    def wide(a, b):
        return jnp.einsum(equation, *(x.astype(jnp.float32) for x in (a, b)), precision="highest")

    if dtype == jnp.float32:
        return wide(a, b)
    # XLA's CPU backend has no narrow product with a wide sum.
    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def features(qkv, norm):
    """The queries and keys before ReLU and after, float32 where there is a norm, and the values:
    [b n k c] each."""
    q, k, v = jnp.split(qkv, 3, axis=-1)
    if norm is not None:
        rstd, scale = norm
        q, k = (x.astype(jnp.float32) * rstd[i][:, :, None, None] * scale[i] for i, x in enumerate((q, k)))
    return (q, k), [jnp.where(x <= 0, 0, x) for x in (q, k)], v


def weights(q, total, eps):
    """The denominators, [b n k 1] float32."""
    return jnp.sum(q.astype(jnp.float32) * total[:, None], axis=-1, keepdims=True) + eps


def forward(qkv, norm, eps):
    _, (q, k), v = features(qkv, norm)
    state = product("bnkc,bnke->bkce", k, v, qkv.dtype)
    total = jnp.sum(k, axis=1, dtype=jnp.float32)
    out = product("bnkc,bkce->bnke", q, state, qkv.dtype) / weights(q, total, eps)
    return out.astype(qkv.dtype), (state, total)


def backward(qkv, norm, residual, gradient, eps):
    state, total = residual
    before, (q, k), v = features(qkv, norm)
    weight = weights(q, total, eps)
    out = product("bnkc,bkce->bnke", q, state, qkv.dtype) / weight
    down = -jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True) / weight
    dq = product("bnke,bkce->bnkc", gradient, state, qkv.dtype) / weight + down * total[:, None]
    dstate = product("bnkc,bnke->bkce", q, gradient.astype(jnp.float32) / weight, qkv.dtype)
    dtotal = jnp.sum(q.astype(jnp.float32) * down, axis=1)
    dk = product("bnke,bkce->bnkc", v, dstate, qkv.dtype) + dtotal[:, None]
    dv = product("bnkc,bkce->bnke", k, dstate, qkv.dtype)
    dq, dk = (jnp.where(x <= 0, 0, dx) for x, dx in zip(before, (dq, dk)))
    dnorm = None
    if norm is not None:
        rstd, scale = norm
        raw = [x.astype(jnp.float32) for x in jnp.split(qkv, 3, axis=-1)[:2]]
        by_token = [rstd[i][:, :, None, None] for i in range(2)]
        dscale = jnp.stack([jnp.sum(dx * x * r, axis=(0, 1)) for dx, x, r in zip((dq, dk), raw, by_token)])
        dq, dk = dq * scale[0], dk * scale[1]
        drstd = jnp.stack([jnp.sum(dx * x, axis=(2, 3)) for dx, x in zip((dq, dk), raw)])
        dq, dk = dq * by_token[0], dk * by_token[1]
        dnorm = drstd, dscale
    return jnp.concatenate([dx.astype(qkv.dtype) for dx in (dq, dk, dv)], axis=-1), dnorm
