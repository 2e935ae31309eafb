"""What a training step or a sampler will need on GPUs that are not here, from XLA's own compiler.

    python -m sana_jax.aot --target h200 --devices 8 --mesh fsdp=8 configs/sana_1600m_512.py data.batch=512
    python -m sana_jax.aot --target rtx4090 --sampler sana-1.6b --size 1024 --batch 2

Nothing is run and nothing is downloaded.  Needs the extra `static`.
"""

import argparse
import json
import sys
import time

import jax

from sana_jax import aot, experiment
from sana_jax.aot import programs
from sana_jax.aot.compiling import NO_TILES, NO_TRITON_GEMM, overheard
from sana_jax.aot.registers import assembler, compiled_registers
from sana_jax.errors import InputError, require_positive
from sana_jax.sharding import AXES
from sana_jax.training import layout

GIB = 2**30
TAKEN = 0.75  # of a card's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a file of configs/: its training step")
    parser.add_argument("overrides", nargs="*", help="of its fields, as for train.py")
    parser.add_argument("--target", default="h200", help=f"card: {', '.join(aot.TARGETS)}")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--mesh", default="", help="such as data=4,fsdp=2; the rest of the devices is along data")
    parser.add_argument("--cached", action=argparse.BooleanOptionalAction, help="whether features come from a cache")
    parser.add_argument("--shape", action="append", help="HEIGHTxWIDTH of a batch's images, or all; may be repeated")
    parser.add_argument("--sampler", help=f"instead of a config: {', '.join(programs.SAMPLERS)}")
    parser.add_argument("--size", type=int, default=1024, help="of the sampler's pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures that the sampler paints at once")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--kernels", default="auto", help="of the sampler: auto, xla, pallas or jax_triton")
    parser.add_argument("--registers", action="store_true", help="registers and spills of every kernel (slower)")
    parser.add_argument("--output", help="a JSON file for what is printed")
    args, unknown = parser.parse_known_args(argv)
    args.overrides += unknown  # the spelling --data.batch=64
    return args


def main(argv):
    args = arguments(argv)
    try:
        if args.registers:
            assembler()  # missing, it is better missed now
        rows = [report(args, *one) for one in todo(args)]
    except InputError as error:
        print(f"sana_jax.aot: {error}", file=sys.stderr)
        return 2
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "target": args.target, "programs": rows}, file, indent=1)
    return 0


def todo(args):
    """(title, mesh, function without arguments that makes the Program) of all that is asked for."""
    if bool(args.config) == bool(args.sampler):
        raise InputError("give a config file or --sampler, one of the two")
    require_positive("devices", args.devices)
    sizes = experiment.Mesh() if args.sampler else None
    if args.sampler:
        mesh = aot.mesh_of(args.target, **layout.mesh_sizes(asked(args.mesh, sizes), args.devices))
        title = f"{args.sampler}, {args.size} px, {args.batch} at once"
        yield title, mesh, lambda: programs.sampler(
            args.sampler, mesh, args.size, args.batch, args.steps, kernels=args.kernels
        )
        return
    config = experiment.load(args.config, args.overrides)
    known = experiment.read_file(args.config).stages, config.stages  # an override may leave one stage alone
    for stage in config.stages or (config,):
        mesh = aot.mesh_of(args.target, **layout.mesh_sizes(asked(args.mesh, stage.mesh), args.devices))
        for shape in shapes(args.shape, stage):
            title = f"{stage.name}, batch {stage.data.batch} of {shape[0]}x{shape[1]}"
            yield title, mesh, lambda mesh=mesh, stage=stage, shape=shape: programs.train_step(
                stage, mesh, shape, args.cached, [*known[0], *known[1]]
            )


def asked(text, sizes):
    """An experiment.Mesh: that of `--mesh` where it is given.  Raises InputError."""
    given = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise InputError(f"mesh={text!r}: must be such as data=4,fsdp=2, over {', '.join(AXES)}")
        given[axis] = int(size)
    return experiment.Mesh(**given) if given else sizes


def shapes(texts, config):
    """Those of --shape, which the config must have; the most square one by default."""
    known = programs.shapes_of(config)
    if texts == ["all"]:
        return known
    by_name = {f"{height}x{width}": (height, width) for height, width in known}
    if unknown := [text for text in texts or () if text not in by_name]:
        raise InputError(f"shape={unknown[0]!r}: {config.name} has {', '.join(by_name)}, or all of them")
    return [by_name[text] for text in texts] if texts else known[:1]


def report(args, title, mesh, make):
    """Compiles one program and prints what it needs; returns it as a dict."""
    program, options, began = make(), None, time.perf_counter()
    with overheard() as said:
        try:
            compiled = aot.compile_for(args.target, program.fn, *program.avals, mesh=mesh)
        except jax.errors.JaxRuntimeError as error:
            if NO_TILES not in str(error):
                raise
            options = NO_TRITON_GEMM
            compiled = aot.compile_for(args.target, program.fn, *program.avals, mesh=mesh, options=options)
    row = {
        "program": title,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "flops": program.flops,
        "options": options,
    }
    row |= aot.summary(compiled) | {"compile_seconds": time.perf_counter() - began}
    row["warnings"] = [line for line in said if "rematerializ" in line.lower()]
    if args.registers:
        row["registers"] = compiled_registers(args.target, program, mesh, options)
    print("\n".join(lines(row, args.target)), flush=True)
    return row


def lines(row, target):
    axes = ", ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "no axis"
    needed, limit = row["peak_bytes"], aot.device_bytes(target)
    verdict = (
        "  DOES NOT FIT" if needed > limit else "  more than jax takes by default" if needed > TAKEN * limit else ""
    )
    yield f"{row['program']}: {row['devices']} x {target}, {axes}"
    yield f"  memory of a card   {gib(needed)} of {gib(limit)}{verdict}"
    yield f"    arguments {gib(row['argument_bytes'])}, temporary {gib(row['temp_bytes'])}"
    yield f"  collectives        {counts(row['collectives'])}"
    yield f"  kernels            {row['fusions']} fusions; custom calls: {counts(row['custom_calls'])}"
    for kernel in row.get("registers", ())[:8]:
        yield f"    {kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled: {kernel['kernel']}"
    yield f"  work               {row['flops'] / 1e12:,.4g} TFLOP a call on all cards together"
    if row["options"]:
        yield f"  compiled with      {row['options']}: default tiles do not fit one of its products"
    for warning in row["warnings"]:
        yield f"  XLA says           {warning}"
    yield f"  compiled in        {row['compile_seconds']:.0f} s"


def counts(found):
    return ", ".join(f"{n} {name}" for name, n in sorted(found.items())) or "none"


def gib(size):
    return f"{size / GIB:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
