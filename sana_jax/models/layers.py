"""Small layers that several models share.

Parameters live in `param_dtype`, activations in `dtype`; normalisation runs in float32 and rounds
once, where it hands over.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sana_jax import ops

PRODUCT = "product"


def by_rows(x):
    """x [b ...], whose rows are cut over devices and nothing else is.

    Says so to XLA where the caller gave the name "rows" a meaning (`layout.on_mesh`), which keeps it
    from cutting activations as it finds the weights cut; anywhere else it is the identity.
    """
    return nn.with_logical_constraint(x, ("rows",) + (None,) * (x.ndim - 1))


def rms_norm(x, scale, eps, axes=(-1,), bias=0.0):
    """x / sqrt(mean(x^2 over `axes`) + eps) * scale + bias: float32 inside, rounded once to x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32) + bias).astype(x.dtype)


class Dense(nn.Dense):
    """nn.Dense that rounds once where there is a bias, see `ops.dense`.  Same parameters.

    Its result is named PRODUCT, for `jax.checkpoint` to tell it from what is cheap to compute again.
    """

    @nn.compact
    def __call__(self, x):
        if not self.use_bias:
            return checkpoint_name(super().__call__(x), PRODUCT)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        return checkpoint_name(ops.dense(*(a.astype(self.dtype) for a in (x, kernel, bias))), PRODUCT)


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis, with weight and optionally bias (`trms2d` of DC-AE).

    Where it ends a branch, `residual` [b h w d] is what the branch is added to; it has a bias then.
    """

    eps: float = 1e-5
    use_bias: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    kernels: str = "auto"
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, residual=None):
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype)
        if not self.use_bias:
            return rms_norm(x, scale, self.eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        if residual is not None:
            return ops.add_rms_norm(residual, x, scale, bias, self.eps, self.kernels)
        return rms_norm(x, scale, self.eps, bias=bias.astype(jnp.float32))


def torch_conv_init(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what an untrained torch convolution and its bias hold."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


class Depthwise(nn.Module):
    """The kernel [k k c] of a depthwise convolution and its bias [c], or None, for c channels."""

    size: int = 3
    use_bias: bool = True
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, channels):
        init = torch_conv_init(self.size**2)
        kernel = self.param("kernel", init, (self.size, self.size, channels), self.param_dtype)
        return kernel, self.param("bias", init, (channels,), self.param_dtype) if self.use_bias else None


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 expansion to 2h, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 projection.

    SiLU acts twice: on all 2h channels before the convolution, and on the gate after it
    (docs/numerics.md 1.5).  The projection has no bias.  [b h w d] -> [b h w d].
    """

    hidden: int
    kernels: str = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        expand, project = (
            functools.partial(
                Dense,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=torch_conv_init(fan_in),
                bias_init=torch_conv_init(fan_in),
            )
            for fan_in in (width, self.hidden)
        )
        x = expand(2 * self.hidden, name="expand")(x)
        depthwise = Depthwise(param_dtype=self.param_dtype, name="depthwise")(2 * self.hidden)
        return project(width, use_bias=False, name="project")(ops.mix_ffn(x, *depthwise, self.kernels))
