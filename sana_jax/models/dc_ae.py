"""DC-AE, the deep compression autoencoder of SANA (https://arxiv.org/abs/2410.10733, section 3.2).

    z = encode(x)      [b H W 3] in [-1, 1] -> [b H/32 W/32 32]
    x' = decode(z)

No sampling and no KL term: the latent is a function of the image.  A stage is a run of blocks at
one resolution.  Between stages stand the residual autoencoding layers, which learn only what is
added to a shortcut without parameters:

    down:  conv(x) + average(space_to_channel(x))
    up:    conv(nearest(x)) + channel_to_space(duplicate(x))

The inner stages use the blocks of EfficientViT (https://arxiv.org/abs/2205.14756, section 3.2):
multi-scale linear attention and Mix-FFN.
Shapes: b batch, h w grid, n = h * w tokens, d width, k heads, c channels of a head, s scales.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sana_jax import ops
from sana_jax.errors import InputError
from sana_jax.models.layers import DepthwiseConv, GLUMBConv, RMSNorm

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


class ResBlock(nn.Module):
    """x + norm(conv(silu(conv(x)))), 3 x 3 both; the second has no bias."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        d = x.shape[-1]
        y = nn.silu(Conv3x3(d, name="conv_1", **types)(x))
        y = Conv3x3(d, use_bias=False, name="conv_2", **types)(y)
        return x + RMSNorm(use_bias=True, param_dtype=self.param_dtype, name="norm")(y)


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
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        b, h, w, d = x.shape
        inner = d // self.head_dim * self.head_dim
        conv = functools.partial(DepthwiseConv, use_bias=False, param_dtype=self.param_dtype)
        qkv = [nn.Dense(3 * inner, use_bias=False, name="qkv", **types)(x)]
        for size in self.scales:
            y = conv(size, name=f"scale_{size}")(qkv[0])
            qkv.append(GroupedDense(self.head_dim, name=f"scale_{size}_mix", **types)(y))
        qkv = jnp.concatenate(qkv, axis=-1)  # [b h w (1+s)*3d]
        qkv = qkv.reshape(b, h * w, -1, 3 * self.head_dim)  # [b n (1+s)*k 3*c]
        # The peers switch here too: it decides where bfloat16 rounds.
        attend = ops.relu_linear_attention if h * w > self.head_dim else relu_quadratic_attention
        out = attend(qkv, 1e-15).reshape(b, h, w, -1)  # [b h w (1+s)*d]
        return nn.Dense(d, use_bias=False, name="project", **types)(out)


class EfficientViTBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mix_ffn(x)): context, then locality."""

    scales: tuple = (5,)
    head_dim: int = 32
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(RMSNorm, use_bias=True, param_dtype=self.param_dtype)
        y = MultiScaleAttention(self.scales, self.head_dim, name="attention", **types)(x)
        x = x + norm(name="attention_norm")(y)
        y = GLUMBConv(4 * x.shape[-1], name="mix_ffn", **types)(x)
        return x + norm(name="mix_ffn_norm")(y)


class Down(nn.Module):
    """[b 2h 2w d] -> [b h w width]."""

    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv3x3(self.width, strides=2, name="conv", **types)(x)
        return y + average(space_to_channel(x), self.width)


class Up(nn.Module):
    """[b h w d] -> [b 2h 2w width]."""

    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv3x3(self.width, name="conv", **types)(nearest(x))
        return y + channel_to_space(duplicate(x, 4 * self.width))


# --- The two halves and the whole.


class Stage(nn.Module):
    """Runs `parts`, pairs of a name and what builds the module of that name, in order."""

    parts: tuple

    @nn.compact
    def __call__(self, x):
        for name, part in self.parts:
            x = part(name=name)(x)
        return x


def named_blocks(depth, attention, head_dim, types):
    """Parts of a Stage: ResBlocks if `attention` is None, else EfficientViTBlocks with it."""
    block = functools.partial(ResBlock, **types)
    if attention is not None:
        block = functools.partial(EfficientViTBlock, scales=attention, head_dim=head_dim, **types)
    return tuple((f"block_{i}", block) for i in range(depth))


class Encoder(nn.Module):
    """[b H W 3] -> [b h w latent].  Fields as in DCAE."""

    latent_channels: int
    widths: tuple
    depths: tuple
    attention: tuple
    head_dim: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv3x3(self.widths[0], name="conv_in", **types)(x)
        for i in range(len(self.widths)):
            parts = named_blocks(self.depths[i], self.attention[i], self.head_dim, types)
            if i + 1 < len(self.widths):
                parts = (*parts, ("down", functools.partial(Down, self.widths[i + 1], **types)))
            x = Stage(parts, name=f"stage_{i}")(x)
        y = Conv3x3(self.latent_channels, name="conv_out", **types)(x)
        return y + average(x, self.latent_channels)


class Decoder(nn.Module):
    """[b h w latent] -> [b H W 3].  Stages are numbered by resolution as in the encoder: they run
    from the last to 0, and each but the last starts by going up."""

    out_channels: int
    widths: tuple
    depths: tuple
    attention: tuple
    head_dim: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, z):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv3x3(self.widths[-1], name="conv_in", **types)(z) + duplicate(z, self.widths[-1])
        for i in reversed(range(len(self.widths))):
            parts = named_blocks(self.depths[i], self.attention[i], self.head_dim, types)
            if i + 1 < len(self.widths):
                parts = (("up", functools.partial(Up, self.widths[i], **types)), *parts)
            x = Stage(parts, name=f"stage_{i}")(x)
        x = RMSNorm(use_bias=True, param_dtype=self.param_dtype, name="norm_out")(x)
        return Conv3x3(self.out_channels, name="conv_out", **types)(ops.relu(x))


class DCAE(nn.Module):
    """The autoencoder.  SANA's latents are `encode(x) * scaling_factor`; images are not clipped.

    Per-stage fields go from the image's resolution to the latent's.  `*_attention` is None for a
    stage of ResBlocks, else the scales of its EfficientViTBlocks beside the plain one, perhaps ().
    """

    latent_channels: int = 32
    in_channels: int = 3
    widths: tuple = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple = (3, 3, 3, 3, 3, 3)
    encoder_attention: tuple = (None, None, None, (5,), (5,), (5,))
    decoder_attention: tuple = (None, None, None, (5,), (5,), (5,))
    head_dim: int = 32
    scaling_factor: float = 0.41407
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def compression(self):
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.widths) - 1)

    def setup(self):
        for side in ("encoder", "decoder"):
            for field in (f"{side}_depths", f"{side}_attention"):
                if len(value := getattr(self, field)) != (stages := len(self.widths)):
                    raise InputError(f"{field}={value}: needs {stages} entries, as widths has")
        if self.widths[-1] % self.latent_channels:
            field = f"latent_channels={self.latent_channels}"
            raise InputError(f"{field}: must divide the last width, {self.widths[-1]}")
        for a, b in itertools.pairwise(self.widths):
            if 4 * a % b or 4 * b % a:
                raise InputError(f"widths={self.widths}: {a} and {b} must divide 4 times the other")
        shared = self.head_dim, self.dtype, self.param_dtype
        self.encoder = Encoder(
            self.latent_channels, self.widths, self.encoder_depths, self.encoder_attention, *shared
        )
        self.decoder = Decoder(
            self.in_channels, self.widths, self.decoder_depths, self.decoder_attention, *shared
        )

    def example_inputs(self):
        """Arguments that `init` accepts: the smallest image."""
        return (jnp.zeros((1, self.compression, self.compression, self.in_channels)),)

    def encode(self, x: jax.Array) -> jax.Array:
        """[b H W 3] in [-1, 1] -> [b h w latent_channels] in `dtype`; H = compression * h."""
        step = self.compression
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % step or x.shape[2] % step:
            raise InputError(
                f"image shape={x.shape}: must be [batch, height, width, {self.in_channels}] "
                f"with height and width multiples of {step}"
            )
        return self.encoder(x.astype(self.dtype))

    def decode(self, z: jax.Array) -> jax.Array:
        """[b h w latent_channels] -> [b H W 3] in `dtype`, roughly in [-1, 1]."""
        if z.ndim != 4 or z.shape[3] != self.latent_channels:
            raise InputError(
                f"latent shape={z.shape}: must be [batch, height, width, {self.latent_channels}]"
            )
        return self.decoder(z.astype(self.dtype))

    def __call__(self, x):
        """The reconstruction; `init` through it creates both halves."""
        return self.decode(self.encode(x))


DC_AE_F32C32_SANA = DCAE()  # sana-1.0 and sana-1.1: one architecture, two decoders
