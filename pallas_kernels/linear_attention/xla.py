"""Plain JAX: products with float32 sums, and a backward pass from qkv and the state alone.  Of float64 all
that is float32 here is float64.

Factors keep their dtype: a bfloat16 q is exact in bfloat16, and the float32 state is two bfloat16
numbers, so tensor cores give what a float32 product would, without a float32 copy of q.  XLA cuts them up
inside the product: of several products each would write out a float32 array of its own.
Heads come before tokens, [b k n c], from the start: XLA's products want them so, and would turn each
factor by itself.  Formulas of the gradients: `__init__.py`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# A float32 factor counts as two bfloat16 numbers; the product of two remainders is dropped.  XLA has it for NVIDIA's
# GPUs with tensor cores for bfloat16, sm_80 and later.
IN_PARTS = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3


def widen(x):
    return x.astype(dispatch.wide(x.dtype))


def product(equation, a, b, dtype):
    """einsum of two factors, each of `dtype` or float32, with float32 sums and result."""

    def narrow(a, b):
        if a.dtype == b.dtype == dtype:
            return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
        return jnp.einsum(equation, *(x.astype(jnp.float32) for x in (a, b)), precision=IN_PARTS)

    def wide(a, b):
        precision = None if dtype == jnp.bfloat16 else "highest"  # of what was bfloat16 only CPUs come here
        return jnp.einsum(equation, *(x.astype(dispatch.wide(dtype)) for x in (a, b)), precision=precision)

    if dtype != jnp.bfloat16:  # float16 has not the range for two parts of a sum over tokens
        return wide(a, b)
    # XLA's CPU backend has no narrow product with a wide sum.
    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def turned(x):
    """Between [b n k c] and [b k n c]."""
    return jnp.swapaxes(x, 1, 2)


def widened(norm):
    """rstd [2 b 1 n 1] and scale [2 k 1 c], as they meet [b k n c]."""
    rstd, scale = norm
    return rstd[:, :, None, :, None], scale[:, :, None]


def features(qkv, norm):
    """Queries and keys before ReLU and after, float32 where there is a norm, and values: [b k n c] each."""
    q, k, v = jnp.split(turned(qkv), 3, axis=-1)
    if norm is not None:
        rstd, scale = widened(norm)
        q, k = (widen(x) * rstd[i] * scale[i] for i, x in enumerate((q, k)))
    return (q, k), [jnp.where(x <= 0, 0, x) for x in (q, k)], v


def weights(q, total, eps):
    """The denominators, [b k n 1] float32."""
    return jnp.sum(widen(q) * total[:, :, None], axis=-1, keepdims=True) + eps


def forward(qkv, norm, eps):
    _, (q, k), v = features(qkv, norm)
    state = product("bknc,bkne->bkce", k, v, qkv.dtype)
    total = jnp.sum(widen(k), axis=2)
    out = product("bknc,bkce->bkne", q, state, qkv.dtype) / weights(q, total, eps)
    return turned(out.astype(qkv.dtype)), (state, total)


def backward(qkv, norm, residual, gradient, eps):
    state, total = residual
    before, (q, k), v = features(qkv, norm)
    gradient, weight = turned(gradient), weights(q, total, eps)
    dq = product("bkne,bkce->bknc", gradient, state, qkv.dtype) / weight
    down = -jnp.sum(widen(q) * dq, axis=-1, keepdims=True) / weight
    dq = dq + down * total[:, :, None]
    dstate = product("bknc,bkne->bkce", q, widen(gradient) / weight, qkv.dtype)
    dtotal = jnp.sum(widen(q) * down, axis=2)
    dk = product("bkne,bkce->bknc", v, dstate, qkv.dtype) + dtotal[:, :, None]
    dv = product("bknc,bkce->bkne", k, dstate, qkv.dtype)
    dq, dk = (jnp.where(x <= 0, 0, dx) for x, dx in zip(before, (dq, dk)))
    dnorm = None
    if norm is not None:
        rstd, scale = widened(norm)
        raw = [widen(x) for x in jnp.split(turned(qkv), 3, axis=-1)[:2]]
        dscale = jnp.stack([jnp.sum(dx * x * r, axis=(0, 2)) for dx, x, r in zip((dq, dk), raw, rstd)])
        dq, dk = dq * scale[0], dk * scale[1]
        drstd = jnp.stack([jnp.sum(dx * x, axis=(1, 3)) for dx, x in zip((dq, dk), raw)])
        dq, dk = dq * rstd[0], dk * rstd[1]
        dnorm = drstd, dscale
    return turned(jnp.concatenate([dx.astype(qkv.dtype) for dx in (dq, dk, dv)], axis=-1)), dnorm
