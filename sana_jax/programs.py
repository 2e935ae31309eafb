"""The jitted programs of a pipeline, as functions of parameters and arrays.

Everything that can change without a new program (prompts, guidance scale, flow shift, noise) is an
argument; what cannot (modules, sampler, sizes, with or without guidance) is static.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import progress
from sana_jax.models.embeddings import Time
from sana_jax.resolution import resize_and_crop, to_unit
from sana_jax.sampling import flow_dpm_solver as dpm
from sana_jax.sampling import flow_euler as euler
from sana_jax.sampling import guidance, scm

SAMPLERS = {
    "flow-dpm-solver": (dpm.schedule, dpm.flow_dpm_solver),
    "flow-euler": (euler.schedule, euler.flow_euler),
    "scm": (scm.schedule, scm.scm),
}


class Times(NamedTuple):
    """What the velocity gets as its time, each with leading axis steps before the sampler's scan."""

    step: jax.Array
    t: jax.Array
    sigma: jax.Array
    embedding: Time


class Perturbation(NamedTuple):
    """Perturbed-attention guidance: its `scale`, the layers [l] bool without attention, its `decay`."""

    scale: jax.Array
    layers: jax.Array
    decay: jax.Array


def apply(module, params, *args, method="__call__"):
    """module.apply, in which a float32 module multiplies in float32: a GPU would take TF32."""
    highest = jax.default_matmul_precision("highest")
    with highest if module.dtype == jnp.float32 else contextlib.nullcontext():
        return module.apply({"params": params}, *args, method=method)


def interleave(*arrays):
    """k arrays [b ...] -> [k b ...], rows alternating.

    The branches of guidance stay neighbours: a batch that is sharded over devices then needs no
    exchange between them, which the usual concatenation does.
    """
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def branch(array, count, i, axis=0):
    """The i-th of `count` arrays that were interleaved along `axis`."""
    shape = array.shape
    array = array.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
    return jax.lax.index_in_dim(array, i, axis + 1, keepdims=False)


def embedded_guidance(scale, dtype):
    """0.1 * scale as Sprint is told it: the scale is rounded to the text's dtype before the product."""
    return (0.1 * jnp.asarray(scale, dtype).astype(jnp.float32)).astype(dtype)


def denoise(
    sana, params, conditions, latents, schedule, scale, interval, pag=None, step_noise=None, data=None,
    listener=None, *, sampler, guided, limited,
):  # fmt: skip
    """Noise to x_0 [b h w c] float32; what does not depend on the step is computed before the scan:
    the captions' MLP, the keys and values of all layers, the modulation of all times.

    Args:
      conditions: (states, mask, negative states, negative mask); the last two None unless `guided`.
      latents: [b h w c], the noise.
      schedule: of the sampler.
      scale: guidance scale; SANA-Sprint embeds it.
      interval: noise levels between which guidance acts, where `limited`.
      pag: a `Perturbation`, or None.
      step_noise, data: [s b h w c] and [b h w c] or None, for "scm": see `scm.scm`.
      listener: a number from `progress.listening`, or None.
    """
    network = functools.partial(apply, sana, params)
    states, mask, negative_states, negative_mask = conditions
    texts = [(states, mask)]  # one for each branch of guidance
    if guided:
        texts.insert(0, (negative_states, negative_mask))
    perturbed = None
    if pag is not None:
        texts.append((states, mask))
        last = jnp.arange(len(texts) * len(states)) % len(texts) == len(texts) - 1
        perturbed = pag.layers[:, None] & last
    count = len(texts)
    captions = network(*(interleave(*column) for column in zip(*texts)), method="embed_text")
    told = embedded_guidance(scale, states.dtype) if sana.guidance_embed else None
    embedding = network(schedule.t[:, None], told, method="embed_time")
    times = Times(jnp.arange(len(schedule.t)), schedule.t, schedule.sigma, embedding)

    def branches(x, t):
        v = network(interleave(*[x] * count), t.embedding, captions, perturbed, method="velocity")
        return [branch(v, count, i) for i in range(count)]

    def conditional(x, t):
        prompts = captions
        if count > 1:
            prompts = captions.replace(
                kv=branch(captions.kv, count, int(guided), axis=1), bias=branch(captions.bias, count, int(guided))
            )
        return network(x, t.embedding, prompts, method="velocity")

    velocity = conditional
    if pag is not None:
        strength = functools.partial(guidance.fading, pag.scale, pag.decay)
        velocity = guidance.perturbed_attention(branches, scale, lambda t: strength(t.t))
    elif guided:
        velocity = guidance.classifier_free(branches, scale)
    if count > 1 and limited:
        velocity = guidance.within(velocity, conditional, interval, sigma=lambda t: t.sigma)
    if listener is not None:
        velocity = progress.announced(velocity, listener)
    if sampler == "scm":
        return scm.scm(velocity, latents, schedule, step_noise, data, times)
    return SAMPLERS[sampler][1](velocity, latents, schedule, times)


@functools.partial(jax.jit, static_argnames=("sana", "sampler", "guided", "limited"))
def denoise_program(params, conditions, latents, *arguments, sana, listener=None, **static):
    """`denoise` as one program, keyed by the shapes of its arguments and the static names."""
    return denoise(sana, params, conditions, latents, *arguments, listener=listener, **static)


@functools.partial(
    jax.jit, static_argnames=("sana", "dc_ae", "sampler", "guided", "limited", "size", "output")
)
def paint_program(
    params, conditions, latents, *arguments, sana, dc_ae, size, output, listener=None, **static
):
    """Prompt states to pixels of `size` (H, W) in one program: (output, finite [b, 2]).

    `finite` says for each image whether its latent and its pixels are finite, before anything is
    clipped or rounded: a NaN must not become a black picture.
    """
    latents = denoise(
        sana, params["sana"], conditions, latents, *arguments, listener=listener, **static
    )
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


@functools.partial(jax.jit, static_argnames=("height", "width"))
def fit_image(images, *, height, width):
    """[b H W 3], uint8 or float in [0, 1] -> [b height width 3] in [-1, 1]: the centre that has this
    shape, resized with antialiasing."""
    _, tall, wide, _ = images.shape
    side = min(tall / height, wide / width)
    cut_h, cut_w = (min(max(round(n * side), 1), most) for n, most in ((height, tall), (width, wide)))
    top, left = (tall - cut_h) // 2, (wide - cut_w) // 2
    scale = 127.5 if images.dtype == jnp.uint8 else 0.5
    images = images[:, top : top + cut_h, left : left + cut_w].astype(jnp.float32) / scale - 1
    shape = (images.shape[0], height, width, 3)
    return jnp.clip(jax.image.resize(images, shape, "bilinear", antialias=True), -1, 1)


@functools.partial(jax.jit, static_argnames="shape")
def initial_latents(seed, indices, shape):
    """Standard normal [len(indices), *shape] float32; image i depends on (seed, i) only."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


@functools.partial(jax.jit, static_argnames=("steps", "shape"))
def step_noise(seed, indices, steps, shape):
    """Standard normal [steps, len(indices), *shape] float32, keyed (seed, image, step).

    Steps are folded in first and counted down from the largest number, where no image's key lies.
    """
    key = jax.random.key(seed)

    def draw(step):
        step_key = jax.random.fold_in(key, np.uint32(2**32 - 1) - step)
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(step_key, i), shape))(indices)

    return jax.vmap(draw)(jnp.arange(steps, dtype=jnp.uint32))


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
