"""Pictures of what a run has learned: always of the same prompts and noise, or of the same records.

flow: a grid of paintings.  Without prompts, the captions of the first batch are painted, each below
  its own picture, and the distance between their latents is measured.
autoencoder: the pictures of the first batch, and below them what is left of them.
"""

import dataclasses
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import programs
from sana_jax.data.loader import Loader
from sana_jax.errors import InputError
from sana_jax.images import contact_sheet, save_png
from sana_jax.programs import apply
from sana_jax.resolution import to_unit
from sana_jax.sampling import flow_dpm_solver
from sana_jax.training.objectives import Autoencoder, Flow
from sana_jax.training.objectives.flow import signed, text_states

ROWS = 8  # records that are shown
BATCHES = 20  # within which a good one must be
EVERYWHERE = (0.0, 1.0)  # noise levels with guidance
COLUMNS, SIDE, LABEL = 4, 256, 40  # of a grid: pictures in a row, their pixels, letters of a label


class Previewer:
    """previewer(step, state, metrics) writes previews/00000500.png in the run's folder, and shows it
    and its numbers in the metrics.  All processes call it alike; the first one writes.

    Attributes:
      every: steps between two, 0 where the experiment has none.
    """

    def __init__(self, config, frozen, mesh, reader, tokenize=None):
        """Args:
          config: an `Experiment`.
          frozen: `Frozen`, for flow with "dc_ae", and with "text" and "null" where captions are texts.
          mesh: of the state.
          reader: of the data source.
          tokenize: texts -> {"ids", "ids_mask"}, as the loader's; None where batches hold states.
        Raises:
          InputError: something that these previews need is missing.
        """
        kind = {Autoencoder: _reconstructions, Flow: _paintings}.get(type(config.objective))
        self.every = config.preview.every if kind else 0
        self._folder = pathlib.Path(config.workdir, "previews")
        if self.every:
            self._make = kind(config, frozen, NamedSharding(mesh, PartitionSpec()), reader, tokenize)

    def __call__(self, step, state, metrics):
        if not self.every:
            return
        grid, numbers = self._make(state, f"step {step}")
        if jax.process_index():
            return
        texts = {name: f"{value:.4f}" for name, value in numbers.items()}
        try:
            save_png(self._folder / f"{step:08d}.png", grid, texts)
        except InputError as error:  # a full disk: no reason to stop
            metrics.say(f"preview: {error}")
        metrics.picture("preview", step, grid)
        metrics.event("preview", step=step, **numbers)


def first_rows(reader, config, tokenize=None):
    """A batch of the first ROWS records in the order of this experiment, without the bad ones.

    Raises InputError: all of them are bad.
    """
    data = dataclasses.replace(
        config.data, batch=ROWS, workers=0, threads=1, buffer=1, bad_share=1.0, bad_window=ROWS * BATCHES
    )
    with Loader(reader, data, seed=config.seed, tokenize=tokenize, inputs=config.objective.reads) as loader:
        for _ in range(BATCHES):
            batch = next(loader)
            good = batch["weight"] > 0
            if "scene" in batch:
                paint = jax.jit(reader.paint, static_argnums=(1, 2))
                batch["image"] = np.asarray(paint(batch.pop("scene"), *loader.shape))
            if good.any():
                return {name: rows[good] for name, rows in batch.items()}
    raise InputError(f"data.source: no good record in {BATCHES * ROWS}, for previews; preview.every=0 makes none")


def _reconstructions(config, frozen, everywhere, reader, tokenize):
    """preview(state, title) -> (grid uint8 [H W 3], {name: number})."""
    del frozen, tokenize
    pictures = first_rows(reader, config)["image"]

    def reconstruct(params, pictures):
        images = signed(pictures)
        out = apply(config.model, params, images).astype(jnp.float32)
        error = jnp.mean(jnp.square(jnp.clip(out, -1, 1) - images), axis=(1, 2, 3))
        return _uint8(out), 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))

    program = jax.jit(reconstruct, out_shardings=everywhere)
    placed = _put(pictures, everywhere)

    def preview(state, title):
        out, psnr = map(np.asarray, program(_shown(state), placed))
        labels = [f"{value:.1f} dB" for value in psnr]
        return _below(pictures, out, labels, title), {"psnr": float(psnr.mean())}

    return preview


def _paintings(config, frozen, everywhere, reader, tokenize):
    """As `_reconstructions`."""
    if "dc_ae" not in frozen.modules:
        raise InputError("frozen.dc_ae='': previews need the autoencoder; preview.every=0 makes none")
    wanted, model, dc_ae = config.preview, config.model, frozen.modules["dc_ae"]
    shown = None
    if wanted.prompts:
        side = wanted.size or config.data.size
        batch, grid = _tokens(wanted.prompts, frozen, tokenize), (side // dc_ae.compression,) * 2
    else:
        batch = first_rows(reader, config, tokenize)
        shown = _latents(batch, frozen, everywhere)
        grid = shown.shape[1:3]
    conditions = _conditions(batch, frozen, wanted.guidance_scale, everywhere)
    count, shape = conditions[0].shape[0], (*grid, model.latent_channels)
    schedule = flow_dpm_solver.schedule(wanted.steps, config.objective.shift)
    constants = conditions, schedule, np.float32(wanted.guidance_scale)

    def paint(params, dc_ae_params, conditions, schedule, scale, shown):
        noise = programs.initial_latents(np.uint32(wanted.seed), np.arange(count, dtype=np.uint32), shape)
        latents = programs.denoise(
            model, params, conditions, noise, schedule, scale, EVERYWHERE,
            sampler="flow-dpm-solver", guided=conditions[2] is not None, limited=False,
        )  # fmt: skip
        painted = _uint8(programs.decode(dc_ae, dc_ae_params, latents))
        if shown is None:
            return painted, None, None
        originals = _uint8(programs.decode(dc_ae, dc_ae_params, shown))
        return painted, originals, jnp.mean(jnp.square(latents - shown), axis=(1, 2, 3))

    program, dc_ae_params = jax.jit(paint, out_shardings=everywhere), frozen.params["dc_ae"]

    def preview(state, title):
        painted, originals, distance = program(_shown(state), dc_ae_params, *constants, shown)
        painted = np.asarray(painted)
        if originals is None:
            cells = list(zip(painted, (textwrap.shorten(prompt, LABEL) for prompt in wanted.prompts)))
            return contact_sheet(cells, min(len(cells), COLUMNS), title, SIDE), {}
        distance = np.asarray(distance)
        grid = _below(np.asarray(originals), painted, [f"{d:.3f}" for d in distance], title)
        return grid, {"distance": float(distance.mean())}

    return preview


def _tokens(prompts, frozen, tokenize):
    if tokenize is None or "text" not in frozen.modules:
        raise InputError("frozen.text='': preview.prompts need the text encoder; without prompts the data's are painted")
    return tokenize(list(prompts))


def _conditions(batch, frozen, scale, everywhere):
    """(states, mask, negative states, negative mask); the last two None without guidance.

    The unconditional half is the empty caption, of which BOS alone is valid.
    """
    if scale != 1 and "null" not in frozen.params:
        raise InputError(f"preview.guidance_scale={scale}: needs the states of the empty caption; 1 is no guidance")

    def encode(captions, params):
        states, mask = text_states(frozen._replace(params=params), captions)
        if scale == 1:
            return states, mask, None, None
        null = jnp.broadcast_to(params["null"][: states.shape[1]], states.shape).astype(states.dtype)
        bos = jnp.broadcast_to(jnp.arange(mask.shape[1]) == 0, mask.shape)
        return states, mask, null, bos

    captions = {name: batch[name] for name in ("ids", "ids_mask", "states", "mask") if name in batch}
    return jax.jit(encode, out_shardings=everywhere)(_put(captions, everywhere), frozen.params)


def _latents(batch, frozen, everywhere):
    """[b h w c] float32 in model space, of the pictures or latents of a batch."""
    dc_ae = frozen.modules["dc_ae"]

    def scaled(latent, params):
        if latent.dtype == jnp.uint8:
            latent = apply(dc_ae, params, signed(latent), method="encode")
        return latent.astype(jnp.float32) * dc_ae.scaling_factor

    rows = batch["latent"] if "latent" in batch else batch["image"]
    return jax.jit(scaled, out_shardings=everywhere)(_put(rows, everywhere), frozen.params["dc_ae"])


def _put(tree, everywhere):
    """Host arrays, the same on all processes, as arrays that every device holds whole."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(everywhere, np.asarray(a)), tree)


def _shown(state):
    return state.params if state.ema is None else state.ema


def _uint8(images):
    return jnp.round(to_unit(images) * 255).astype(jnp.uint8)


def _below(originals, made, labels, title):
    """A grid of two rows."""
    cells = [*((image, "") for image in originals), *zip(made, labels)]
    return contact_sheet(cells, len(made), title, SIDE)
