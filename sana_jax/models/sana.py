"""Sana: a linear diffusion transformer (https://arxiv.org/abs/2410.10629).

Shapes: b batch, h w latent grid, n = h * w tokens, d width, m caption tokens, k heads, c channels
of a head, l layers.  Every equation is in docs/numerics.md section 1.

Of the network's four inputs only the latent changes between steps of one picture.  So the module is
cut where that matters: `embed_text` makes the keys and values of all layers, `embed_time` the
modulation of any number of times, and `velocity` is what is left inside the sampling loop.
`__call__` composes the three.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sana_jax import ops
from sana_jax.errors import InputError, require_choice, require_positive
from sana_jax.models import embeddings
from sana_jax.models.embeddings import CaptionEmbed, TimeEmbed, dense_of
from sana_jax.models.layers import PRODUCT, GLUMBConv, by_rows, rms_norm

FLOAT16_MAX = 65504.0
HIDDEN_TOKEN = -10000.0  # additive logit of a masked token; finite on purpose, see ops.cross_attention
NORM_EPS = 1e-5  # RMSNorm of query and key; in cross-attention NVlabs has another


@struct.dataclass
class Text:
    """What the network knows of a caption: `kv` [l b m k 2c] of all layers and `bias` [b m].

    With `caption`, [b m d] float32, `kv` are the parameters of what each block makes its own of.
    """

    kv: jnp.ndarray
    bias: jnp.ndarray
    caption: jnp.ndarray | None = None


def add32(a, b):
    """a + b in float32."""
    return a.astype(jnp.float32) + b.astype(jnp.float32)


class KeyValue(nn.Module):
    """Cross-attention keys and values of one layer, [b m d] -> [b m k 2c]; mapped over layers."""

    heads: int
    qk_norm: bool
    norm_eps: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, text):
        b, m, d = text.shape
        kv = dense_of(self)(2 * d, name="kv")(text).reshape(b, m, self.heads, -1)
        if self.qk_norm:
            key, value = jnp.split(kv, 2, axis=-1)
            key = head_norm(key, HeadScale(self.param_dtype, name="key_norm")(*key.shape[-2:]), self.norm_eps)
            kv = jnp.concatenate([key, value], axis=-1)
        return kv


class HeadScale(nn.Module):
    """The scale [k c] of a normalisation over all heads and channels at once (SANA-1.5, Sprint)."""

    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, k, c):
        return self.param("scale", nn.initializers.ones, (k * c,), self.param_dtype).reshape(k, c)


def head_norm(x, scale, eps):
    """RMS normalisation of [... k c] over the last two axes."""
    return rms_norm(x, scale, eps, axes=(-2, -1))


class LinearAttention(nn.Module):
    """ReLU linear self-attention over the grid, [b h w d] -> [b h w d].

    In the rows where `perturbed`, [b] bool, each token attends to itself alone: out(v) (PAG).
    """

    heads: int
    qk_norm: bool
    eps: float
    clamp: bool
    kernels: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, perturbed=None):
        b, h, w, d = x.shape
        dense = dense_of(self)
        qkv = dense(3 * d, use_bias=False, name="qkv")(x).reshape(b, h * w, self.heads, -1)
        scale = None
        if self.qk_norm:
            names, shape = ("query_norm", "key_norm"), (self.heads, d // self.heads)
            scale = jnp.stack([HeadScale(self.param_dtype, name=name)(*shape) for name in names])
        out = ops.relu_linear_attention(qkv, self.eps, scale, NORM_EPS, self.kernels)
        if perturbed is not None:
            value = jnp.split(qkv, 3, axis=-1)[2]
            out = jnp.where(perturbed[:, None, None, None], value, out)
        out = dense(d, name="out")(out.reshape(b, h, w, d))
        if self.clamp or out.dtype == jnp.float16:
            out = jnp.clip(out, -FLOAT16_MAX, FLOAT16_MAX)
        return out


class CrossAttention(nn.Module):
    """Softmax attention of the grid over caption tokens; no norm, gate or modulation around it."""

    heads: int
    qk_norm: bool
    norm_eps: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, kv, bias):
        b, h, w, d = x.shape
        dense = dense_of(self)
        q = dense(d, name="query")(x).reshape(b, h * w, self.heads, -1)
        if self.qk_norm:
            q = head_norm(q, HeadScale(self.param_dtype, name="query_norm")(*q.shape[-2:]), self.norm_eps)
        out = ops.cross_attention(q, kv, bias)
        return dense(d, name="out")(out.reshape(b, h, w, d))


class SanaBlock(nn.Module):
    """h += gate Attn(mod(h));  h += CrossAttn(h, text);  h += gate FFN(mod(h))."""

    heads: int
    cross_heads: int
    hidden: int
    qk_norm: bool
    attention_eps: float
    cross_norm_eps: float
    clamp: bool
    kernels: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, kv, rows, bias, perturbed=None, caption=None):
        d, types = x.shape[-1], (self.dtype, self.param_dtype)
        table = self.param("modulation", nn.initializers.normal(d**-0.5), (6, d), self.param_dtype)
        rows = add32(table, rows)[:, :, None, None]  # [b 6 1 1 d]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.moveaxis(rows, 1, 0)
        modulate = functools.partial(ops.modulate, kernels=self.kernels)
        add_gated = functools.partial(ops.add_gated, kernels=self.kernels)
        if caption is not None:
            own = KeyValue(self.cross_heads, self.qk_norm, self.cross_norm_eps, *types, parent=None)
            kv = own.apply({"params": kv}, caption.astype(self.dtype))

        attention = LinearAttention(
            self.heads, self.qk_norm, self.attention_eps, self.clamp, self.kernels, *types, name="self_attn"
        )
        x = by_rows(add_gated(x, gate_a, attention(by_rows(modulate(x, shift_a, scale_a)), perturbed)))
        cross = CrossAttention(
            self.cross_heads, self.qk_norm, self.cross_norm_eps, *types, name="cross_attn"
        )
        x = by_rows(x + cross(x, kv, bias))
        ffn = GLUMBConv(self.hidden, self.kernels, *types, name="mix_ffn")
        x = by_rows(add_gated(x, gate_f, ffn(by_rows(modulate(x, shift_f, scale_f)))))

        # Read by diagnose.py; costs nothing unless "intermediates" is asked for.
        self.sow("intermediates", "absmax", jnp.max(jnp.abs(x)))
        return x, None


class Head(nn.Module):
    """Modulated LayerNorm and the projection to latent channels; uses `embedding`, not `rows`."""

    channels: int
    kernels: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, embedding):
        d = x.shape[-1]
        table = self.param("modulation", nn.initializers.normal(d**-0.5), (2, d), self.param_dtype)
        rows = add32(table, embedding[:, None])[:, :, None, None]
        x = by_rows(ops.modulate(x, rows[:, 0], rows[:, 1], self.kernels))
        return dense_of(self)(self.channels, name="out")(x)


# Layers run in a loop, across which nothing is merged: the barriers of prevent_cse would be in vain.
_remat = functools.partial(nn.remat, prevent_cse=False)
REMAT = {
    None: lambda block: block,
    "full": _remat,
    "products": functools.partial(_remat, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT)),
}


class Sana(nn.Module):
    """The velocity v = noise - x0 at time t in [0, 1000].  The module is its own configuration.

    Attributes:
      width, depth, heads, cross_heads, ffn_ratio: sizes; heads are those of the linear attention.
      latent_channels, caption_width: channels of the latent and of the text encoder's states.
      sample_size: side of the latent grid that the checkpoint was trained on.
      position_scale: None (no position embedding) or its interpolation: 1.0 at 2K, 2.0 at 4K.
      qk_norm: RMSNorm on queries and keys (SANA-1.5, Sprint).
      guidance_embed: the guidance scale is an input of the network (Sprint).
      attention_eps, cross_norm_eps, integer_time, clamp: see `stacks.Stack`.
      caption_scale: what the weight of the captions' norm is initialised with; a checkpoint has its own.  0.01 is
        published, and a short training hardly moves it: text is then learned late.
      remat: what the backward pass computes again instead of having it kept: None, nothing; "full",
        each block from its input; "products", all but the products with weights, which are most of the
        work and half of the memory.
      unroll: blocks in a turn of the loop over them; depth or more is no loop.  XLA:CPU then trains a small
        model 1.3 times as fast, since it fuses no slicing of stacked parameters into other work; it compiles longer.
      kernels: how the operations of ops.py run: "auto", or one of ops.KERNELS; never part of a checkpoint.
      dtype, param_dtype: of activations and of parameters.
    """

    width: int = 2240
    depth: int = 20
    heads: int = 70
    cross_heads: int = 20
    ffn_ratio: float = 2.5
    latent_channels: int = 32
    caption_width: int = 2304
    sample_size: int = 32
    position_scale: float | None = None
    qk_norm: bool = False
    guidance_embed: bool = False
    attention_eps: float = 1e-15
    cross_norm_eps: float = 1e-5
    integer_time: bool = False
    clamp: bool = False
    caption_scale: float = 0.01
    remat: str | None = None
    unroll: int = 1
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        for field in ("heads", "cross_heads"):
            if self.width % getattr(self, field):
                raise InputError(f"{field}={getattr(self, field)}: must divide width={self.width}")
        require_choice("remat", self.remat, REMAT)
        require_positive("unroll", self.unroll)
        require_choice("kernels", self.kernels, ops.KERNELS)
        types = (self.dtype, self.param_dtype)
        self.patch_embed = dense_of(self)(self.width)
        self.time_embed = TimeEmbed(self.width, self.guidance_embed, self.integer_time, *types)
        self.caption_embed = CaptionEmbed(self.width, self.caption_scale, *types)
        self.key_value = nn.vmap(
            KeyValue,
            in_axes=None,
            axis_size=self.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )(self.cross_heads, self.qk_norm, self.cross_norm_eps, *types)
        self.blocks = nn.scan(
            REMAT[self.remat](SanaBlock),
            length=self.depth,
            unroll=min(self.unroll, self.depth),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, 0, nn.broadcast),
        )(
            self.heads,
            self.cross_heads,
            int(self.ffn_ratio * self.width),
            self.qk_norm,
            self.attention_eps,
            self.cross_norm_eps,
            self.clamp,
            self.kernels,
            *types,
        )
        self.head = Head(self.latent_channels, self.kernels, *types)

    def example_inputs(self):
        """Arguments that `init` accepts; their leading sizes leave no trace in the parameters."""
        x = jnp.zeros((1, 2, 2, self.latent_channels))
        states, mask = jnp.zeros((1, 2, self.caption_width)), jnp.ones((1, 2), bool)
        return (x, jnp.zeros(1), states, mask) + ((jnp.zeros(1),) if self.guidance_embed else ())

    def __call__(self, x, t, states, mask, guidance=None):
        """The plain form.

        Args:
          x: [b h w latent_channels], the latent in model space.
          t: [b], time in [0, 1000], int or float.
          states: [b m caption_width], text encoder states.
          mask: [b m] bool, True at tokens to attend to.
          guidance: [b], 0.1 * guidance scale; only where `guidance_embed`.
        Returns:
          The velocity, [b h w latent_channels] in `dtype`.
        """
        text = self.embed_text(states, mask, ahead=self.remat is None or self.is_initializing())
        return self.velocity(x, self.embed_time(t, guidance), text)

    def embed_text(self, states, mask, ahead=True):
        """states [b m caption_width], mask [b m] -> Text.  Does not depend on latent or time.

        Not `ahead`, blocks make their keys and values themselves: the backward pass would otherwise
        hold the gradients of all of them at once, at 512 px a fifth of all that it holds.
        """
        caption = by_rows(self.caption_embed(states.astype(self.dtype)))
        bias = jnp.where(mask, 0.0, HIDDEN_TOKEN).astype(self.dtype)
        if ahead:
            return Text(self.key_value(caption), bias)
        # float32, or its gradient would be added up over the blocks in `dtype`
        return Text(self.key_value.variables["params"], bias, caption.astype(jnp.float32))

    def embed_time(self, t, guidance=None):
        """t [...] -> Time with the same leading axes.  Does not depend on latent or text."""
        return self.time_embed(t, guidance)

    def velocity(self, x, time, text, perturbed=None):
        """What remains for each step.

        `time` has leading axis b, or 1 for one time for all.  `perturbed`, [l b] bool, says in which
        layers which rows lose their self-attention (docs/numerics.md 4.6); None costs nothing.
        """
        x = by_rows(self.patch_embed(x.astype(self.dtype)))
        if self.position_scale is not None:
            _, h, w, d = x.shape
            position = embeddings.position_embedding(h, w, self.sample_size, self.position_scale, d)
            x = (x.astype(jnp.float32) + position).astype(self.dtype)
        x, _ = self.blocks(x, text.kv, time.rows, text.bias, perturbed, text.caption)
        return self.head(x, time.embedding)


# Published sizes (docs/numerics.md 1.1, 3.1).
SANA_600M = Sana(width=1152, depth=28, heads=36, cross_heads=16)
SANA_1600M = Sana()
SANA_1600M_2K = SANA_1600M.clone(sample_size=64, position_scale=1.0)
SANA_1600M_4K = SANA_1600M.clone(sample_size=128, position_scale=2.0)
SANA_1_5_1600M = SANA_1600M.clone(qk_norm=True)
SANA_1_5_4800M = SANA_1600M.clone(depth=60, qk_norm=True)
SANA_SPRINT_600M = SANA_600M.clone(qk_norm=True, guidance_embed=True)
SANA_SPRINT_1600M = SANA_1600M.clone(qk_norm=True, guidance_embed=True)
