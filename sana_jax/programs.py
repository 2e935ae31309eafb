"""The jitted programs of a pipeline, as functions of parameters and arrays.

Everything that can change without a new program (prompts, guidance scale, flow shift, noise) is an
argument; what cannot (modules, sampler, sizes, with or without guidance) is static.
"""

import functools

import jax
import jax.numpy as jnp

from sana_jax.resolution import resize_and_crop, to_unit
from sana_jax.sampling import flow_dpm_solver as dpm
from sana_jax.sampling import flow_euler as euler
from sana_jax.sampling import guidance

SAMPLERS = {
    "flow-dpm-solver": (dpm.schedule, dpm.flow_dpm_solver),
    "flow-euler": (euler.schedule, euler.flow_euler),
}


def pairs(a, b):
    """[b ...], [b ...] -> [2b ...], rows alternating.

    The halves of guidance stay neighbours: a batch that is sharded over devices then needs no
    exchange between them, which the usual concatenation does.
    """
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def denoise(sana, params, conditions, latents, schedule, scale, interval, *, sampler, guided, limited):
    """conditions (states, mask, negative states, negative mask) and noise -> x_0 [b h w c] float32.

    What does not depend on the step is computed here, before the solver's scan: the captions' MLP,
    the keys and values of all layers, the modulation of all times.
    """
    apply = functools.partial(sana.apply, {"params": params})
    states, mask, negative_states, negative_mask = conditions
    if guided:
        states, mask = pairs(negative_states, states), pairs(negative_mask, mask)
    captions = apply(states, mask, method="embed_text")
    times = schedule.sigma, apply(schedule.t[:, None], method="embed_time")

    def conditional(x, t):
        prompts = captions
        if guided:
            prompts = captions.replace(kv=captions.kv[:, 1::2], bias=captions.bias[1::2])
        return apply(x, t[1], prompts, method="velocity")

    def both(x, t):
        v = apply(pairs(x, x), t[1], captions, method="velocity")
        v = v.reshape(-1, 2, *x.shape[1:])
        return v[:, 0], v[:, 1]

    velocity = conditional
    if guided:
        velocity = guidance.classifier_free(both, scale)
    if guided and limited:
        velocity = guidance.within(velocity, conditional, interval, sigma=lambda t: t[0])
    return SAMPLERS[sampler][1](velocity, latents, schedule, times)


@functools.partial(jax.jit, static_argnames=("sana", "sampler", "guided", "limited"))
def denoise_program(params, conditions, latents, schedule, scale, interval, *, sana, **static):
    """`denoise` as one program, keyed by the shapes of its arguments and the static names."""
    return denoise(sana, params, conditions, latents, schedule, scale, interval, **static)


@functools.partial(
    jax.jit, static_argnames=("sana", "dc_ae", "sampler", "guided", "limited", "size", "output")
)
def paint_program(
    params, conditions, latents, schedule, scale, interval, *, sana, dc_ae, size, output, **static
):
    """Prompt states to pixels of `size` (H, W) in one program: (output, finite [b, 2]).

    `finite` says for each image whether its latent and its pixels are finite, before anything is
    clipped or rounded: a NaN must not become a black picture.
    """
    latents = denoise(sana, params["sana"], conditions, latents, schedule, scale, interval, **static)
    finite = jnp.isfinite(latents).all(axis=(1, 2, 3))
    if output == "latent":
        return latents, jnp.stack([finite, finite], axis=1)
    images = decode(dc_ae, params["dc_ae"], latents).astype(jnp.float32)
    finite = jnp.stack([finite, jnp.isfinite(images).all(axis=(1, 2, 3))], axis=1)
    images = to_unit(resize_and_crop(images, *size))
    if output == "uint8":
        images = jnp.round(images * 255).astype(jnp.uint8)
    return images, finite


def decode(dc_ae, params, latents):
    """Model-space latents [b h w c] -> [b H W 3], not clipped."""
    latents = latents.astype(dc_ae.dtype) / dc_ae.scaling_factor
    return dc_ae.apply({"params": params}, latents, method="decode")


@functools.partial(jax.jit, static_argnames="dc_ae")
def decode_program(params, latents, *, dc_ae):
    return decode(dc_ae, params, latents)


@functools.partial(jax.jit, static_argnames="dc_ae")
def encode_program(params, images, *, dc_ae):
    return dc_ae.apply({"params": params}, images, method="encode") * dc_ae.scaling_factor


@functools.partial(jax.jit, static_argnames="shape")
def initial_latents(seed, indices, shape):
    """Standard normal [len(indices), *shape] float32; image i depends on (seed, i) only."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@functools.partial(jax.jit, static_argnames="gemma2")
def text_program(params, ids, mask, selection, *, gemma2):
    """ids, mask [b m'] -> the states at the selected positions [b m d], and whether all are finite."""
    states = gemma2.apply({"params": params}, ids, mask)[:, selection]
    return states, jnp.isfinite(states).all()
