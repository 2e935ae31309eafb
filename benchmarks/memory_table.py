"""The table of docs/memory.md: memory and collectives of training steps on meshes of H200s.

    python -m benchmarks.memory_table [--only TEXT]

Every row is a compilation by XLA's GPU compiler (extra `static`); no GPU is used.  The rows between
the two marks of docs/memory.md are replaced; with --only, those whose name contains TEXT are printed.
The exit status says whether one breaks what the document promises.
A row costs 20 to 60 seconds of two cores.
"""

import argparse
import datetime
import pathlib
import re
import sys
import time
import warnings

import jax
import jaxlib

from sana_jax import aot, experiment
from sana_jax.aot import programs
from sana_jax.aot.compiling import NO_TRITON_GEMM, overheard

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "memory.md"
MARKS = "<!-- written by benchmarks/memory_table.py -->", "<!-- end of what is written -->"
GIB = 2**30
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
EIGHT = dict(fsdp=8)

# Config, remat, rows of a card (of a group along "tensor"), mesh, whether features are cached.
ROWS = [
    ("sana_1600m_512", "none", 64, EIGHT, True),
    ("sana_1600m_512", "products", 64, EIGHT, True),
    ("sana_1600m_512", "full", 64, EIGHT, True),
    ("sana_1600m_512", "products", 64, dict(data=8), True),
    ("sana_1600m_512", "products", 64, dict(data=2, fsdp=4), True),
    ("sana_1600m_512", "products", 64, dict(fsdp=4, tensor=2), True),
    ("sana_1600m_512", "products", 64, dict(data=8, fsdp=8), True),
    ("sana_1600m_512", "products", 64, dict(fsdp=64), True),
    ("sana_1600m_512", "products", 64, dict(data=64, fsdp=8), True),
    ("sana_1600m_512", "products", 64, dict(data=8, fsdp=64), True),
    ("sana_1600m_512", "products", 64, EIGHT, False),
    ("sana_1600m_1024", "products", 32, EIGHT, True),
    ("sana_1600m_1024", "products", 32, dict(data=8, fsdp=8), True),
    ("sana_1600m_1024", "products", 32, dict(data=64, fsdp=8), True),
    ("sana_1600m_1024", "full", 32, EIGHT, True),
    ("sana_600m_1024", "products", 32, EIGHT, True),
    ("sana_1_5_4800m_1024", "products", 16, EIGHT, True),
    ("sana_1600m_2k", "products", 8, EIGHT, True),
    ("sana_1600m_4k", "full", 4, EIGHT, True),
    ("dc_ae_512", "", 16, dict(data=8), False),
]


def name_of(row):
    config, remat, rows, mesh, cached = row
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    return f"{config} {remat} {rows} {axes} {'cached' if cached else 'live'}"


def measure(row):
    """What a row's step needs, as `aot.summary` says it, with what XLA said of rematerialisation."""
    name, remat, rows, sizes, cached = row
    mesh = aot.mesh_of("h200", **sizes)
    batch = rows * mesh.size // mesh.shape["tensor"]
    overrides = [f"data.batch={batch}", "optim.accumulate=1", *([f"model.remat={remat}"] if remat else [])]
    config = experiment.load(ROOT / "configs" / f"{name}.py", overrides)
    with overheard() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # leaves that a mesh does not divide
        program = programs.train_step(config, mesh, programs.shapes_of(config)[0], cached)
        compiled = aot.compile_for("h200", program.fn, *program.avals, mesh=mesh, options=NO_TRITON_GEMM)
    return aot.summary(compiled) | {
        "involuntary": sum("Involuntary" in line for line in said),
        "rule": type(config.optim.rule).__name__,
    }


def cells(row, found):
    name, remat, rows, sizes, cached = row
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    memory = [f"{found[key] / GIB:.2f}" for key in ("argument_bytes", "temp_bytes", "peak_bytes")]
    kinds = [found["collectives"].get(kind, 0) for kind in KINDS]
    name += "" if cached else " (live)"
    return [name, axes, rows, remat or "-", found["rule"], *memory, *kinds, found["involuntary"]]


def problems(row, found):
    """What docs/memory.md says cannot be."""
    _, _, _, sizes, cached = row
    if found["peak_bytes"] > aot.device_bytes("h200"):
        yield "does not fit"
    if found["involuntary"]:
        yield "involuntary rematerialisation"
    if "all-to-all" in found["collectives"] and cached and "tensor" not in sizes:
        yield "all-to-all"


def marked(cells):
    return f"| {' | '.join(map(str, cells))} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose name has this text, printed and not written")
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.only or args.only in name_of(row)]
    heads = ["config", "mesh", "rows", "remat", "rule", "arguments", "temporary", "all", *KINDS, "involuntary"]
    lines, failed = [marked(heads), marked(["---"] * len(heads))], 0
    for row in rows:
        began, found = time.perf_counter(), measure(row)
        lines.append(marked(cells(row, found)))
        for problem in problems(row, found):
            failed += 1
            print(f"{name_of(row)}: {problem}")
        print(f"{lines[-1]} {time.perf_counter() - began:.0f} s", flush=True)
    if args.only:
        return failed
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    when = f"Compiled {datetime.date.today()} with {versions}, for H200; GiB of one card."
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    written = "\n".join([MARKS[0], "", when, "", *lines, "", MARKS[1]])
    DOCUMENT.write_text(pattern.sub(lambda _: written, text), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
