"""The programs that are worth compiling ahead: a training step of an experiment, and a sampler.

Both are put together as `train.py` and `pipeline.py` put them together, but of shapes: nothing is
read but the headers of local checkpoints.  A model that only has a name is taken in its published form.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import flops, ops, precision, programs, requests
from sana_jax.data import buckets
from sana_jax.data.cached import Cached
from sana_jax.errors import InputError, require_choice
from sana_jax.hub.names import SHORT_NAMES
from sana_jax.models import sana as models
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2, Prefix
from sana_jax.parameters import abstract_parameters
from sana_jax.stacks import DIFFUSERS
from sana_jax.training import initialise, layout, optimizer
from sana_jax.training.objectives import Frozen
from sana_jax.training.state import create
from sana_jax.training.step import make_step

# Short names of hub/names.py -> structure.  Weights of one structure differ by name, programs do not.
SAMPLERS = {
    "sana-0.6b": models.SANA_600M,
    "sana-0.6b-512": models.SANA_600M,
    "sana-1.6b": models.SANA_1600M,
    "sana-1.6b-512": models.SANA_1600M,
    "sana-1.6b-512-multiling": models.SANA_1600M,
    "sana-1.6b-fp16": models.SANA_1600M,
    "sana-1.6b-multiling": models.SANA_1600M,
    "sana-1.6b-2k": models.SANA_1600M_2K,
    "sana-1.6b-4k": models.SANA_1600M_4K,
    "sana-1.5-1.6b": models.SANA_1_5_1600M,
    "sana-1.5-4.8b": models.SANA_1_5_4800M,
    "sana-sprint-0.6b": models.SANA_SPRINT_600M,
    "sana-sprint-1.6b": models.SANA_SPRINT_1600M,
}
PUBLISHED = {DCAE: DC_AE_F32C32_SANA, Gemma2: GEMMA2_2B}
BF16 = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
INSTRUCTION = 206  # tokens of the published instruction, about


class Program(NamedTuple):
    """A function to compile, its arguments as shapes with shardings, and the FLOPs of one call."""

    fn: object
    avals: tuple
    flops: float


def train_step(config, mesh, shape, cached=None, stages=()):
    """The `Program` of a step of `train.py`.

    Args:
      config: an Experiment without stages.
      mesh: of cards, see `mesh_of`.
      shape: (height, width) of the images in pixels.
      cached: whether latents and text states come from a cache; None is as the data source says.
      stages: experiments whose runs the config may name as frozen networks.
    """
    known = {stage.name: stage.model for stage in stages}
    model, optim, batch = config.model, config.optim, config.data.batch
    layout.check_batch(batch, optim.accumulate, mesh)
    abstract = abstract_parameters(model)
    tx = optimizer.make(optim, config.steps, batch, abstract)
    state = jax.eval_shape(lambda params: create(params, tx, optim.ema), abstract)
    placed = layout.state_shardings(state, model, mesh)
    rows = batch_of(config, shape, isinstance(config.data.source, Cached) if cached is None else cached, known)
    constants = frozen_of(config, rows, mesh, known)
    step = make_step(model, config.objective, tx, optim, constants.modules, config.seed)
    step = jax.jit(layout.on_mesh(step, mesh), donate_argnums=0, out_shardings=(placed, None))
    cut = jax.tree.map(lambda _: layout.batch_sharding(mesh), rows)
    avals = layout.with_shardings(state, placed), constants.params, layout.with_shardings(rows, cut)
    return Program(step, avals, flops.train_flops(model, rows, constants))


def batch_of(config, shape, cached, known):
    """{name: jax.ShapeDtypeStruct} of a batch, see `data.loader`."""
    b, length, model = config.data.batch, config.data.tokens, config.model
    names = {"weight": ((b,), jnp.float32), "position": ((b,), jnp.uint32)}
    reads = config.objective.reads
    if "image" in reads:
        names["image"] = ((b, *shape, 3), jnp.uint8)
        if cached and "latent" in reads:
            del names["image"]
            step = _structure(config.frozen.dc_ae, DCAE, known).compression
            names["latent"] = ((b, shape[0] // step, shape[1] // step, model.latent_channels), jnp.float16)
    if cached and "states" in reads:
        names["states"] = ((b, length, model.caption_width), jnp.float16)
        names["mask"] = ((b, length), bool)
    elif "texts" in reads:
        # Two tokens of instruction and caption together are one of both, see `text.tokenize`.
        plain = isinstance(model, Gemma2) or config.frozen.chi == "none"
        total = length if plain else length + INSTRUCTION - 2
        names |= {"ids": ((b, total), jnp.int32), "ids_mask": ((b, total), bool)}
    return {name: jax.ShapeDtypeStruct(*entry) for name, entry in names.items()}


def frozen_of(config, batch, mesh, known):
    """`training.frozen.load` of shapes, laid over the mesh, without what only previews use."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    needed = config.objective.frozen_needed(frozenset(batch))
    loaded, _ = config.objective.load()
    modules = {}
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), loaded)
    for name, cls in (("dc_ae", DCAE), ("text", Gemma2)):
        if name in needed:
            modules[name] = module = _structure(getattr(config.frozen, name), cls, known)
            shapes = abstract_parameters(module)
            params[name] = layout.with_shardings(shapes, layout.param_shardings(shapes, module, mesh))
    if "states" in batch or "ids" in batch and "text" in modules:
        width, length = config.model.caption_width, config.data.tokens
        params["null"] = jax.ShapeDtypeStruct((length, width), jnp.bfloat16, sharding=everywhere)
    if "text" in modules and config.frozen.chi != "none":
        ids = jax.ShapeDtypeStruct((1, INSTRUCTION - 1), jnp.int32)
        make = functools.partial(programs.apply, modules["text"], method="encode_prefix")
        prefix = jax.eval_shape(make, params["text"], ids)
        params["prefix"] = Prefix(*(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere) for a in prefix))
    return Frozen(modules, params)


def _structure(source, cls, known):
    """The module of a stage of the same experiment, of a local checkpoint, or the published one."""
    if isinstance(module := known.get(pathlib.Path(source).name), cls):
        return module
    if source and pathlib.Path(source).exists():
        module, _ = initialise.open_weights(source, cls)
        return module.clone(dtype=precision.without_float16(module.dtype))
    return PUBLISHED[cls].clone(**BF16)


def shapes_of(config):
    """Every (height, width) of the experiment's batches, the most square first, of these the largest."""
    found = buckets.shapes(config.data.size, config.data.buckets)
    return sorted(found, key=lambda shape: (abs(shape[0] / shape[1] - 1), -shape[0] * shape[1]))


def sampler(name, mesh, size=1024, batch=1, steps=None, tokens=300, kernels="auto"):
    """The `Program` from text states to finished pixels, decoder included; text encoding is another one.

    Args:
      name: a short name, such as "sana-1.6b".
      mesh: its "data" axis cuts the batch.
      size: pixels of a side.
      steps: None is the model's own number.
      tokens: of the captions.
      kernels: of both networks, see `ops`.
    Raises InputError: no such model, or a size that it cannot paint.
    """
    module = SAMPLERS[require_choice("sampler", name, tuple(SAMPLERS))]
    dtype = precision.published(SHORT_NAMES[name].rpartition("/")[2])
    require_choice("kernels", kernels, ops.KERNELS)
    module = module.clone(dtype=dtype, param_dtype=dtype, **DIFFUSERS.sana_fields(module.guidance_embed))
    dc_ae = DC_AE_F32C32_SANA.clone(**BF16)
    if size % dc_ae.compression:
        raise InputError(f"size={size}: must be a multiple of {dc_ae.compression}")
    if batch % mesh.shape["data"]:
        raise InputError(f"batch={batch}: must be a multiple of the mesh's data={mesh.shape['data']}")
    sampling = requests.filled({"steps": steps, "guidance_scale": None}, requests.defaults(module))
    plan = requests.plan(
        module, DIFFUSERS, 3.0, sampler=None, **sampling, guidance_interval=requests.EVERYWHERE,
        flow_shift=None, pag_scale=0, pag_layers=None, pag_adaptive_scale=0, guided=True,
    )  # fmt: skip
    side = size // dc_ae.compression

    def rows(shape, dtype, axis=0):
        spec = PartitionSpec(*(None,) * axis, "data")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    text = rows((batch, tokens, module.caption_width), dtype), rows((batch, tokens), bool)
    latents = (batch, side, side, module.latent_channels)
    fresh = rows((plan.steps, *latents), jnp.float32, axis=1) if plan.static["sampler"] == "scm" else None
    params = {}
    for part, one in (("sana", module), ("dc_ae", dc_ae)):
        shapes = abstract_parameters(one)
        params[part] = layout.with_shardings(shapes, layout.param_shardings(shapes, one, mesh))

    def paint(kernels, params, conditions, latents, fresh):
        sana, decoder = (one.clone(kernels=kernels) for one in (module, dc_ae))
        return programs.paint_program(
            params, conditions, latents, *plan.traced, fresh, None,
            sana=sana, dc_ae=decoder, size=(size, size), output="uint8", **plan.static,
        )  # fmt: skip

    conditions = text + (text if plan.static["guided"] else (None, None))
    avals = params, conditions, rows(latents, jnp.float32), fresh
    fn, counted = (functools.partial(paint, name) for name in (kernels, "xla"))  # a kernel hides its loops
    return Program(jax.jit(fn), avals, flops.of(counted, *avals))
