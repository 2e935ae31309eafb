"""Lowering and compiling a function for cards that are not there.

What the compiler cannot do without a card is to time alternatives: matrix products get default
tiles, and the workspaces of cuBLAS and cuDNN are estimates.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax.aot.targets import devices
from sana_jax.sharding import make_mesh


def mesh_of(target, **sizes):
    """A mesh of cards: as `sharding.make_mesh`, whose axes default to 1."""
    return make_mesh(**sizes, devices=devices(target, math.prod(sizes.values())))


def compile_for(target, fn, *avals, mesh=None, in_specs=None, options=None):
    """Compiles `fn(*avals)` for a target.

    Args:
      target: a name in TARGETS.
      fn: a function, or the result of jax.jit if it has static or donated arguments.
      *avals: trees of jax.ShapeDtypeStruct (or of arrays: only shape and dtype are read).  One that has
        a sharding keeps it, where `in_specs` is None.
      mesh: {axis: size} over "data", "fsdp", "tensor"; or a mesh that `mesh_of` made; None is one card.
      in_specs: one PartitionSpec per argument, each a spec for the whole tree or a tree of specs;
        None: everything without a sharding is on every card.
      options: compiler options of XLA, {name: value}.
    Returns:
      jax.stages.Compiled, for `summary`, `.as_text()` and `.memory_analysis()`; it cannot run here.
    """
    if not isinstance(mesh, jax.sharding.Mesh):
        mesh = mesh_of(target, **(mesh or {"data": 1}))

    def place(spec, tree):
        def leaf(a):
            given = getattr(a, "sharding", None) if in_specs is None else None
            known = given is not None and getattr(given, "mesh", None) == mesh
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=given if known else NamedSharding(mesh, spec))

        return jax.tree.map(leaf, tree)

    specs = (PartitionSpec(),) * len(avals) if in_specs is None else tuple(in_specs)
    placed = jax.tree.map(place, specs, avals, is_leaf=lambda s: isinstance(s, PartitionSpec))
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    with jax.set_mesh(mesh):  # from jax 0.11 on, Pallas reads the architecture from it
        return jitted.lower(*placed).compile(options)
