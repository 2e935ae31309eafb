"""Where the first NaN or infinity came from, on stand-ins for the networks that say where it is."""

import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import diagnose
from sana_jax.errors import NonFiniteError

INF = np.inf


class Transformer:
    """Reports `absmax[step]` for its blocks, the last number for its head."""

    def __init__(self, absmax, dtype):
        self.absmax, self.dtype = jnp.asarray(absmax, dtype), dtype

    def apply(self, variables, x, t, method, mutable=()):
        if method != "velocity":
            return t
        *blocks, head = self.absmax[t]
        v = jnp.full((2, 2), -head)
        return (v, {"intermediates": {"blocks": {"absmax": (jnp.stack(blocks),)}}}) if mutable else v


def denoise(sana, params, steps):
    """Calls the network as a sampler does, steps in order, embedding first."""
    for t in range(steps):
        v = sana.apply({"params": params}, None, sana.apply({}, None, t, method="embed"), method="velocity")
    return v


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "absmax, message",
    [
        ([[1, 2, INF, INF, INF]], "transformer: step 0, blocks/2 is not finite in {}; largest finite activation before it 2; "),
        ([[1, 2, 3, 4, 5], [np.nan, 0, 0, 0, 0]], "transformer: step 1, blocks/0 is not finite in {}; "),
        ([[1, 2, 3, 4, INF], [INF] * 5], "transformer: step 0, head is not finite in {}; largest finite activation before it 4; "),
        ([[1, 2, 3, 4, 5]], "sampler: the latents are not finite although every velocity is"),
    ],
)  # fmt: skip
def test_denoise(dtype, absmax, message):
    with pytest.raises(NonFiniteError) as caught:
        diagnose.explain_denoise(Transformer(absmax, dtype), {}, denoise, (), {"steps": len(absmax)})
    assert str(caught.value).startswith(message.format(jnp.dtype(dtype).name))


class Layer(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x):
        return x * self.factor * self.param("one", nn.initializers.ones, (), x.dtype)


class Decoder(nn.Module):
    factors: tuple
    dtype: jnp.dtype = jnp.float16

    @nn.compact
    def __call__(self, x):
        for i, factor in enumerate(self.factors):
            x = Layer(factor, name=f"layer_{i}")(x)
        return x


@pytest.mark.parametrize(
    "factors, message",
    [
        ((1e4, 1e4, 1e4), "autoencoder: layer_1 is not finite in float16; "),
        ((1e4, 1e4, 0.0), "autoencoder: layer_1 is not finite in float16; "),  # and NaN from there
        ((6e4,), "autoencoder: layer_0 is not finite in float16; "),
        ((1.0, 2.0), "autoencoder: the image is not finite although every layer is; "),
    ],
)
def test_decode(factors, message):
    """The layer that made it: neither the module that holds it, nor those that hand it on."""
    module, params = Decoder(factors), {f"layer_{i}": {"one": jnp.ones((), jnp.float16)} for i in range(len(factors))}

    def decode(params, x):
        return module.apply({"params": params}, x.astype(jnp.float16)) - jnp.inf

    with pytest.raises(NonFiniteError) as caught:
        diagnose.explain_decode(module, params, decode, jnp.full((2, 3), 2, jnp.float16))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "absmax, message",
    [
        ([1, 2, INF, INF], "text encoder: layers/2 is not finite in bfloat16; "),
        ([1, 2], "text encoder: the final norm is not finite; "),
    ],
)
def test_text(absmax, message):
    probes = {"intermediates": {"layers": {"absmax": (jnp.float32(absmax),)}}}
    encoder = types.SimpleNamespace(apply=lambda *_, mutable: (jnp.zeros(()), probes), dtype=jnp.bfloat16)
    with pytest.raises(NonFiniteError) as caught:
        diagnose.explain_text(encoder, {}, jnp.zeros(3), jnp.zeros(3))
    assert str(caught.value).startswith(message)


def test_a_bad_parameter_is_named_before_anything_is_computed():
    params = {"blocks": {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.float32([1, np.nan])}}}
    for call, what in [
        (lambda: diagnose.explain_denoise(None, params, None, None, None), "transformer"),
        (lambda: diagnose.explain_decode(None, params, None, None), "autoencoder"),
        (lambda: diagnose.explain_text(None, params, None, None), "text encoder"),
    ]:
        with pytest.raises(NonFiniteError, match=f"^{what}: parameter blocks/b/kernel holds NaN or infinity$"):
            call()
