"""Gemma 2, the text encoder of SANA (https://arxiv.org/abs/2408.00118), without its output head.

    h_0 = sqrt(width) E[ids]
    h <- h + norm(attention(norm(h)));  h <- h + norm(mlp(norm(h)))      (each layer, four norms)
    states = norm(h)

Shapes: b batch, m tokens, p tokens of a prefix, n = p + m keys, d width, k query heads, g key and
value heads, r = k / g, c channels of a head.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import ops
from sana_jax.models.layers import by_rows, rms_norm

HIDDEN_LOGIT = -1e30  # finite: a query that sees nothing averages everything, as the peers' does


class Prefix(NamedTuple):
    """The first p tokens of a text, encoded once and reused by every text that starts with them."""

    states: jax.Array  # [b p d], after the final norm
    keys: jax.Array  # [layers b p g c], rotated
    values: jax.Array  # [layers b p g c]


def rotary_table(positions, channels, theta, dtype):
    """cos and sin of position / theta^(2i / c), [m c/2] each: float32 angles, rounded at the end.

    The power in float64 and every other step in float32 gives torch's own frequencies, whose last
    bit is worth 5e-5 of an angle at position 800.
    """
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    frequency = np.float32(1) / (np.float64(theta) ** exponent).astype(np.float32)
    angle = positions.astype(jnp.float32)[:, None] * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x, table):
    """Rotary embedding on [b m heads c]; channel i is paired with channel i + c/2."""
    cos, sin = (t[:, None, :] for t in table)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def soft_cap(logits, cap):
    """cap * tanh(logits / cap): the identity near 0, never beyond +-cap.  None: no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attention(q, k, v, visible, scale, cap):
    """Grouped-query attention; key head j serves the query heads j r .. j r + r - 1.

    Args:
      q: [b m k c];  k, v: [b n g c].
      visible: [b m n], which keys a query sees.
    Returns:
      [b m k c] in the dtype of q; logits and softmax are float32.
    """
    b, m, heads, c = q.shape
    q = q.reshape(b, m, k.shape[2], -1, c)
    logits = ops.einsum32("bmgrc,bngc->bgrmn", q, k)
    logits = soft_cap(logits * scale, cap)
    logits = jnp.where(visible[:, None, None], logits, HIDDEN_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrmn,bngc->bmgrc", weights, v).reshape(b, m, heads, c)


def append(old, new):
    """[b p g c] and [b m g c] -> [b p+m g c]; one prefix serves a whole batch."""
    old = jnp.broadcast_to(old, (new.shape[0], *old.shape[1:]))
    return jnp.concatenate([old.astype(new.dtype), new], axis=1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + w), in float32, rounded once.  `scale` holds w as stored."""

    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return by_rows(rms_norm(x, 1.0 + scale.astype(jnp.float32), self.eps))


class Block(nn.Module):
    """One layer; `own` is its keys and values if `keep`, else None."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rms_eps: float
    query_scale: int
    attention_softcap: float | None
    keep: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, h, window, prefix, table, distance, valid):
        norm = functools.partial(RMSNorm, self.rms_eps, self.param_dtype)
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        b, m, d = h.shape

        x = norm(name="attention_norm")(h)
        q = dense(self.heads * self.head_dim, name="query")(x).reshape(b, m, self.heads, -1)
        k = dense(self.kv_heads * self.head_dim, name="key")(x).reshape(b, m, self.kv_heads, -1)
        v = dense(self.kv_heads * self.head_dim, name="value")(x).reshape(b, m, self.kv_heads, -1)
        q, k = rotate(q, table), rotate(k, table)
        own = (k, v) if self.keep else None
        if prefix is not None:
            k, v = append(prefix[0], k), append(prefix[1], v)
        # A query sees itself and the tokens before it, window - 1 of them, but no padding.
        visible = (distance >= 0) & (distance < window) & valid[:, None, :]
        x = attention(q, k, v, visible, self.query_scale**-0.5, self.attention_softcap)
        x = dense(d, name="out")(x.reshape(b, m, -1))
        h = by_rows(h + norm(name="post_attention_norm")(x))

        x = norm(name="mlp_norm")(h)
        gate, up = dense(self.hidden, name="gate")(x), dense(self.hidden, name="up")(x)
        x = nn.gelu(gate.astype(jnp.float32), approximate=True) * up.astype(jnp.float32)
        x = dense(d, name="down")(x.astype(up.dtype))
        h = by_rows(h + norm(name="post_mlp_norm")(x))

        self.sow("intermediates", "absmax", jnp.max(jnp.abs(h.astype(jnp.float32))))
        return h, own


class Gemma2(nn.Module):
    """`apply({"params": p}, ids, mask) -> states`; the defaults are Gemma-2-2b.

    Padding is on the right.  A padding query attends as the peers' does, to the valid tokens that
    its window reaches, so that even its state agrees with theirs.
    """

    vocab_size: int = 256000
    width: int = 2304
    depth: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    hidden: int = 9216
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_scale: int = 256  # logits are divided by its square root
    attention_softcap: float | None = 50.0
    sliding_window: int = 4096  # on layers 0, 2, 4, ...
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self):
        """Arguments that `init` accepts."""
        return jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)

    def __call__(self, ids, mask, prefix=None):
        """The final states.

        Args:
          ids: [b m] int32.  An id beyond the vocabulary gives NaN.
          mask: [b m] bool, False on the padding at the end.
          prefix: what `encode_prefix` returned for the tokens before `ids`, for b texts or for one.
        Returns:
          [b m d] in `dtype`.
        """
        return self._states(ids, mask, prefix, keep=False)[0]

    def encode_prefix(self, ids):
        """A Prefix of ids [b p], all valid: `apply({"params": p}, ids, method="encode_prefix")`."""
        states, (keys, values) = self._states(ids, jnp.ones(ids.shape, bool), None, keep=True)
        return Prefix(states, keys, values)

    @nn.compact
    def _states(self, ids, mask, prefix, keep):
        init = nn.initializers.normal(0.02)
        embedding = self.param("embedding", init, (self.vocab_size, self.width), self.param_dtype)
        # The factor is rounded like the hidden state that it makes, as it was in training.
        factor = jnp.asarray(self.width**0.5, self.dtype)
        h = by_rows(jnp.take(embedding, ids, axis=0).astype(self.dtype) * factor)

        length = 0 if prefix is None else prefix.keys.shape[2]
        before = jnp.ones((ids.shape[0], length), bool)
        valid = jnp.concatenate([before, mask.astype(bool)], axis=1)
        keys = jnp.arange(valid.shape[1])
        queries = keys[length:]
        table = rotary_table(queries, self.head_dim, self.rope_theta, self.dtype)
        windows = jnp.where(np.arange(self.depth) % 2 == 0, self.sliding_window, keys.size)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
        )
        old = None if prefix is None else (prefix.keys, prefix.values)
        distance = queries[:, None] - keys
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        layers = stack(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.hidden,
            self.rms_eps,
            self.query_scale,
            self.attention_softcap,
            keep,
            **types,
            name="layers",
        )
        h, own = layers(h, windows, old, table, distance, valid)
        return RMSNorm(self.rms_eps, self.param_dtype, name="norm")(h), own


GEMMA2_2B = Gemma2()
