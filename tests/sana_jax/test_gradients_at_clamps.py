"""Gradients where a function bends: what torch's autograd says there, and nothing that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import ops
from sana_jax.models.sana import FLOAT16_MAX, HIDDEN_TOKEN

B, N, HEADS, C = 2, 6, 2, 4


def edges():
    """qkv [b n k 3c] with exact zeros, a query and a head's keys all below 0, and tiny positive queries."""
    qkv = np.random.default_rng(0).normal(size=(B, N, HEADS, 3 * C)).astype(np.float32)
    qkv[0, 0, 0, :C] = 0
    qkv[0, 1, 0, :C] = -1
    qkv[0, 2, 1, C : 2 * C] = 0
    qkv[1, :, 1, C : 2 * C] = -1  # no key at all: 0 / (0 + eps)
    qkv[1, 3, 0, :C] = 1e-6
    return qkv


def weights():
    return np.random.default_rng(1).normal(size=(B, N, HEADS, C)).astype(np.float32)


def gradient(eps):
    return jax.jit(jax.grad(lambda x: jnp.sum(ops.relu_linear_attention(x, eps) * weights())))(edges())


@pytest.mark.parity
@pytest.mark.parametrize("eps", [1e-15, 1e-8])
def test_linear_attention(eps):
    import torch

    x = torch.tensor(edges(), dtype=torch.float64).requires_grad_(True)
    q, k, v = x.chunk(3, dim=-1)
    q, k = q.relu(), k.relu()
    out = torch.einsum("bnhc,bmhc,bmhe->bnhe", q, k, v)
    out = out / (torch.einsum("bnhc,bmhc->bnh", q, k)[..., None] + eps)
    (out * torch.tensor(weights())).sum().backward()
    expected, found = x.grad.numpy(), gradient(eps)
    assert np.isfinite(found).all()
    scale = np.abs(expected).max(axis=-1, keepdims=True) + 1  # a tiny query has a derivative of 1e6
    assert np.abs((found - expected) / scale).max() <= 5e-6
    assert not np.any(found[0, 0, 0, :C]) and not np.any(found[1, :, 1])  # as relu'(0) = 0 has it


def test_a_nan_reaches_its_gradient():
    """A network that is broken must not look healthy: the step that follows is skipped by this NaN."""
    qkv = edges()
    qkv[0, 4, 1, 0] = np.nan
    grad = jax.grad(lambda x: jnp.sum(ops.relu_linear_attention(x, 1e-15) * weights()))(qkv)
    assert np.isnan(grad[0]).any() and np.isfinite(grad[1]).all()


@pytest.mark.parity
def test_clip_of_the_attention_output():
    """Beyond +-65504 no gradient, within all of it."""
    import torch

    values = np.float32([0, 1, 65503, -65503, 65505, -65505, 1e30, np.inf, -np.inf])
    x = torch.tensor(values).requires_grad_(True)
    x.clip(-FLOAT16_MAX, FLOAT16_MAX).sum().backward()
    found = jax.grad(lambda x: jnp.sum(jnp.clip(x, -FLOAT16_MAX, FLOAT16_MAX)))(values)
    np.testing.assert_array_equal(found, x.grad.numpy())


def test_cross_attention_of_hidden_tokens():
    """A hidden token has gradient 0; a row that hides them all attends as if it hid none."""
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(2, 3, 2, 4)).astype("f"), rng.normal(size=(2, 5, 2, 8)).astype("f")
    mask = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    bias = np.where(mask, 0, HIDDEN_TOKEN).astype("f")
    dq, dkv = jax.grad(lambda q, kv: jnp.sum(ops.cross_attention(q, kv, bias) ** 2), argnums=(0, 1))(q, kv)
    assert np.isfinite(dq).all() and np.isfinite(dkv).all()
    assert not np.any(dkv[0, 2:]) and np.abs(dkv[0, :2]).min() > 0
    plain, hidden = (ops.cross_attention(q, kv, b)[1] for b in (0 * bias, bias))
    np.testing.assert_allclose(hidden, plain, atol=2e-3)  # logits of -10000 have steps of 1e-3
