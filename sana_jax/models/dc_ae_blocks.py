"""The blocks of DC-AE and the layers that change its resolution (docs/numerics.md 1.9).

The residual autoencoding layers learn only what is added to a shortcut without parameters:

    down:  conv(x) + average(space_to_channel(x))
    up:    conv(nearest(x)) + channel_to_space(duplicate(x))

or, with `rearrange`, where the convolution works at the lower resolution of the two,

    down:  space_to_channel(conv(x)) + average(space_to_channel(x))
    up:    channel_to_space(conv(x) + duplicate(x))

The inner stages use the blocks of EfficientViT (https://arxiv.org/abs/2205.14756, section 3.2):
multi-scale linear attention and Mix-FFN.
Shapes: b batch, h w grid, n = h * w tokens, d width, k heads, c channels of a head, s scales.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sana_jax import ops
from sana_jax.models.layers import Depthwise, GLUMBConv, RMSNorm

ATTENTION_EPS = 1e-15
# Of the norms that end a branch, in an untrained model: at 1 every branch is as large as what it is added to,
# and an image hardly comes through the noise of two dozen of them (docs/log.md).
BRANCH_INIT = nn.initializers.constant(0.1)

# Padding is explicit because XLA's "SAME" pads (0, 1) at stride 2.
Conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))


# --- Rearrangements without parameters.  Channels run (c, dy, dx) as in PyTorch, not (dy, dx, c).


def space_to_channel(x):
    """[b 2h 2w d] -> [b h w 4d]."""
    b, h, w, d = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, d).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // 2, w // 2, 4 * d)


def channel_to_space(x):
    """[b h w 4d] -> [b 2h 2w d]."""
    b, h, w, d = x.shape
    x = x.reshape(b, h, w, d // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, d // 4)


def average(x, channels):
    """[b h w g*channels] -> [b h w channels]: the mean over groups of g consecutive channels."""
    b, h, w, d = x.shape
    return x.reshape(b, h, w, channels, d // channels).mean(axis=-1)


def duplicate(x, channels):
    """[b h w d] -> [b h w channels]: each channel channels / d times in a row."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def nearest(x):
    """[b h w d] -> [b 2h 2w d], each pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def relu_quadratic_attention(qkv, eps):
    """`ops.relu_linear_attention` through its n x n matrix: fewer products when n <= c.

        out_n = sum_m a_nm v_m / (sum_m a_nm + eps),  a_nm = relu(q_n) . relu(k_m)

    The same function, rounded elsewhere: here the weights are rounded to the dtype of qkv, before
    and after they are normalised in float32.  [b n k 3*c] -> [b n k c].
    """
    q, k, v = jnp.split(qkv, 3, axis=-1)
    weights = jnp.einsum("bnkc,bmkc->bknm", ops.relu(q), ops.relu(k)).astype(jnp.float32)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + eps)
    return jnp.einsum("bknm,bmkc->bnkc", weights.astype(v.dtype), v)


# --- Blocks.  Each keeps its shape, [b h w d] -> [b h w d].


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias with stored statistics: the eval mode of torch's.

    `mean` and `var` stand among the parameters, so that they are loaded, checked and saved like any
    other, but they are statistics: no gradient reaches them, and an optimizer that decays weights
    must leave them out.  float32 inside, rounded once to x's dtype.
    """

    eps: float = 1e-5
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (
            self.param(name, init, x.shape[-1:], self.param_dtype).astype(jnp.float32)
            for name, init in inits.items()
        )
        mean, var = jax.lax.stop_gradient((mean, var))
        scale = scale * jax.lax.rsqrt(var + self.eps)  # per channel: one multiply-add is left per pixel
        return (x.astype(jnp.float32) * scale + (bias - mean * scale)).astype(x.dtype)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), 3 x 3 both; the second has no bias."""

    act: Callable = nn.silu
    batch_norm: bool = False
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        d = x.shape[-1]
        y = self.act(Conv3x3(d, name="conv_1", **types)(x))
        y = Conv3x3(d, use_bias=False, name="conv_2", **types)(y)
        if self.batch_norm:
            return x + BatchNorm(param_dtype=self.param_dtype, name="norm")(y)
        types = dict(kernels=self.kernels, param_dtype=self.param_dtype)
        return RMSNorm(use_bias=True, scale_init=BRANCH_INIT, name="norm", **types)(y, x)


class GroupedDense(nn.Module):
    """A dense layer on each run of `size` channels; its kernel is [groups, in, out]."""

    size: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        groups = x.shape[-1] // self.size
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("kernel", init, (groups, self.size, self.size), self.param_dtype)
        x = x.astype(self.dtype).reshape(*x.shape[:-1], groups, self.size)
        x = jnp.einsum("bhwgi,gio->bhwgo", x, kernel.astype(self.dtype))
        return x.reshape(*x.shape[:-2], groups * self.size)


class MultiScaleAttention(nn.Module):
    """ReLU linear attention over tokens and over their neighbourhoods, without norm and residual.

    For each scale, a depthwise convolution of that size and a grouped 1 x 1 convolution make
    further queries, keys and values from the first; they become further heads.  A head is a run of
    3 * c channels, its query, key and value side by side, of all channels together: heads are cut
    after the concatenation, so `qkv` is not three thirds (docs/numerics.md 1.9).
    """

    scales: tuple = (5,)
    head_dim: int = 32
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        b, h, w, d = x.shape
        inner = d // self.head_dim * self.head_dim
        depthwise = functools.partial(Depthwise, use_bias=False, param_dtype=self.param_dtype)
        qkv = [nn.Dense(3 * inner, use_bias=False, name="qkv", **types)(x)]
        for size in self.scales:
            y = ops.depthwise_conv(qkv[0], *depthwise(size, name=f"scale_{size}")(3 * inner))
            qkv.append(GroupedDense(self.head_dim, name=f"scale_{size}_mix", **types)(y))
        qkv = jnp.concatenate(qkv, axis=-1)  # [b h w (1+s)*3d]
        qkv = qkv.reshape(b, h * w, -1, 3 * self.head_dim)  # [b n (1+s)*k 3*c]
        # The peers switch here too: it decides where bfloat16 rounds.
        if h * w > self.head_dim:
            out = ops.relu_linear_attention(qkv, ATTENTION_EPS, kernels=self.kernels)
        else:
            out = relu_quadratic_attention(qkv, ATTENTION_EPS)
        out = out.reshape(b, h, w, -1)  # [b h w (1+s)*d]
        return nn.Dense(d, use_bias=False, name="project", **types)(out)


class EfficientViTBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mix_ffn(x)): context, then locality."""

    scales: tuple = (5,)
    head_dim: int = 32
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(kernels=self.kernels, dtype=self.dtype, param_dtype=self.param_dtype)
        norms = dict(kernels=self.kernels, param_dtype=self.param_dtype)
        norm = functools.partial(RMSNorm, use_bias=True, scale_init=BRANCH_INIT, **norms)
        y = MultiScaleAttention(self.scales, self.head_dim, name="attention", **types)(x)
        x = norm(name="attention_norm")(y, x)
        y = GLUMBConv(4 * x.shape[-1], name="mix_ffn", **types)(x)
        return norm(name="mix_ffn_norm")(y, x)


# --- Layers that change the resolution.  `rearrange`: see the top.


class Down(nn.Module):
    """[b 2h 2w d] -> [b h w width]."""

    width: int
    rearrange: bool = False
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv3x3, name="conv", dtype=self.dtype, param_dtype=self.param_dtype)
        if self.rearrange:
            y = space_to_channel(conv(self.width // 4)(x))
        else:
            y = conv(self.width, strides=2)(x)
        return y + average(space_to_channel(x), self.width) if self.shortcut else y


class Up(nn.Module):
    """[b h w d] -> [b 2h 2w width]."""

    width: int
    rearrange: bool = False
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv3x3, name="conv", dtype=self.dtype, param_dtype=self.param_dtype)
        if self.rearrange:
            y = conv(4 * self.width)(x)
            return channel_to_space(y + duplicate(x, 4 * self.width) if self.shortcut else y)
        y = conv(self.width)(nearest(x))
        return y + channel_to_space(duplicate(x, 4 * self.width)) if self.shortcut else y
