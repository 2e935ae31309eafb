"""What a run needs of every device, in words, before its first step."""

import math

import jax

from sana_jax import flops, memory

GIB = 2**30
FIELDS = {"params": "parameters", "ema": "their average", "opt_state": "the optimizer"}


def memory_plan(state, shardings, mesh, compiled, step_flops=None):
    """Lines that say where the memory of a device goes and how much work a step is.

    Args:
      state: a TrainState of arrays or shapes.
      shardings: of its leaves, see `layout.state_shardings`.
      compiled: the step, as jax.stages.Compiled.
      step_flops: of one step on all devices together, see `flops.train_flops`.
    """
    device, count = mesh.local_devices[0], mesh.devices.size  # others do not say what they have
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [f"{numbers / 1e6:,.1f} M parameters on {count} x {device.device_kind} ({axes})"]

    parts = {words: held(getattr(state, name), getattr(shardings, name)) for name, words in FIELDS.items()}
    analysis = compiled.memory_analysis()
    needed = step_bytes(analysis)
    parts["the batch and what is not trained"] = analysis.argument_size_in_bytes - sum(parts.values())
    parts["the step itself"] = needed - analysis.argument_size_in_bytes
    limit = memory_of(device, mesh)
    verdict = "" if limit is None else f" of {_gib(limit)}{', more than there is' if needed > limit else ''}"
    lines.append(f"memory of a device: {_gib(needed)}{verdict}")
    lines.append("  " + ", ".join(f"{_gib(size)} {words}" for words, size in parts.items() if size > 0))
    if step_flops:
        best = flops.peak(device.device_kind)
        least = f", {step_flops / count / best * 1e3:,.0f} ms at the bfloat16 peak" if best else ""
        lines.append(f"a step: {step_flops / 1e12:,.4g} TFLOP{least}")
    return lines


def held(tree, shardings):
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def step_bytes(analysis):
    """Bytes of a device that a compiled program needs at once; what is donated is not counted twice."""
    inside = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return inside + analysis.temp_size_in_bytes


def memory_of(device, mesh):
    """Bytes of memory for a device, None where it does not say; CPU devices share what the host has."""
    if device.platform == "cpu":
        total = memory.host_memory()[0]
        local = sum(d.process_index == device.process_index for d in mesh.devices.flat)
        return None if total is None else total // local
    return (device.memory_stats() or {}).get("bytes_limit")


def _gib(size):
    return f"{size / GIB:,.3g} GiB"
