"""What surrounds the blocks of Sana: time, guidance, caption and position as vectors of its width.

Shapes as in sana.py; equations in docs/numerics.md 1.2 to 1.4.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct

from sana_jax.models.layers import Dense, RMSNorm, by_rows

CAPTION_NORM_EPS = 1e-5

xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)


def dense_of(module, kernel_init=xavier):
    """Dense with the dtypes of `module` and one of the two published initialisations."""
    return functools.partial(
        Dense, kernel_init=kernel_init, dtype=module.dtype, param_dtype=module.param_dtype
    )


@struct.dataclass
class Time:
    """What the network knows of a time: `embedding` [... d] and six modulation `rows` [... 6 d]."""

    embedding: jnp.ndarray
    rows: jnp.ndarray


def sinusoid(t, size=256, base=10_000.0):
    """[...] -> [... size], cosines first (docs/numerics.md 1.3), float32.

    t * f reaches 999 rad, where one ulp of f is 6e-5 of phase.  Rounding the exponent as float32
    arithmetic does and taking the exponential in float64 lands nearest to torch's own table.
    """
    half = size // 2
    exponent = np.float32(-np.log(base)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_embedding(height, width, size, scale, channels):
    """Fixed 2-D sin-cos embedding of the 2K and 4K models, [h w d] float32 (docs/numerics.md 1.2).

    The column fills the first half of the channels.  Coordinates are divided by height / size and
    width / size: a grid of any shape spans [0, size / scale) in both directions.
    """
    omega = 10_000.0 ** (-np.arange(channels // 4) / (channels / 4))

    def axis(length):  # coordinates in float32, then float64, as published
        p = np.arange(length, dtype=np.float32) / np.float32(length / size) / np.float32(scale)
        angle = p.astype(np.float64)[:, None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)

    column = jnp.broadcast_to(axis(width)[None], (height, width, channels // 2))
    row = jnp.broadcast_to(axis(height)[:, None], (height, width, channels // 2))
    return jnp.concatenate([column, row], axis=-1)


class TimeEmbed(nn.Module):
    """Sinusoid -> MLP, plus the same of a guidance scale (Sprint); then the modulation rows."""

    width: int
    guidance: bool
    integer: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, t, guidance):
        dense = dense_of(self, small)

        def embed(x, name, last_init=small):
            x = by_rows(dense(self.width, name=f"{name}_1")(sinusoid(x).astype(self.dtype)))
            return by_rows(dense(self.width, name=f"{name}_2", kernel_init=last_init)(nn.silu(x)))

        x = embed(jnp.trunc(t.astype(jnp.float32)) if self.integer else t, "mlp")
        if self.guidance:
            if guidance is None:
                raise ValueError("guidance=None: this model embeds guidance, pass 0.1 * scale, [b]")
            x = x + embed(guidance, "guidance", nn.initializers.zeros)
        rows = by_rows(dense(6 * self.width, name="modulation")(nn.silu(x)))
        return Time(x, rows.reshape(*t.shape, 6, self.width))


class CaptionEmbed(nn.Module):
    """Text encoder states [b m 2304] -> [b m d], RMS-normalised; `scale` is what the norm's weight begins with."""

    width: int
    scale: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, states):
        dense = dense_of(self, small)
        x = by_rows(nn.gelu(dense(self.width, name="mlp_1")(states), approximate=True))
        x = dense(self.width, name="mlp_2")(x)
        begin = nn.initializers.constant(self.scale)
        return RMSNorm(CAPTION_NORM_EPS, scale_init=begin, param_dtype=self.param_dtype, name="norm")(x)
