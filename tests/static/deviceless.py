"""Compiles a JAX function for an NVIDIA H200 with XLA's own GPU compiler; no GPU is present.

The compiler ships in the CUDA plugin of jax (extra `static`).  jax loads every installed plugin the
first time that anything asks for a device, and this one declines when its version check finds no
cuDNN, which without the CUDA libraries is always.  The check is skipped when JAX_PLATFORMS leaves
CUDA out, and when JAX_SKIP_CUDA_CONSTRAINTS_CHECK is set; where neither held at that first moment,
the plugin is registered here, afterwards.  Registering is all that happens: a description of the
card stands in for it, jax starts no CUDA backend where there is no NVIDIA device, and the default
stays the CPU.  So this needs no process of its own.

What the compiler cannot do without a card is to time alternatives: matrix products get default
tiles, and the workspaces of cuBLAS and cuDNN are estimates.
"""

import collections
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

PLUGIN = "jax_plugins.xla_cuda13"
H200 = pathlib.Path(__file__).with_name("h200_target.textproto")
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
CUSTOM_CALL = re.compile(r'custom_call_target="([^"]+)"')


def available():
    """Whether the CUDA plugin is installed (it need not find any CUDA library)."""
    return bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(PLUGIN))


def h200_devices(count):
    """`count` devices that can be compiled for, and nothing else."""
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        target_config=H200.read_text(),
        topology=f"1x1x{count}",
    )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return describe().devices
    except NotImplementedError:  # the plugin had declined before the variable was set
        importlib.import_module(PLUGIN).initialize()
        return describe().devices


def compile_for_h200(fn, *avals, devices=1, in_specs=None):
    """Compiles `fn(*avals)` for H200s.

    Args:
      fn: a function, or the result of jax.jit if it has static or donated arguments.
      *avals: trees of jax.ShapeDtypeStruct (or of arrays: only shape and dtype are read).
      devices: how many, as one mesh axis "data"; or {axis: size, ...} for a mesh of several axes.
      in_specs: one PartitionSpec per argument, each a spec for the whole tree or a tree of specs;
        None replicates everything.
    Returns:
      jax.stages.Compiled, for `summary`, `.as_text()` and `.memory_analysis()`; it cannot run here.
    """
    shape = {"data": devices} if isinstance(devices, int) else dict(devices)
    grid = np.array(h200_devices(math.prod(shape.values()))).reshape(tuple(shape.values()))
    mesh = jax.sharding.Mesh(grid, tuple(shape))

    def place(spec, tree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    specs = (PartitionSpec(),) * len(avals) if in_specs is None else tuple(in_specs)
    placed = jax.tree.map(place, specs, avals, is_leaf=lambda s: isinstance(s, PartitionSpec))
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    with jax.set_mesh(mesh):  # from jax 0.11 on, Pallas reads the architecture from it
        return jitted.lower(*placed).compile()


def summary(compiled):
    """What a test wants to know of a compiled program; sizes are bytes on one device."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "collectives": dict(collections.Counter(COLLECTIVE.findall(text))),
        "custom_calls": dict(collections.Counter(CUSTOM_CALL.findall(text))),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def attached_target():
    """The description of the GPU in this machine, to be kept in h200_target.textproto."""
    from jax._src.lib import xla_client

    return xla_client.get_topology_for_devices(jax.devices("cuda")).target_config


if __name__ == "__main__":
    print(attached_target(), end="")
