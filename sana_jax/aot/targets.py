"""The cards that can be compiled for, and jax devices that stand for them.

The compiler ships in the CUDA plugin of jax (extra `static`).  jax loads every installed plugin the
first time that anything asks for a device, and this one declines when its version check finds no
cuDNN, which without the CUDA libraries is always.  The check is skipped when JAX_PLATFORMS leaves
CUDA out, and when JAX_SKIP_CUDA_CONSTRAINTS_CHECK is set; where neither held at that first moment,
the plugin is registered here, afterwards.  Registering is all that happens: a description of the
card stands in for it, jax starts no CUDA backend where there is no NVIDIA device, and the default
stays the CPU.  So this needs no process of its own.
"""

import functools
import importlib
import importlib.util
import os
import pathlib
import re

from jax.experimental import topologies

from sana_jax.errors import InputError, require_choice

PLUGIN = "jax_plugins.xla_cuda13"
TARGETS = ("h200", "h100", "a100", "rtx4090")


def available():
    """Whether the CUDA plugin is installed (it need not find any CUDA library)."""
    return bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(PLUGIN))


def description(target):
    """XLA's text description of a card.  Raises InputError: no such target."""
    require_choice("target", target, TARGETS)
    return pathlib.Path(__file__).with_name(f"{target}.textproto").read_text(encoding="ascii")


def device_bytes(target):
    """Memory of one card in bytes, as its driver reports it."""
    return int(re.search(r"device_memory_size: (\d+)", description(target))[1])


def architecture(target):
    """What ptxas calls it, such as sm_90a."""
    return "sm_" + re.search(r"Compute Capability ([\w.]+)", description(target))[1].replace(".", "")


def devices(target, count):
    """`count` devices that can be compiled for, and nothing else.

    Raises InputError: no such target, or the compiler is not installed.
    """
    text = description(target)
    if not available():
        raise InputError(
            "compiling for a GPU needs XLA's GPU compiler: pip install 'sana_jax[static]' (jax's CUDA plugin; no GPU "
            "and no CUDA library is needed)"
        )
    describe = functools.partial(
        topologies.get_topology_desc, platform="cuda", target_config=text, topology=f"1x1x{count}"
    )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        return describe().devices
    except NotImplementedError:  # the plugin had declined before the variable was set
        importlib.import_module(PLUGIN).initialize()
        return describe().devices
