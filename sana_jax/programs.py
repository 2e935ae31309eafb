"""The jitted programs of a pipeline, as functions of parameters and arrays.

Everything that can change without a new program (prompts, guidance scale, flow shift, noise) is an
argument; what cannot (modules, sampler, sizes, with or without guidance) is static.
"""

import contextlib
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


def apply(module, params, *args, method="__call__"):
    """module.apply, in which a float32 module multiplies in float32: a GPU would take TF32."""
    highest = jax.default_matmul_precision("highest")
    with highest if module.dtype == jnp.float32 else contextlib.nullcontext():
        return module.apply({"params": params}, *args, method=method)


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
    network = functools.partial(apply, sana, params)
    states, mask, negative_states, negative_mask = conditions
    if guided:
        states, mask = pairs(negative_states, states), pairs(negative_mask, mask)
    captions = network(states, mask, method="embed_text")
    times = schedule.sigma, network(schedule.t[:, None], method="embed_time")

    def conditional(x, t):
        prompts = captions
        if guided:
            prompts = captions.replace(kv=captions.kv[:, 1::2], bias=captions.bias[1::2])
        return network(x, t[1], prompts, method="velocity")

    def both(x, t):
        v = network(pairs(x, x), t[1], captions, method="velocity")
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
    images = decode(dc_ae, params["dc_ae"], latents)
    finite = jnp.stack([finite, jnp.isfinite(images).all(axis=(1, 2, 3))], axis=1)
    images = to_unit(resize_and_crop(images, *size))
    if output == "uint8":
        images = jnp.round(images * 255).astype(jnp.uint8)
    return images, finite


def decode(dc_ae, params, latents):
    """Model-space latents [b h w c] -> [b H W 3] float32, not clipped."""
    latents = latents.astype(dc_ae.dtype) / dc_ae.scaling_factor
    return apply(dc_ae, params, latents, method="decode").astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="dc_ae")
def decode_program(params, latents, *, dc_ae):
    """(images [b H W 3] in [-1, 1], whether all were finite before they were clipped)."""
    images = decode(dc_ae, params, latents)
    return jnp.clip(images, -1, 1), jnp.isfinite(images).all()


@functools.partial(jax.jit, static_argnames="dc_ae")
def encode_program(params, images, *, dc_ae):
    """Images [b H W 3] in [-1, 1] -> model-space latents [b h w c] float32."""
    latents = apply(dc_ae, params, images, method="encode")
    return latents.astype(jnp.float32) * dc_ae.scaling_factor


@functools.partial(jax.jit, static_argnames="shape")
def initial_latents(seed, indices, shape):
    """Standard normal [len(indices), *shape] float32; image i depends on (seed, i) only."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@functools.partial(jax.jit, static_argnames="gemma2")
def prefix_program(params, ids, *, gemma2):
    """The `Prefix` of ids [1 p], which every text that begins with them can reuse."""
    return apply(gemma2, params, ids, method="encode_prefix")


@functools.partial(jax.jit, static_argnames="gemma2")
def text_program(params, ids, mask, selection, prefix=None, *, gemma2):
    """ids, mask [b m'] -> the states at the selected positions [b m d], and whether all are finite.

    Behind a `prefix` the selection counts from its end, and its first state, BOS, comes first.
    """
    states = apply(gemma2, params, ids, mask, prefix)[:, selection]
    if prefix is not None:
        first = jnp.broadcast_to(prefix.states[:, :1], (ids.shape[0], 1, states.shape[-1]))
        states = jnp.concatenate([first, states], axis=1)
    return states, jnp.isfinite(states).all()
