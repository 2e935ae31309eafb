"""A kernel in a program that is cut over devices: each works on what it holds.

Left alone, XLA gathers the whole arguments of a kernel on every device, since it cannot see into one.
Which axes may stay cut is data, `dispatch.Cut` of pallas_kernels; here is what makes the program so.
"""

import itertools
import math

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def over_devices(fn, cut):
    """`fn`, a function of arrays alone, for any mesh: the identity on one device.

    Args:
      cut: along `cut.factors` its arrays stay cut as they come, and what it gives is summed over the
        devices that hold parts of such a sum; they are made whole along all else.
    """
    before, after = ([axes.split() for axes in side.split(",")] for side in cut.rule.split("->"))
    factors = cut.factors.split()
    names = dict.fromkeys(itertools.chain(*before, *after))
    whole = tuple(name for name in names if name not in factors)
    summed = tuple(f for f in factors if not any(f in axes for axes in after))

    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        shapes, result = jax.tree.flatten(jax.eval_shape(fn, *args))
        assert (len(leaves), len(shapes)) == (len(before), len(after)), f"{cut.rule}: not the arrays of {fn}"

        def flat(*leaves):
            return tuple(jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves))))

        def partition(mesh, given, wanted):
            axes = mesh_axes(mesh, factors, zip(before + after, (*given, *wanted)))

            def place(names):
                return NamedSharding(mesh, PartitionSpec(*(axes.get(name) for name in names)))

            def part(*leaves):
                missing = (tuple(itertools.chain(*(axes[f] for f in axes if f not in names))) for names in after)
                return tuple(jax.lax.psum(a, over) if over else a for a, over in zip(flat(*leaves), missing))

            return mesh, part, tuple(map(place, after)), tuple(map(place, before))

        call = custom_partitioning(flat)
        call.def_partition(
            partition, sharding_rule=cut.rule, need_replication_factors=whole, reduction_factors=summed
        )
        return jax.tree.unflatten(result, sequential_vmap(call)(*leaves))

    return run


def mesh_axes(mesh, factors, arrays):
    """{factor: the axes of the mesh that cut it}: as the first array that is cut along it has it.

    Args:
      arrays: pairs of the names of an array's axes and what has its `shape` and `sharding`.
    """
    found = {}
    for names, array in arrays:
        for name, size, over in zip(names, array.shape, array.sharding.spec):
            over = (over,) if isinstance(over, str) else tuple(over or ())
            taken = set(itertools.chain(*found.values())) & set(over)
            even = size % math.prod(mesh.shape[axis] for axis in over) == 0  # XLA pads what is not
            if over and name in factors and name not in found and even and not taken:
                found[name] = over
    return found
