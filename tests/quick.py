"""Settings of XLA for processes that compile far more than they compute, as tests do.

They take a quarter off the time of the suite.  `.ci/nightly` runs it with what users get.
"""

import importlib.metadata
import os


def xla_flags(devices, quick=os.environ.get("SANA_JAX_NIGHT") != "1"):
    """XLA_FLAGS for so many CPU devices, quick to compile or quick to run."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if quick:
        flags += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
        if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not know the flag, and end at it
            flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
