"""Where pictures come from: the model, or one of the controls beside it."""

import hashlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.data import shapes_render
from sana_jax.data import shapes_scene as world
from sana_jax.data.shapes import Shapes
from sana_jax.evals.shapes import detector
from sana_jax.evals.shapes.prompts import asked_for, fingerprint
from sana_jax.loading import load_pipeline

TRUTH = 20241014  # begins the key of what `truth` draws: no stream of training's
UNROLL = 64  # blocks at most, more than a model of shapes has
UNKNOWN = r"prompts\[\d+\]: not in "  # what a warning of unknown words begins with; they are counted instead


def load(model=None):
    """`load_pipeline` with the transformer's blocks in sequence: it compiles longer, and a CPU core then paints 90 in the
    place of 64 (docs/log.md); the same pictures but for rounding."""
    return load_pipeline(model, transformer={"unroll": UNROLL})


def sampled(pipeline, seed, **options):
    """Pictures of the prompts, through `Pipeline.generate`; picture i begins with the noise (seed, i).

    Unknown words are not warned of: see `unknown`.
    """

    def paint(lines, numbers):
        prompts = [line["prompt"] for line in lines]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=UNKNOWN)
            return pipeline.generate(prompts, seed=seed, first_image=list(numbers), bin_resolution=False, **options)

    return paint


def unknown(pipeline, lines):
    """How many prompts have a word that the model was not trained with; None where it does not say."""
    words = pipeline.text and pipeline.text.vocabulary
    return sum(bool(words.remark(line["prompt"])) for line in lines) if words else None


def without_text(pipeline, seed, **options):
    """Pictures of the empty prompt, judged as if they were of the prompts: what chance alone scores."""
    paint = sampled(pipeline, seed, **options | {"guidance_scale": 1.0})
    return lambda lines, numbers: paint([{"prompt": ""}] * len(lines), numbers)


def truth(size, seed, unit=None):
    """Pictures that the world itself paints of what is asked for: what the detector scores.

    unit: pixels of which lengths are shares; the shorter side if left out.
    """

    def paint(lines, numbers):
        return painted([scene(line, i, size, seed, unit) for line, i in zip(lines, numbers)], size)

    return paint


def reconstructed(pipeline, size, seed, unit=None):
    """`truth` through the autoencoder and back: what a perfect transformer would score."""
    paint = truth(size, seed, unit)
    return lambda lines, numbers: through(pipeline, paint(lines, numbers))


def through(pipeline, pictures):
    """uint8 [b H W 3] through the autoencoder and back."""
    decoded = pipeline.decode(pipeline.encode(pictures.astype(np.float32) / 127.5 - 1))
    return np.rint(np.asarray(decoded) * 127.5 + 127.5).astype(np.uint8)


def scene(line, number, size, seed, unit=None):
    """A Scene of what a line of metadata asks for, nothing else in it."""
    things, relation = asked_for(line)
    rng = np.random.default_rng([TRUTH, seed, number])
    height, width = (side / (unit or min(size)) for side in size)
    return world.compose(rng, things, width, height, ((0, relation, 1),) if relation else ())


def painted(scenes, size):
    """uint8 [b H W 3] of scenes, as the training source paints them."""
    return np.asarray(_paint(np.stack([shapes_render.pack(scene) for scene in scenes]), *size))


_paint = jax.jit(Shapes().open().paint, static_argnums=(1, 2))


def identity(pipeline, split):
    """What pictures and verdicts depend on beside the arguments of `Pipeline.generate`, as JSON values.

    A run goes on only where all of it is the same.
    """
    parts = [pipeline.sana[0], pipeline.dc_ae[0], pipeline.text.gemma2]
    words = pipeline.text.vocabulary
    return {
        "weights": weights(pipeline),
        "dtype": [jnp.dtype(module.dtype).name for module in parts],
        "stack": pipeline.stack.name,
        "instruction": _sha256(pipeline.instruction().text),
        "max_sequence_length": pipeline.defaults["max_sequence_length"],
        "vocabulary": words and _sha256(json.dumps(sorted(words.words))),
        "prompts": fingerprint(split),
        "detector": detector.VERSION,
    }


def weights(pipeline):
    """sha256 of all parameters."""
    parts = [pipeline.sana[1], pipeline.dc_ae[1], pipeline.text.params]
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()
