"""The operations that a hand-written kernel can replace, as pure functions on NHWC arrays.

Models call these and know nothing of how they run.  What stands here is the plain jnp form: it is
what runs on a CPU, and what any kernel has to agree with.
Shapes: b batch, h w grid, n = h * w tokens, k heads, c channels of a head.
"""

import functools

import jax
import jax.numpy as jnp

from sana_jax.errors import InputError


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


def relu_linear_attention(qkv, eps):
    """Softmax-free attention, equation (1) of SANA (https://arxiv.org/abs/2410.10629).

        out_n = relu(q_n) S / (relu(q_n) . z + eps),  S = sum_n relu(k_n)^T v_n,  z = sum_n relu(k_n)

    Args:
      qkv: [b, n, k, 3 * c], for each head its query, key and value side by side.
      eps: added to the denominator (1e-15 in diffusers and DC-AE, 1e-8 in NVlabs' SANA).
    Returns:
      [b, n, k, c] in the dtype of qkv.  The sums over n run in float32: at 4096 px they add 16384
      tokens and leave the range of float16.
    """
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q, k = relu(q), relu(k)
    state = einsum32("bnkc,bnke->bkce", k, v)
    total = jnp.sum(k, axis=1, dtype=jnp.float32)
    q = q.astype(jnp.float32)
    out = jnp.einsum("bnkc,bkce->bnke", q, state)
    weight = jnp.einsum("bnkc,bkc->bnk", q, total)
    return (out / (weight[..., None] + eps)).astype(qkv.dtype)


@jax.custom_vjp
def depthwise_conv(x, kernel, bias=None):
    """Depthwise k x k convolution, stride 1, zero padding k // 2.

    k * k shifted multiply-adds that XLA fuses into one pass; the library's grouped convolution is
    13 to 40 times slower on a CPU.  The backward pass keeps the arguments alone, no float32 copy of
    x for each tap.

    Args:
      x: [b, h, w, c].
      kernel: [k, k, c], k odd.
      bias: [c] or None.
    Returns:
      [b, h, w, c] in the dtype of x, accumulated in float32.  There is no forward mode (jvp).
    Raises:
      InputError: a kernel that is not square or of an even side, which has no centre.
    """
    size, (_, h, w, _) = kernel.shape[0], x.shape
    if size % 2 == 0 or kernel.shape[1] != size:
        raise InputError(f"kernel: {kernel.shape}, must be [k, k, c] with an odd k")
    x32, kernel = _padded(x, size), kernel.astype(jnp.float32)
    taps = [x32[:, dy : dy + h, dx : dx + w] * kernel[dy, dx] for dy in range(size) for dx in range(size)]
    out = sum(taps[1:], taps[0])
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def _padded(x, size):
    edge = (size // 2, size // 2)
    return jnp.pad(x, ((0, 0), edge, edge, (0, 0))).astype(jnp.float32)


def taps_in_turn(padded, gradient, size):
    """[size * size, c]: for each tap, the sum over b h w of the shifted x and the gradient, one after the
    other: of all in one program XLA makes scalar code on a CPU, which takes twice as long."""
    def tap(shift):
        part = jax.lax.dynamic_slice(padded, (0, shift // size, shift % size, 0), gradient.shape)
        return jnp.sum(part * gradient, axis=(0, 1, 2))

    return jax.lax.map(tap, jnp.arange(size * size))


def taps_at_once(padded, gradient, size):
    """The same in one pass over memory."""
    _, h, w, _ = gradient.shape
    parts = (padded[:, dy : dy + h, dx : dx + w] for dy in range(size) for dx in range(size))
    return jnp.stack([jnp.sum(part * gradient, axis=(0, 1, 2)) for part in parts])


def _depthwise_backward(arguments, gradient):
    x, kernel, bias = arguments
    back = depthwise_conv(gradient, kernel[::-1, ::-1]).astype(x.dtype)
    cpu, default = (functools.partial(taps, size=kernel.shape[0]) for taps in (taps_in_turn, taps_at_once))
    wide = _padded(x, kernel.shape[0]), gradient.astype(jnp.float32)
    down = jax.lax.platform_dependent(*wide, cpu=cpu, default=default).reshape(kernel.shape).astype(kernel.dtype)
    if bias is not None:
        bias = jnp.sum(gradient, axis=(0, 1, 2), dtype=jnp.float32).astype(bias.dtype)
    return back, down, bias


depthwise_conv.defvjp(lambda *arguments: (depthwise_conv(*arguments), arguments), _depthwise_backward)


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
