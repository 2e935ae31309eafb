"""Where a training state and its batches live on a mesh.

Weights are cut by the table of their model (sharding.py), whatever an optimizer keeps for a
weight is cut as the weight is, and batches are cut along "data" and "fsdp" together:  every device
has its own rows, and those along "tensor" share theirs.
"""

import collections
import functools
import math

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import sharding
from sana_jax.components import sharding_table
from sana_jax.errors import InputError

ROWS = ("data", "fsdp")  # the axes of the mesh that cut a batch
HOST_ONLY = ("bad",)  # entries of a batch that no device needs

# What a factored second moment keeps of a weight -> the axis of the weight that it has not.
FACTORS = {"row": -1, "col": -2}


def mesh_sizes(sizes, devices=None):
    """{axis: size} of an `experiment.Mesh` on so many devices (all that jax has): -1 is what is left.

    Raises InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count() if devices is None else devices
    given = {axis: getattr(sizes, axis) for axis in sharding.AXES}
    known = math.prod(size for size in given.values() if size != -1)
    found = {axis: devices // known if size == -1 else size for axis, size in given.items()}
    if list(given.values()).count(-1) > 1 or math.prod(found.values()) != devices:
        words = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items())
        raise InputError(f"{words}: must multiply to the number of devices, {devices}; one may be -1, what is left")
    return found


def param_shardings(abstract_params, module, mesh):
    """The tree of NamedShardings of a model's parameters, nested as they are.

    Raises InputError: the mesh has an axis that is not known.
    """
    flat = flatten_dict(abstract_params, sep="/")
    placed = sharding.shardings({path: a.shape for path, a in flat.items()}, sharding_table(module), mesh)
    return unflatten_dict(placed, sep="/")


def state_shardings(abstract_state, module, mesh):
    """The tree of NamedShardings of a TrainState (or of any tree that holds a model's parameters and
    what an optimizer keeps for them).

    A leaf belongs to the parameter whose path its own path ends with, perhaps with one of "row",
    "col" and "full" behind it (see `came.py`); scalars are everywhere.
    Args:
      abstract_state: with a field `params`; leaves are arrays or jax.ShapeDtypeStructs.
      module: the Sana, DCAE or Gemma2 that the parameters belong to.
    Raises ValueError: a leaf with axes belongs to no parameter or has not its shape.
    """
    shapes = {path: a.shape for path, a in flatten_dict(abstract_state.params, sep="/").items()}
    placed = sharding.shardings(shapes, sharding_table(module), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    out, problems = [], []
    for keys, leaf in _leaves(abstract_state):
        found = everywhere if leaf.ndim == 0 else _sharding_of(_path(keys), leaf.shape, shapes, placed)
        if found is None:
            problems.append(f"{jax.tree_util.keystr(keys)} {leaf.shape}")
        out.append(found)
    if problems:
        raise ValueError(
            "no parameter has the path and shape of these leaves of the state:\n  " + "\n  ".join(problems)
        )
    return jax.tree.unflatten(jax.tree.structure(abstract_state), out)


def with_shardings(abstract, shardings):
    """A tree of shapes, each with its sharding: what compiling and restoring want to know."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _path(keys):
    """The names of dicts alone: fields of optimizer states stand before a parameter's path."""
    return "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


def _sharding_of(path, shape, shapes, placed):
    """The sharding of a leaf of the state, None where it is no parameter's."""
    while path:
        owner, _, last = path.rpartition("/")
        if shapes.get(path) == shape or (last == "full" and shapes.get(owner) == shape):
            return placed[path if path in shapes else owner]
        if last in FACTORS and owner in shapes:
            axis = len(shapes[owner]) + FACTORS[last]
            spec = [*placed[owner].spec, *(None,) * (len(shapes[owner]) - len(placed[owner].spec))]
            if shape == shapes[owner][:axis] + shapes[owner][axis + 1 :]:
                return NamedSharding(placed[owner].mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        path = path.partition("/")[2]  # a label that a wrapper of optimizers put in front
    return None


def batch_sharding(mesh):
    """The sharding of every entry of a batch: its rows over the axes of ROWS that the mesh has."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ROWS if axis in mesh.axis_names) or None))


def on_mesh(fn, mesh):
    """`fn` whose models keep their activations cut by rows, as the batch is.

    To be jitted and traced under `jax.set_mesh(mesh)`.  Without it XLA finds weights cut along their
    width and cuts the activations so too, at the price of exchanging them all.
    """
    rules = (("rows", batch_sharding(mesh).spec[0]),)

    @functools.wraps(fn)
    def inner(*args):
        with nn.logical_axis_rules(rules):
            return fn(*args)

    return inner


def put_batch(batch, mesh):
    """Rows of this process, {name: [b ...] numpy}, -> the global arrays; HOST_ONLY ones are left out.

    Returns at once: the transfer goes on in the background.
    """
    placed = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(placed, rows)
        for name, rows in batch.items()
        if name not in HOST_ONLY
    }


def painter(reader, mesh):
    """paint(batch, shape) puts "image" [b H W 3] in the place of the "scene" of a batch on the mesh, each
    device its own rows; `shape` is (H, W).  What has no scene stays as it is (see `data.records`).
    """
    if not hasattr(reader, "paint"):
        return lambda batch, shape: batch
    program = jax.jit(reader.paint, static_argnums=(1, 2), out_shardings=batch_sharding(mesh))

    def paint(batch, shape):
        if "scene" not in batch:
            return batch
        rest = {name: rows for name, rows in batch.items() if name != "scene"}
        return rest | {"image": program(batch["scene"], *shape)}

    return paint


def check_batch(batch, accumulate, mesh):
    """Whether a batch can be cut evenly; to be asked before any work.

    Args:
      batch: rows of one optimizer step, over all processes.
      accumulate: into how many parts a step cuts them.
    Raises InputError: rows do not divide among devices and parts, or the mesh gives two processes the
      same rows.
    """
    shards = math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
    step = accumulate * shards
    if batch % step:
        near = " or ".join(str(n) for n in (batch // step * step, (batch // step + 1) * step) if n)
        raise InputError(
            f"data.batch={batch}: must be a multiple of {step}, optim.accumulate={accumulate} times {shards} devices "
            f"along data and fsdp; {near}"
        )
    processes = [{device.process_index for device in row.flat} for row in mesh.devices.reshape(shards, -1)]
    shares = collections.Counter(min(row) for row in processes)
    if any(len(row) > 1 for row in processes) or len(set(shares.values())) > 1:
        raise InputError(
            f"mesh.tensor={mesh.shape.get('tensor', 1)}: spreads the same rows over several processes, each of which "
            "reads rows of its own; it must divide the devices of one process"
        )
