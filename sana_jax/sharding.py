"""Which part of each parameter a device holds: path -> logical axes -> axes of the mesh.

    mesh = make_mesh(fsdp=8)
    sana, params = load_sana("folder", mesh=mesh)

A table per model names the logical axis of every axis of every leaf, RULES say which axis of the
mesh, if any, a logical axis is cut along.  Modules know nothing of it: jax.jit places the rest from
the shardings of its arguments (what used to be pjit).  Mesh axes: "data" cuts batches only, "fsdp"
cuts weights along the residual width, "tensor" along heads, hidden channels and vocabulary.
"""

import math
import re
import warnings

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sana_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
RULES = {"layers": None, "embed": "fsdp", "heads": "tensor", "ffn": "tensor", "vocab": "tensor", None: None}
EVERYWHERE = None  # in place of a tuple of logical axes: the whole leaf on every device

# Rows are (pattern of the whole path, logical axes).  Norms, biases and modulation tables are small:
# everywhere, but for biases along an axis that is cut.  Packed projections run head by head, so a cut
# through them falls between heads wherever the number of heads divides.
SANA = (
    (r"patch_embed/kernel", (None, "embed")),
    (r"time_embed/(mlp|guidance)_1/kernel", (None, "embed")),
    (r"time_embed/((mlp|guidance)_2|modulation)/kernel", ("embed", None)),
    (r"caption_embed/mlp_1/kernel", (None, "embed")),
    (r"caption_embed/mlp_2/kernel", ("embed", None)),
    (r"blocks/(self_attn/qkv|cross_attn/query)/kernel", ("layers", "embed", "heads")),
    (r"blocks/cross_attn/query/bias", ("layers", "heads")),
    (r"blocks/(self_attn|cross_attn)/out/kernel", ("layers", "heads", "embed")),
    (r"key_value/kv/kernel", ("layers", "embed", "heads")),
    (r"key_value/kv/bias", ("layers", "heads")),
    (r"blocks/mix_ffn/expand/kernel", ("layers", "embed", "ffn")),
    (r"blocks/mix_ffn/depthwise/kernel", ("layers", None, None, "ffn")),
    (r"blocks/mix_ffn/(expand|depthwise)/bias", ("layers", "ffn")),
    (r"blocks/mix_ffn/project/kernel", ("layers", "ffn", "embed")),
    (r"head/out/kernel", ("embed", None)),
    (r"(patch_embed|head/out|(time_embed|caption_embed)/\w+|blocks/(self_attn|cross_attn)/out)/bias", EVERYWHERE),
    (r"(blocks/|head/)modulation", EVERYWHERE),
    (r".*norm/scale", EVERYWHERE),
)
GEMMA2 = (
    (r"embedding", ("vocab", "embed")),
    (r"layers/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"layers/out/kernel", ("layers", "heads", "embed")),
    (r"layers/(gate|up)/kernel", ("layers", "embed", "ffn")),
    (r"layers/down/kernel", ("layers", "ffn", "embed")),
    (r".*norm/scale", EVERYWHERE),
)
# Convolutions over pixels: its memory is activations, which batch and tiles cut; its weights are small.
DC_AE = ((r".*", EVERYWHERE),)


def make_mesh(data=1, fsdp=1, tensor=1, devices=None):
    """A mesh with the axes of RULES over all devices, or those given.

    Raises InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise InputError(f"data={data} * fsdp={fsdp} * tensor={tensor}: must be the number of devices, {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def logical_axes(shapes, table):
    """{path: logical axes, one for each axis of the leaf} of {path: shape}.

    Raises ValueError unless every leaf matches exactly one row, of its own rank, and every row a name
    in RULES.  A row without a leaf is fine: tables serve all structures of a model.
    """
    out, problems = {}, []
    for path, shape in shapes.items():
        rows = [axes for pattern, axes in table if re.fullmatch(pattern, path)]
        if len(rows) != 1:
            problems.append(f"{path}: {len(rows)} rows match, must be one")
            continue
        out[path] = (None,) * len(shape) if rows[0] is EVERYWHERE else rows[0]
        if len(out[path]) != len(shape):
            problems.append(f"{path}: {len(shape)} axes, its row names {len(out[path])}")
        if unknown := set(out[path]) - RULES.keys():
            problems.append(f"{path}: no rule for {sorted(unknown)}")
    if problems:
        raise ValueError("the sharding table is not total:\n  " + "\n  ".join(problems))
    return out


def shardings(shapes, table, mesh):
    """{path: NamedSharding} of {path: shape}.

    An axis that its mesh axis does not divide stays whole on every device (jax cuts evenly or not at
    all); a warning counts such leaves.
    Raises InputError: the mesh has an axis that is not in AXES.
    """
    if unknown := set(mesh.axis_names) - set(AXES):
        raise InputError(f"mesh: axes {sorted(unknown)} are not known, must be among {', '.join(AXES)}")
    # Auto axes, whatever they were: modules do not name theirs.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    out, whole = {}, []
    for path, axes in logical_axes(shapes, table).items():
        names = [RULES[axis] if RULES[axis] in mesh.axis_names else None for axis in axes]
        if uneven := [i for i, name in enumerate(names) if name and shapes[path][i] % mesh.shape[name]]:
            whole.append(path)
            names = [None if i in uneven else name for i, name in enumerate(names)]
        out[path] = NamedSharding(mesh, PartitionSpec(*names))
    if whole:
        sizes = ", ".join(f"{name}={mesh.shape[name]}" for name in mesh.axis_names)
        warnings.warn(f"mesh {sizes}: does not divide {len(whole)} of {len(out)} leaves ({whole[0]}, ...), kept whole there")
    return out


def pieces(sharding, shape):
    """{index of a piece, as (start, stop) pairs: devices of this process that hold it}."""
    found = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.setdefault(key, []).append(device)
    return found


def place(arrays, held, sharding, shape):
    """The global array of pieces {as `pieces` gave: devices} with their host `arrays`, in that order.

    Waits, so that no transfer keeps a host array alive.
    """
    shards = [jax.device_put(a, device) for a, devices in zip(arrays, held.values(), strict=True) for device in devices]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards))


def bytes_per_device(shapes, specs, itemsize):
    """The largest number of bytes that one device holds of {path: shape} under {path: sharding}."""
    return sum(math.prod(specs[path].shard_shape(tuple(shape))) for path, shape in shapes.items()) * itemsize
