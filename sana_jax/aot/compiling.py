"""Lowering and compiling a function for cards that are not there.

What the compiler cannot do without a card is to time alternatives: matrix products get default
tiles, and the workspaces of cuBLAS and cuDNN are estimates.
"""

import contextlib
import math
import os
import sys
import tempfile

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax.aot.targets import devices
from sana_jax.sharding import make_mesh

# jax 0.10.2 compiles matrix products with Triton, and its default tiles do not fit every product
# ("Couldn't find output tile sizes"); on a card, where tiles are tried, it finds others.
NO_TRITON_GEMM = {"xla_gpu_enable_triton_gemm": False}
NO_TILES = "find output tile sizes"


def mesh_of(target, **sizes):
    """A mesh of cards: as `sharding.make_mesh`, whose axes default to 1."""
    return make_mesh(**sizes, devices=devices(target, math.prod(sizes.values())))


def compile_for(target, fn, *avals, mesh=None, in_specs=None, options=None):
    """Compiles `fn(*avals)` for a target.

    Args:
      target: a name in TARGETS.
      fn: a function, or the result of jax.jit if it has static or donated arguments.
      *avals: trees of jax.ShapeDtypeStruct (or of arrays: only shape and dtype are read).  One that
        has a sharding on `mesh` keeps it.
      mesh: {axis: size} over "data", "fsdp", "tensor"; or what `mesh_of` made; None is one card.
      in_specs: one PartitionSpec per argument, each a spec for the whole tree or a tree of specs;
        None: what has no sharding is on every card.
      options: of XLA, {name: value}.
    Returns:
      jax.stages.Compiled, for `summary`, `.as_text()` and `.memory_analysis()`; it cannot run here.
    """
    if not isinstance(mesh, jax.sharding.Mesh):
        mesh = mesh_of(target, **(mesh or {"data": 1}))

    def place(spec, tree):
        def leaf(a):
            given = getattr(a, "sharding", None)
            keep = in_specs is None and isinstance(given, NamedSharding) and given.mesh == mesh
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=given if keep else NamedSharding(mesh, spec))

        return jax.tree.map(leaf, tree)

    specs = (PartitionSpec(),) * len(avals) if in_specs is None else tuple(in_specs)
    placed = jax.tree.map(place, specs, avals, is_leaf=lambda s: isinstance(s, PartitionSpec))
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    with jax.set_mesh(mesh), _not_kept():  # from jax 0.11 on, Pallas reads the architecture from the mesh
        return jitted.lower(*placed).compile(options)


@contextlib.contextmanager
def _not_kept():
    """jax's cache of compiled programs would keep these, and cannot read them back without the card."""
    name = "jax_persistent_cache_min_compile_time_secs"
    kept = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, kept)


@contextlib.contextmanager
def overheard():
    """A list that gets, when the block ends, what was written to stderr in it, by line.

    XLA speaks there and nowhere else, of involuntary rematerialisation for one.
    """
    lines = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
