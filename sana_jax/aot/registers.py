"""Registers and spills of each kernel of a program, by the PTX assembler that comes with Triton."""

import importlib.util
import pathlib
import re
import subprocess
import tempfile

from sana_jax.aot.compiling import compile_for
from sana_jax.aot.targets import architecture
from sana_jax.errors import InputError

KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>[^']+)'.*?(?P<spill_bytes>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def assembler():
    """Triton's newest ptxas.  Raises InputError: Triton is not installed, or brings none."""
    spec = importlib.util.find_spec("triton")
    folders = (
        []
        if spec is None
        else [pathlib.Path(path, "backends", "nvidia", "bin") for path in spec.submodule_search_locations]
    )
    for name in ("ptxas-blackwell", "ptxas"):  # XLA writes a newer PTX than the older of the two reads
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    raise InputError("registers are counted by Triton's ptxas: pip install 'sana_jax[static]'")


def compiled_registers(target, program, mesh, options=None):
    """[{kernel, registers, spill_bytes}] of a `programs.Program`, the most spilled first.

    Raises InputError: no assembler, or one that is too old for XLA's PTX.
    """
    ptxas = assembler()
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"}
        compile_for(target, program.fn, *program.avals, mesh=mesh, options={**(options or {}), **dump})
        files = [file for file in sorted(pathlib.Path(folder).glob("*.ptx")) if file.stat().st_size]
        return sorted(
            (kernel for file in files for kernel in assemble(ptxas, file, architecture(target))),
            key=lambda kernel: (-kernel["spill_bytes"], -kernel["registers"]),
        )


def assemble(ptxas, file, arch):
    """The kernels of one PTX file."""
    done = subprocess.run(
        [ptxas, "--verbose", f"--gpu-name={arch}", "--output-file=/dev/null", file], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"{ptxas}: {done.stderr.strip().splitlines()[0]}")
    for match in KERNEL.finditer(done.stderr):
        found = match.groupdict()
        yield {"kernel": found["kernel"], **{name: int(found[name]) for name in ("registers", "spill_bytes")}}
