"""DC-AE, the deep compression autoencoder of SANA (https://arxiv.org/abs/2410.10733, section 3.2).

    z = encode(x)      [b H W 3] in [-1, 1] -> [b H/32 W/32 32]
    x' = decode(z)

No sampling and no KL term: the latent is a function of the image.  A stage is a run of blocks at
one resolution; residual autoencoding layers lead from one to the next.  The blocks and these layers
are in dc_ae_blocks.py; here they become the two halves, the whole, and the published variants.
Shapes: b batch, H W image, h w grid, d width.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sana_jax import ops
from sana_jax.errors import InputError, require_choice
from sana_jax.models.dc_ae_blocks import Conv3x3, Down, EfficientViTBlock, ResBlock, Up, average, duplicate
from sana_jax.models.layers import RMSNorm


class Stage(nn.Module):
    """Runs `parts`, pairs of a name and what builds the module of that name, in order."""

    parts: tuple

    @nn.compact
    def __call__(self, x):
        for name, part in self.parts:
            x = part(name=name)(x)
        return x


def named_blocks(depth, attention, head_dim, types, kernels, relu=False, batch_norm=False):
    """Parts of a Stage: ResBlocks if `attention` is None, else EfficientViTBlocks with it."""
    if attention is None:
        act = ops.relu if relu else nn.silu
        block = functools.partial(ResBlock, act=act, batch_norm=batch_norm, kernels=kernels, **types)
    else:
        block = functools.partial(EfficientViTBlock, scales=attention, head_dim=head_dim, kernels=kernels, **types)
    return tuple((f"block_{i}", block) for i in range(depth))


class Encoder(nn.Module):
    """[b H W 3] -> [b h w latent].  Fields as in DCAE."""

    latent_channels: int
    widths: tuple
    depths: tuple
    attention: tuple
    head_dim: int
    rearrange: bool
    kernels: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        down = functools.partial(Down, rearrange=self.rearrange, **types)
        first = 0 if self.depths[0] else 1
        if first:  # stage 0 is empty: the first convolution goes down
            x = down(self.widths[1], shortcut=False, name="conv_in")(x)
        else:
            x = Conv3x3(self.widths[0], name="conv_in", **types)(x)
        for i in range(first, len(self.widths)):
            parts = named_blocks(self.depths[i], self.attention[i], self.head_dim, types, kernels=self.kernels)
            if i + 1 < len(self.widths):
                parts = (*parts, ("down", functools.partial(down, self.widths[i + 1])))
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
    rearrange: bool
    relu: tuple
    batch_norm: tuple
    silu_out: bool
    kernels: str
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, z):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        up = functools.partial(Up, rearrange=self.rearrange, **types)
        first = 0 if self.depths[0] else 1
        x = Conv3x3(self.widths[-1], name="conv_in", **types)(z) + duplicate(z, self.widths[-1])
        for i in reversed(range(first, len(self.widths))):
            kinds = dict(relu=i in self.relu, batch_norm=i in self.batch_norm, kernels=self.kernels)
            parts = named_blocks(self.depths[i], self.attention[i], self.head_dim, types, **kinds)
            if i + 1 < len(self.widths):
                parts = (("up", functools.partial(up, self.widths[i])), *parts)
            x = Stage(parts, name=f"stage_{i}")(x)
        x = RMSNorm(use_bias=True, param_dtype=self.param_dtype, name="norm_out")(x)
        x = nn.silu(x) if self.silu_out else ops.relu(x)
        if first:  # stage 0 is empty: the last convolution goes up
            return up(self.out_channels, shortcut=False, name="conv_out")(x)
        return Conv3x3(self.out_channels, name="conv_out", **types)(x)


class DCAE(nn.Module):
    """The autoencoder.  SANA's latents are `encode(x) * scaling_factor`; images are not clipped.

    Per-stage fields go from the image's resolution to the latent's.  `*_attention` is None for a
    stage of ResBlocks, else the scales of its EfficientViTBlocks beside the plain one, perhaps ().
    A half whose depth at stage 0 is 0 goes to or from stage 1 in its first or last convolution;
    where both do, the width of stage 0 has no effect.

    rearrange_down, rearrange_up: resolution changes by moving pixels to channels and back, instead
      of by a strided convolution and by repeating pixels.
    decoder_relu, decoder_batch_norm: numbers of the decoder's stages whose ResBlocks have ReLU
      instead of SiLU, and BatchNorm instead of RMSNorm.
    silu_out: SiLU instead of ReLU before the last convolution.
    kernels: how the operations of ops.py run.
    """

    latent_channels: int = 32
    in_channels: int = 3
    widths: tuple = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple = (3, 3, 3, 3, 3, 3)
    encoder_attention: tuple = (None, None, None, (5,), (5,), (5,))
    decoder_attention: tuple = (None, None, None, (5,), (5,), (5,))
    head_dim: int = 32
    rearrange_down: bool = False
    rearrange_up: bool = False
    decoder_relu: tuple = ()
    decoder_batch_norm: tuple = ()
    silu_out: bool = False
    scaling_factor: float = 0.41407
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def compression(self):
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.widths) - 1)

    def _check(self):
        require_choice("kernels", self.kernels, ops.KERNELS)
        stages, widths = len(self.widths), self.widths
        for field in ("encoder_depths", "decoder_depths", "encoder_attention", "decoder_attention"):
            if len(value := getattr(self, field)) != stages:
                raise InputError(f"{field}={value}: needs {stages} entries, as widths has")
            if "depths" in field and 0 in (value[1:] or value):
                raise InputError(f"{field}={value}: only the first of several stages may be empty")
        for field in ("decoder_relu", "decoder_batch_norm"):
            if not set(value := getattr(self, field)) <= set(range(stages)):
                raise InputError(f"{field}={value}: must be numbers of stages, 0 to {stages - 1}")
        if odd := [i for i in self.decoder_batch_norm if self.decoder_attention[i] is not None]:
            raise InputError(f"decoder_batch_norm={self.decoder_batch_norm}: stages {odd} have no ResBlocks")
        if widths[-1] % self.latent_channels:
            raise InputError(f"latent_channels={self.latent_channels}: must divide the last width, {widths[-1]}")
        used = widths[1:] if self.encoder_depths[0] == self.decoder_depths[0] == 0 else widths
        for a, b in itertools.pairwise(used):
            if 4 * a % b or 4 * b % a:
                raise InputError(f"widths={widths}: {a} and {b} must divide 4 times the other")
        if self.rearrange_down and any(width % 4 for width in widths[1:]):
            raise InputError(f"widths={widths}: all but the first must be multiples of 4 with rearrange_down")

    def setup(self):
        self._check()
        shared = dict(
            widths=self.widths,
            head_dim=self.head_dim,
            kernels=self.kernels,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.encoder = Encoder(
            latent_channels=self.latent_channels,
            depths=self.encoder_depths,
            attention=self.encoder_attention,
            rearrange=self.rearrange_down,
            **shared,
        )
        self.decoder = Decoder(
            out_channels=self.in_channels,
            depths=self.decoder_depths,
            attention=self.decoder_attention,
            rearrange=self.rearrange_up,
            relu=self.decoder_relu,
            batch_norm=self.decoder_batch_norm,
            silu_out=self.silu_out,
            **shared,
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


# The published variants (docs/numerics.md 3.2).  `in` was trained on ImageNet, `mix` on a mixture:
# one architecture, two sets of weights, two scales of the latent.
DC_AE_F32C32_SANA = DCAE()  # sana-1.0 and sana-1.1: one architecture, two decoders
DC_AE_LITE_F32C32_SANA = DCAE(  # sana-1.1 with a decoder that takes half the time
    decoder_depths=(0, 3, 5, 4, 4, 4), decoder_attention=(None,) * 6, rearrange_up=True, silu_out=True
)
DC_AE_F32C32_IN = DCAE(
    encoder_depths=(0, 4, 8, 2, 2, 2),
    decoder_depths=(0, 5, 10, 2, 2, 2),
    encoder_attention=(None, None, None, (), (), ()),
    decoder_attention=(None, None, None, (), (), ()),
    rearrange_down=True,
    rearrange_up=True,
    decoder_relu=(0, 1, 2),
    decoder_batch_norm=(0, 1, 2),
    scaling_factor=0.3189,
)
DC_AE_F32C32_MIX = DC_AE_F32C32_IN.clone(scaling_factor=0.4552)


def _deeper(model, latent_channels, scaling_factor):
    """One more stage at half the resolution, 2048 wide."""
    sides = {
        f"{side}_{field}": getattr(model, f"{side}_{field}") + (value,)
        for side in ("encoder", "decoder")
        for field, value in (("depths", 2), ("attention", ()))
    }
    return model.clone(
        latent_channels=latent_channels, widths=model.widths + (2048,), scaling_factor=scaling_factor, **sides
    )


DC_AE_F64C128_IN = _deeper(DC_AE_F32C32_IN, 128, 0.2889)
DC_AE_F64C128_MIX = DC_AE_F64C128_IN.clone(scaling_factor=0.4538)
DC_AE_F128C512_IN = _deeper(DC_AE_F64C128_IN, 512, 0.4883)
DC_AE_F128C512_MIX = DC_AE_F128C512_IN.clone(scaling_factor=0.3620)
