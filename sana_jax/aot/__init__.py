"""XLA's own GPU compiler on a machine without a GPU: what a program would need and exchange.

    from sana_jax import aot
    compiled = aot.compile_for("h200", step, state, batch, mesh={"fsdp": 8})
    aot.summary(compiled)

    python -m sana_jax.aot --target h200 --devices 8 --mesh fsdp=8 configs/sana_1600m_512.py

Nothing is run, and no GPU, driver or CUDA library is needed; the extra `static` installs the compiler.
"""

from sana_jax.aot.compiling import compile_for, mesh_of
from sana_jax.aot.reading import summary
from sana_jax.aot.targets import TARGETS, available, device_bytes, devices

__all__ = ["TARGETS", "available", "compile_for", "device_bytes", "devices", "mesh_of", "summary"]
