"""The parameters that a new run starts from: random, another run's, published ones, or a shallower model's.

Random ones are those of the modules themselves, which hold the published initialisation
(docs/numerics.md 5) but for another `Sana.caption_scale`; every device makes its own part of them.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax import components, overrides
from sana_jax.checkpoints.read import read_json
from sana_jax.errors import CheckpointError, InputError
from sana_jax.hub.download import find_model
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import abstract_parameters, parameter_shapes
from sana_jax.training.layout import param_shardings
from sana_jax.training.reading import read_params

PREPARE = {
    Sana: ("transformer", components.prepare_sana),
    DCAE: ("vae", components.prepare_dc_ae),
    Gemma2: ("text_encoder", components.prepare_gemma2),
}
CONFIG = "config.json"  # of a run, in its folder
LAYERS = ("blocks/", "key_value/")  # paths of what is stacked over the layers of a Sana
OUTPUTS = ("blocks/self_attn/out/", "blocks/cross_attn/out/", "blocks/mix_ffn/project/")


def parameters(model, init, mesh, seed):
    """The parameters of a new run, global arrays laid over `mesh` by the model's table.

    Args:
      model: Sana, DCAE or Gemma2; position embedding and sample size have no parameters, so that a
        model of another resolution takes them all.
      init: an `experiment.Init`.
      seed: of what is random.
    Raises:
      InputError: no such weights.  CheckpointError: weights that are not this model's, all names at once.
    """
    fresh = functools.partial(_random, model, mesh)
    if not init.weights:
        return fresh(seed)
    source, read = open_weights(init.weights, type(model), init.ema, param_dtype=model.param_dtype)
    wanted = model if init.grow is None else model.clone(depth=source.depth)
    if init.grow is not None and source.depth < init.grow:
        raise InputError(f"init.grow={init.grow}: {init.weights} has only {source.depth} blocks")
    require_same(parameter_shapes(wanted), parameter_shapes(source), init.weights)
    params = read(mesh)
    return params if init.grow is None else grow(params, fresh(seed), init.grow)


def _random(model, mesh, seed):
    shardings = param_shardings(abstract_parameters(model), model, mesh)
    make = jax.jit(lambda key: model.init(key, *model.example_inputs())["params"], out_shardings=shardings)
    return make(jax.random.key(seed))


def require_same(wanted, found, source):
    """Raises CheckpointError unless both {path: shape} are the same; it lists everything."""
    problems = [
        f"{path}: {found.get(path, 'absent')}, the model has {wanted.get(path, 'no such parameter')}"
        for path in sorted(wanted.keys() | found.keys())
        if wanted.get(path) != found.get(path)
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{source}: {len(problems)} parameters do not fit the model", *problems]))


def grow(shallow, fresh, count):
    """The first `count` layers of `shallow`, then those of the deeper `fresh` as the identity.

    A block adds three branches to its input; where their last projections are zero, it adds nothing
    (SANA-1.5, https://arxiv.org/abs/2501.18427, section 2.1).  All that is no layer comes from `shallow`.
    """
    old, new = flatten_dict(shallow, sep="/"), flatten_dict(fresh, sep="/")

    def joined(path, a, b):
        if not path.startswith(LAYERS):
            return a
        rest = jnp.zeros_like(b[count:]) if path.startswith(OUTPUTS) else b[count:]
        return jnp.concatenate([a[:count], rest])

    join = jax.jit(
        lambda old, new: {path: joined(path, old[path], new[path]) for path in new},
        out_shardings={path: leaf.sharding for path, leaf in new.items()},
    )
    return unflatten_dict(join(old, new), sep="/")


def is_run(path):
    """Whether a folder is that of a run of `train.py`."""
    return (pathlib.Path(path) / "checkpoints").is_dir()


def run_config(run_dir):
    """config.json of a run's folder, `experiment.describe` of what is trained there.  Raises InputError."""
    file = pathlib.Path(run_dir) / CONFIG
    config = read_json(file)
    if absent := [name for name in ("model", "objective", "optim", "frozen") if not isinstance(config.get(name), dict)]:
        raise InputError(f"{file}: has no {', '.join(absent)}, it is not that of a run")
    return config


def has_steps(path):
    """Whether a run has a checkpoint, usable or not."""
    folder = pathlib.Path(path) / "checkpoints"
    return folder.is_dir() and any(folder.iterdir())


def run_model(run_dir):
    """The module that a run trains, from its config.json."""
    file, described = pathlib.Path(run_dir) / CONFIG, run_config(run_dir)["model"]
    classes = {cls.__name__: cls for cls in PREPARE}
    if described.get("class") not in classes:
        raise InputError(f"{file}: model is not one of {', '.join(classes)}")
    fields = {name: value for name, value in described.items() if name != "class"}
    module, problems = overrides.override(classes[described["class"]](), fields)
    if problems:
        raise InputError("\n  ".join([f"{file}:", *(f"model.{problem}" for problem in problems)]))
    return module


def open_weights(source, cls, ema=True, **fields):
    """(module, `read(mesh)` -> parameters) of a run's folder, or of a published folder, file or name.

    Without a mesh, None, `read` returns host arrays.

    Args:
      cls: Sana, DCAE or Gemma2.
      ema: of a run that has a moving average, take that.
      fields: of the module in place of the stored ones, such as dtype and param_dtype.
    Raises InputError: not there, or another kind of model.
    """
    part, prepare = PREPARE[cls]
    if is_run(source):
        module = run_model(source)
        if not isinstance(module, cls):
            raise InputError(f"{source}: is a run of a {type(module).__name__}, needed is a {cls.__name__}")
        module, problems = overrides.override(module, fields)
        if problems:
            raise InputError("; ".join(problems))
        return module, lambda mesh: _place(read_run(source, ema), module, mesh)
    path = pathlib.Path(find_model(source, part=part))
    prepared = prepare(path / part if (path / part).is_dir() else path, **fields)
    return prepared.module, lambda mesh: (prepared.read_on_host() if mesh is None else prepared.read(mesh))[1]


def read_run(run_dir, ema=True, step=None):
    """Host arrays of a run's parameters; its average if `ema` and if it has one."""
    return read_params(run_dir, ema=ema and run_config(run_dir)["optim"]["ema"] is not None, step=step)


def _place(params, module, mesh):
    """Host arrays, the same in every process, as global arrays; each device gets its own part."""
    dtype = jnp.dtype(module.param_dtype)
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def put(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index].astype(dtype))

    return jax.tree.map(put, params, param_shardings(params, module, mesh))
