"""Whether a model can fit at all: asked before a download and before its weights are read."""

import math
import os
import pathlib
import re
import warnings

import jax
import numpy as np

from sana_jax.errors import InputError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def _read(path):
    try:
        return pathlib.Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def host_memory():
    """(all, free) bytes of this machine's or container's memory, swap included; None is unknown."""
    lines = re.findall(r"^(\w+): +(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    known = {name: 1024 * int(value) for name, value in lines}
    total, free = known.get("MemTotal"), known.get("MemAvailable")
    if total is None:
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None, None
    limits = [int(text) for path in LIMITS if (text := _read(path).strip()).isdigit()]
    total = min([total + known.get("SwapTotal", 0), *limits])
    return total, None if free is None else min(free, total)


def device_memory(devices):
    """(all, free) bytes that the devices give together, None where they do not say."""
    if devices[0].platform == "cpu":  # however many devices jax makes of it
        return host_memory()
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None, None
    total = sum(each["bytes_limit"] for each in stats)
    return total, total - sum(each.get("bytes_in_use", 0) for each in stats)


def parameter_bytes(shapes, dtype):
    """Bytes of parameters: {path: shape} of one dtype."""
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def require_memory(needed, model, devices=None):
    """Raises InputError where weights of `needed` bytes cannot fit, warns where they hardly will.

    Args:
      needed: bytes of all parameters; on several devices together, copies counted.
      model: what they are called in the message.
      devices: those that share the parameters, of all processes; None is jax's first.
    """
    everywhere = jax.local_devices()[:1] if devices is None else list(devices)
    devices = [device for device in everywhere if device.process_index == jax.process_index()]
    needed = needed * len(devices) / len(everywhere)
    total, free = device_memory(devices)
    where = "this machine" if devices[0].platform == "cpu" else f"{devices[0].device_kind} x {len(devices)}"
    words = f"model={str(model)!r}: its weights alone need {needed / 1e9:.1f} GB of memory, {where}"
    if total is not None and needed > total:
        raise InputError(
            f"{words} has {total / 1e9:.1f} GB; take a narrower dtype (--dtype bf16), a smaller model (sana-0.6b), or "
            "more devices"
        )
    if free is not None and needed > free:
        warnings.warn(
            f"{words} has {free / 1e9:.1f} GB left; a narrower dtype (--dtype bf16) or a smaller model needs less, and "
            "a smaller height and width need less beside the weights",
            stacklevel=3,
        )
