"""What can be known of a GPU kernel without a GPU: its Triton IR, who writes what, what is masked, and
the registers, spills and shared memory that Triton's own compiler and assembler give it.

Needs jax's CUDA plugin to lower for "cuda", and Triton to assemble.  Looks into jax where nothing
public says the same: jaxprs of kernels, and the bindings of MLIR that come with jaxlib.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import tempfile
import warnings

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import dispatch

STATIC = [
    pytest.mark.static,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("jax_plugins", "triton", "jax_triton")),
        reason="needs the extra `static`",
    ),
]
KINDS = {80: "NVIDIA A100", 89: "NVIDIA L4", 90: "NVIDIA H100"}
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may have


def rows_of(folder):
    """Every (device or "default", dtype, width) that the tiles.json of a folder has tiles for."""
    return [
        (device, dtype, width)
        for device, dtypes in dispatch.table(folder)["tiles"].items()
        for dtype, widths in dtypes.items()
        for width in widths
    ]


def take(monkeypatch, device):
    """Takes the tiles of this device, whatever is compiled for; gives the cards to compile them for: the
    device's own, or all of SHARED for "default"."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: device)
    if device == "default":
        return tuple(SHARED)
    number = next(number for part, number in dispatch.CAPABILITY.items() if part in device)
    return (min(sm for sm in SHARED if sm >= number),)


@dataclasses.dataclass
class Kernel:
    """A kernel in the lowered program: `ir` is Triton IR, bytes or text."""

    name: str
    ir: bytes
    warps: int
    stages: int


@dataclasses.dataclass
class Report:
    registers: int
    spills: int
    shared: int


@contextlib.contextmanager
def target(sm):
    """Inside, jax lowers for a card of this compute capability."""
    device = AbstractDevice(device_kind=KINDS[sm], num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)  # of Pallas, since jax 0.11
        yield


def lower(fn, *avals, sm=90):
    with target(sm):
        return jax.jit(fn).trace(*avals).lower(lowering_platforms=("cuda",))


def operations(module):
    """Every operation of an MLIR module, inner ones too."""
    todo = [module.operation]
    while todo:
        operation = todo.pop()
        yield operation
        for region in operation.regions:
            for block in region.blocks:
                todo += [inner.operation for inner in block.operations]


def pallas_kernels(fn, *avals, sm=90):
    """The Pallas kernels of fn(*avals), in the order of the program."""
    from jax._src.lib.mlir import ir

    module = lower(fn, *avals, sm=sm).compiler_ir("stablehlo")
    found = []
    for operation in operations(module):
        if operation.name == "stablehlo.custom_call":
            name = ir.StringAttr(operation.attributes["call_target_name"]).value
            if name == "__gpu$xla.gpu.triton":
                config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
                texts = [ir.StringAttr(config["name"]).value, ir.StringAttr(config["ir"]).value_bytes]
                numbers = [ir.IntegerAttr(config[k]).value for k in ("num_warps", "num_stages")]
                found.append(Kernel(*texts, *numbers))
    return found


def parsed(kernel):
    """(context, module) of a Pallas kernel's IR."""
    from jax._src.lib.mlir import ir
    from jaxlib.triton import dialect

    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        return context, ir.Module.parse(kernel.ir)


def unmasked(kernel):
    """{argument number of the kernel: accesses to it that carry no mask}."""
    from jax._src.lib.mlir import ir

    _, module = parsed(kernel)
    found = collections.Counter()
    for operation in operations(module):
        bare = {"tt.load": 1, "tt.store": 2}.get(operation.name)
        if bare == len(operation.operands):
            value = operation.operands[0]
            while not isinstance(value := value.maybe_downcast(), ir.BlockArgument):  # pointers are made of pointers, first operands
                value = value.owner.operands[0]
            found[value.arg_number] += 1
    return dict(found)


def pallas_calls(fn, *avals):
    """The equations of the Pallas calls in fn(*avals)."""

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            if equation.primitive.name != "pallas_call":
                for value in equation.params.values():
                    for inner in value if isinstance(value, (list, tuple)) else [value]:
                        inner = getattr(inner, "jaxpr", inner)
                        if hasattr(inner, "eqns"):
                            yield from equations(inner)

    traced = jax.make_jaxpr(fn)(*avals)
    return [e for e in equations(traced.jaxpr) if e.primitive.name == "pallas_call"]


def _blocks(equation):
    """(block shape with 1 where an axis is dropped, array shape, index map) of each operand and result."""
    for mapping in equation.params["grid_mapping"].block_mappings:
        sizes = [getattr(size, "block_size", size) for size in mapping.block_shape]
        shape = [size if isinstance(size, int) else 1 for size in sizes]
        yield shape, mapping.array_aval.shape, mapping.index_map_jaxpr


def ragged(equation):
    """The operands and results of a Pallas call, by number, whose blocks reach past the array's end."""
    return {
        number
        for number, (block, array, _) in enumerate(_blocks(equation))
        if any(size % part for size, part in zip(array, block))
    }


def writers(equation):
    """For each result of a Pallas call, the most programs that any one block of it is given to."""
    from jax._src import core

    mapping = equation.params["grid_mapping"]
    counts = []
    for _, _, index_map in list(_blocks(equation))[mapping.num_inputs :]:
        visits = collections.Counter(
            tuple(int(i) for i in core.eval_jaxpr(index_map.jaxpr, index_map.consts, *place))
            for place in itertools.product(*map(range, mapping.grid))
        )
        counts.append(max(visits.values()))
    return counts


def faults(program, images={}):
    """What is wrong with the Pallas kernels of a program, (fn, *avals): ragged accesses without a mask, blocks
    that several programs write, atomics.

    Args:
      images: {kernel: numbers of operands and results that it indexes itself, so that no block says what
        is ragged}: all accesses to these have to be masked.
    Returns:
      {(kernel, "no mask", "a race" or "atomic")}.
    """
    kernels = {kernel.name: kernel for kernel in pallas_kernels(*program, sm=89)}  # of other cards only the tiles differ
    calls = pallas_calls(*program)
    assert {call.params["name"] for call in calls} == set(kernels) and len(calls) == len(kernels)
    found = set()
    for call in calls:
        kernel = kernels[call.params["name"]]
        taken = ragged(call) | images.get(kernel.name, set())
        assert taken
        if taken & set(unmasked(kernel)):
            found.add((kernel.name, "no mask"))
        if set(writers(call)) != {1}:
            found.add((kernel.name, "a race"))
        if b"atomic" in kernel.ir:
            found.add((kernel.name, "atomic"))
    return found


# --- Registers, by the compiler and the assembler of the Triton package.


def check(report, sm):
    assert report.spills == 0 and report.registers <= 255 and report.shared <= SHARED[sm], report


def check_pallas(program, cards):
    """Compiles and checks the Pallas kernels of a program for some cards; gives how many there are.

    They are lowered once: with the same tiles the IR is the same, see test_only_tiles_differ_among_cards.
    """
    kernels = pallas_kernels(*program, sm=cards[0])
    for kernel in kernels:
        for sm in cards:
            check(compile_pallas(kernel, sm), sm)
    return len(kernels)


def check_jax_triton(monkeypatch, program, sm):
    """The same of its jax-triton kernels, which must have no atomics."""
    found = compile_jax_triton(monkeypatch, *program, sm=sm)
    for ir, report in found:
        assert "atomic" not in ir
        check(report, sm)
    return len(found)


def assemble(ptx, shared, sm):
    from triton import knobs

    # The newest that there is: jax-triton writes PTX that the older of the two does not read.
    ptxas = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas).path
    arch = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [ptxas, "-v", f"-arch={arch}", file, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    number = [int(re.search(p, done.stderr)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    return Report(*number, shared)


def compile_pallas(kernel, sm):
    """The Report of a Pallas kernel."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    mlir_context, module = parsed(kernel)
    with mlir_context:
        text = module.operation.get_asm(enable_debug_info=False)
    backend = make_backend(GPUTarget("cuda", sm, 32))
    options = backend.parse_options(dict(num_warps=kernel.warps, num_stages=kernel.stages))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.ttir")
        file.write_text(text)
        module = ir.parse_mlir_module(str(file), context)
        module.context = context
    metadata = {}
    for stage in (backend.make_ttir, backend.make_ttgir, backend.make_llir, backend.make_ptx):
        module = stage(module, metadata, options, sm)
    return assemble(module, metadata["shared"], sm)


def compile_jax_triton(monkeypatch, fn, *avals, sm=90):
    """[(Triton IR, Report)] of the jax-triton kernels of fn(*avals)."""
    from jax_triton import triton_lib

    inner, found = triton_lib.compile_ttir_to_ptx_inplace, []

    def watched(ttir, *rest):
        text = str(ttir)
        made = inner(ttir, *rest)
        found.append((text, assemble(made.binary, made.shared_mem_bytes, sm)))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", watched)
        patch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
        lower(fn, *avals, sm=sm)
    return found
