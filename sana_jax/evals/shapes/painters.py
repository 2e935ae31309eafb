"""Where pictures come from: the model, or one of the controls beside it."""

import hashlib

import jax
import numpy as np

from sana_jax.data import shapes_render
from sana_jax.data import shapes_scene as world
from sana_jax.data.shapes import Shapes
from sana_jax.evals.shapes.prompts import asked_for


def sampled(pipeline, seed, **options):
    """Pictures of the prompts, through `Pipeline.generate`; picture i begins with the noise (seed, i)."""

    def paint(lines, numbers):
        prompts = [line["prompt"] for line in lines]
        return pipeline.generate(prompts, seed=seed, first_image=list(numbers), bin_resolution=False, **options)

    return paint


def without_text(pipeline, seed, **options):
    """Pictures of the empty prompt, judged as if they were of the prompts: what chance alone scores."""
    paint = sampled(pipeline, seed, **options | {"guidance_scale": 1.0})
    return lambda lines, numbers: paint([{"prompt": ""}] * len(lines), numbers)


def truth(size, seed):
    """Pictures that the world itself paints of what is asked for: what the detector scores."""

    def paint(lines, numbers):
        return painted([scene(line, i, size, seed) for line, i in zip(lines, numbers)], size)

    return paint


def reconstructed(pipeline, size, seed):
    """`truth` through the autoencoder and back: what a perfect transformer would score."""
    paint = truth(size, seed)
    return lambda lines, numbers: through(pipeline, paint(lines, numbers))


def through(pipeline, pictures):
    """uint8 [b H W 3] through the autoencoder and back."""
    decoded = pipeline.decode(pipeline.encode(pictures.astype(np.float32) / 127.5 - 1))
    return np.rint(np.asarray(decoded) * 127.5 + 127.5).astype(np.uint8)


def scene(line, number, size, seed):
    """A Scene of what a line of metadata asks for, nothing else in it."""
    things, relation = asked_for(line)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    height, width = (side / min(size) for side in size)
    return world.compose(rng, things, width, height, ((0, relation, 1),) if relation else ())


def painted(scenes, size):
    """uint8 [b H W 3] of scenes, as the training source paints them."""
    return np.asarray(_paint(np.stack([shapes_render.pack(scene) for scene in scenes]), *size))


_paint = jax.jit(Shapes().open().paint, static_argnums=(1, 2))


def fingerprint(pipeline):
    """sha256 of all parameters, so that a run is not continued with other weights."""
    parts = [pipeline.sana[1], pipeline.dc_ae[1], pipeline.text and pipeline.text.params]
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()
