"""The one door to the operations that a hand-written kernel can replace, as pure functions on NHWC arrays.

Models call these and say which implementation they want, `kernels`; their parameters do not depend on it.
The operations with kernels are those of pallas_kernels, where each has its formula, its specification
and its plain JAX, which is what runs on a CPU.  Here are added errors of our own kind and the devices
that arrays are cut over (partition.py).  Kernels take bfloat16 and float32; of float16 and float64 "auto"
makes plain JAX, whose sums are float32, or float64 of float64.
Shapes: b batch, h w grid, n = h * w tokens, k heads, c channels of a head.
"""

import contextlib

import jax
import jax.numpy as jnp

from pallas_kernels import adaln, depthwise, dispatch, rms_residual
from pallas_kernels.dispatch import KernelError
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.mix_ffn import mix_ffn as fused_mix_ffn
from sana_jax.errors import InputError, require_choice
from sana_jax.partition import over_devices

KERNELS = dispatch.IMPLEMENTATIONS  # names of how an operation runs


def require_runnable(kernels):
    """Raises InputError: no such implementation, or this machine does not run it."""
    require_choice("kernels", kernels, KERNELS)
    if kernels in dispatch.GPU_ONLY and jax.default_backend() != "gpu":
        others = dispatch.listed(name for name in KERNELS if name not in dispatch.GPU_ONLY)
        raise InputError(f"kernels={kernels!r}: needs an NVIDIA GPU, and this is a {jax.default_backend()}; here: {others}")
    if not dispatch.installed(kernels):
        raise InputError("kernels='jax_triton': jax-triton is not installed: pip install 'sana_jax[cuda13]'")


def relu(x):
    """max(x, 0) that hands on NaN.  XLA's CPU maximum turns NaN into 0, and so a broken network into
    a plausible picture."""
    return jnp.where(x <= 0, 0, x)


def by_platform(cpu, default):
    """One function of arrays in two forms: for the CPU, and for everything else.

    Its derivative keeps the arguments and nothing else for the backward pass.  Left alone, that of
    `lax.platform_dependent` would keep what either form needs, on every platform.
    """

    @jax.custom_vjp
    def fn(*args):
        return jax.lax.platform_dependent(*args, cpu=cpu, default=default)

    def backward(args, gradient):
        cpu_pull, pull = (lambda g, *args, f=f: jax.vjp(f, *args)[1](g) for f in (cpu, default))
        return jax.lax.platform_dependent(gradient, *args, cpu=cpu_pull, default=pull)

    fn.defvjp(lambda *args: (fn(*args), args), backward)
    return fn


def einsum32(equation, a, b):
    """einsum whose sums and result are float32, whatever the inputs are.

    Tensor cores take bfloat16 factors and add in float32; XLA's CPU backend has no such product, so
    there the factors are widened first, which gives the same numbers.
    """

    def wide(a, b):
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

    def narrow(a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    return wide(a, b) if a.dtype == b.dtype == jnp.float32 else by_platform(wide, narrow)(a, b)


def dense(x, kernel, bias):
    """x @ kernel + bias: [... i], [i o], [o] -> [... o], all of one dtype.

    A GPU's matrix product adds the bias before it rounds, and asking XLA for a float32 product first
    would cost it a pass over memory.  On a CPU the sum is a step of its own and rounds a second time
    (1.3 times the error in bfloat16), unless it is done in float32.
    """

    def narrow(x, kernel, bias):
        return jnp.matmul(x, kernel) + bias

    def wide(*arrays):
        return narrow(*(a.astype(jnp.float32) for a in arrays)).astype(x.dtype)

    return narrow(x, kernel, bias) if x.dtype == jnp.float32 else by_platform(wide, narrow)(x, kernel, bias)


def plain(module):
    """The module with its operations in plain JAX, which look at no device: the same parameters and work.
    Raises InputError where it names an implementation that there is not."""
    if not hasattr(module, "kernels"):
        return module
    require_choice("kernels", module.kernels, KERNELS)
    return module.clone(kernels="xla")


@contextlib.contextmanager
def our_errors():
    """A KernelError in it becomes an InputError."""
    try:
        yield
    except KernelError as error:
        raise InputError(str(error)) from error


def require_grids(op, grids, rows=()):
    """Raises InputError unless the grids are [b, h, w, d], of one shape, and the rows [b, 1, 1, d] or one for
    all images: what they are made of before kernels see them would hide it.

    Args:
      grids, rows: {name: array}.
    """
    (first, grid), *_ = grids.items()
    with our_errors():
        for name, array in grids.items():
            shape = jnp.shape(array)
            dispatch.require(len(shape) == 4, op, f"{name}.shape", shape, "[b, h, w, d]")
            dispatch.require(0 not in shape, op, f"{name}.shape", shape, "without an empty axis")
            dispatch.require(shape == grid.shape, op, f"{name}.shape", shape, f"that of {first}, {grid.shape}")
        b, _, _, d = grid.shape
        allowed = list(dict.fromkeys([(b, 1, 1, d), (1, 1, 1, d)]))
        for name in rows:
            shape = jnp.shape(rows[name])
            dispatch.require(shape in allowed, op, f"{name}.shape", shape, dispatch.listed(allowed))
            allowed = [shape]


def through_the_door(op, *args, kernels, **options):
    """An operation of pallas_kernels, cut over devices as its arrays are.

    kernels: "auto", which takes a hand-written kernel where measurements say so, or an implementation of
      `KERNELS` by name, which works or raises.
    Raises InputError: what the implementation cannot take.
    """
    require_choice("kernels", kernels, KERNELS)
    with our_errors():
        return op(*args, **options, implementation=kernels, partition=over_devices)


def relu_linear_attention(qkv, eps, norm_scale=None, norm_eps=1e-5, kernels="auto"):
    """Softmax-free attention, equation (1) of SANA (https://arxiv.org/abs/2410.10629).

        out_n = relu(q_n) S / (relu(q_n) . z + eps),  S = sum_n relu(k_n)^T v_n,  z = sum_n relu(k_n)

    Args:
      qkv: [b, n, k, 3 * c], for each head its query, key and value side by side.
      eps: added to the denominator (1e-15 in diffusers and DC-AE, 1e-8 in NVlabs' SANA).
      norm_scale: None, or the scales [2, k, c] of an RMS normalisation of queries and keys over all heads
        and channels, in float32.
    Returns:
      [b, n, k, c] in the dtype of qkv.  The sums over n run in float32: at 4096 px they add 16384
      tokens and leave the range of float16.
    """
    return through_the_door(
        linear_attention, qkv, eps, norm_scale=norm_scale, norm_eps=norm_eps, kernels=kernels
    )


def mix_ffn(y, kernel, bias, kernels="auto"):
    """The middle of Mix-FFN: SiLU, depthwise 3 x 3 convolution, value * SiLU(gate).

    Args:
      y: [b, h, w, 2 * c], the expansion before its SiLU.
      kernel, bias: [3, 3, 2 * c] and [2 * c] of the convolution.
    Returns:
      [b, h, w, c] in the dtype of y.
    """
    return through_the_door(fused_mix_ffn, y, kernel, bias, kernels=kernels)


def modulate(x, shift, scale, kernels="auto"):
    """adaLN: LayerNorm(x) (1 + scale) + shift, without affine parameters of its own, float32 until the
    one rounding to x's dtype.

    x [b, h, w, d]; shift, scale [b or 1, 1, 1, d] float32 -> [b, h, w, d].
    """
    require_grids("modulate", {"x": x}, {"shift": shift, "scale": scale})
    rows = (shift[:, 0, 0], scale[:, 0, 0])
    return through_the_door(adaln.modulate, tokens(x), *rows, kernels=kernels).reshape(x.shape)


def add_gated(x, gate, y, kernels="auto"):
    """x + gate * y with one rounding.  x, y [b, h, w, d]; gate [b or 1, 1, 1, d] float32."""
    require_grids("add_gated", {"x": x, "y": y}, {"gate": gate})
    gate = gate[:, 0, 0]
    return through_the_door(adaln.add_gated, tokens(x), gate, tokens(y), kernels=kernels).reshape(x.shape)


def add_rms_norm(x, y, scale, bias, eps=1e-5, kernels="auto"):
    """x + (y / sqrt(mean(y^2) + eps) * scale + bias), the branch rounded to its dtype before the sum is.

    x, y [b, h, w, d]; scale, bias [d].
    """
    require_grids("add_rms_norm", {"x": x, "y": y})
    b, _, w, d = x.shape
    large = x.size // b > dispatch.MAX_ELEMENTS  # DC-AE's at 4096 px, by one: then rows of the grid are images
    shape = (-1, w, d) if large else (b, -1, d)
    args = x.reshape(shape), y.reshape(shape), scale, bias, eps
    return through_the_door(rms_residual.add_rms_norm, *args, kernels=kernels).reshape(x.shape)


def tokens(x):
    """[b h w d] -> [b n d]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def depthwise_conv(x, kernel, bias=None):
    """Depthwise k x k convolution, stride 1, zero padding k // 2.

    Args:
      x: [b, h, w, c].
      kernel: [k, k, c], k odd.
      bias: [c] or None.
    Returns:
      [b, h, w, c] in the dtype of x, accumulated in float32, or float64 of float64.  There is no forward mode (jvp).
    Raises:
      InputError: a kernel that is not square or of an even side, which has no centre; arrays that do not fit.
    """
    with our_errors():
        return depthwise.depthwise_conv(x, kernel, bias)


def cross_attention(q, kv, bias):
    """Softmax attention of image tokens over text tokens, scale 1 / sqrt(c), softmax in float32.

    Args:
      q: [b, n, k, c].
      kv: [b, m, k, 2 * c], for each head its key and value side by side.
      bias: [b, m], added to the logits; -10000 hides a token and, unlike -inf, leaves a row whose
        tokens are all hidden finite (docs/numerics.md 1.5).
    Returns:
      [b, n, k, c].
    """
    k, v = jnp.split(kv, 2, axis=-1)
    logits = einsum32("bnkc,bmkc->bknm", q, k) * q.shape[-1] ** -0.5
    logits = logits + bias[:, None, None].astype(jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmkc->bnkc", weights, v)
