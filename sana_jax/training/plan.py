"""What a run will need, in words, before its first step."""

import math

import jax

from sana_jax import flops, memory

GIB = 2**30
FIELDS = {"params": "parameters", "ema": "their average", "opt_state": "the optimizer"}


def memory_plan(state, shardings, mesh, compiled=None, step_flops=None):
    """Lines that say where the memory of a device goes and how much work a step is.

    Args:
      state: a TrainState of arrays or shapes.
      shardings: of its leaves, see `layout.state_shardings`.
      compiled: the step, as jax.stages.Compiled; without it what a step itself needs is not known.
      step_flops: of one step on all devices together, see `flops.train_flops`.
    """
    device, count = mesh.devices.flat[0], mesh.devices.size
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [f"{numbers / 1e6:,.1f} M parameters on {count} x {device.device_kind} ({sizes})"]
    parts = {words: held(getattr(state, name), getattr(shardings, name)) for name, words in FIELDS.items()}
    lines.append("memory of a device: " + ", ".join(f"{_gib(size)} for {words}" for words, size in parts.items() if size))
    if compiled is not None and (analysis := compiled.memory_analysis()) is not None:
        needed = step_bytes(analysis)
        lines.append(f"  a step: {_gib(analysis.temp_size_in_bytes)} beside them and the batch, {_gib(needed)} in all")
        limit = _limit(device, mesh)
        if limit is not None:
            verdict = "does not fit" if needed > limit else f"{needed / limit:.0%}"
            lines.append(f"  of {_gib(limit)} that a device has: {verdict}")
    if step_flops:
        best = flops.peak(device.device_kind)
        least = f"; at least {step_flops / count / best * 1e3:,.0f} ms at the bfloat16 peak" if best else ""
        lines.append(f"a step: {step_flops / 1e12:,.3g} TFLOP, without what is computed twice to save memory{least}")
    return lines


def held(tree, shardings):
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def step_bytes(analysis):
    """Bytes of a device that a compiled program needs at once; what is donated is not counted twice."""
    inside = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return inside + analysis.temp_size_in_bytes


def _limit(device, mesh):
    """Bytes that a device has: of a CPU's memory, its share."""
    if device.platform == "cpu":
        total = memory.host_memory()[0]
        return None if total is None else total // len([d for d in mesh.devices.flat if d.process_index == device.process_index])
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that only stands for one, see `aot`
        return None


def _gib(size):
    return f"{size / GIB:,.3g} GiB"
