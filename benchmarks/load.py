"""Loading a transformer in published size: seconds, and how much of the host's memory it takes.

    python -m benchmarks.load --output DIR [--models 1.6B,4.8B] [--shard-gb 5,1] [--devices 8]

A folder of random bfloat16 shards is written below DIR, loaded in a process of its own, and removed.
Peak is the largest resident size of that process (VmHWM), interpreter and libraries included.  Bound:
one shard and 1 GB above the parameters, where the host is the device, else one shard and 1 GB in all.
Exit status 1 when a row is beyond it.  `--devices N` lays the parameters over N devices of the machine,
CPU ones if there is no other.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from benchmarks import environment

GB = 10**9
COLUMNS = ("model", "shard_gb", "devices", "files", "seconds", "parameters_gb", "peak_gb", "above_gb", "bound_gb", "ok")


def module_of(name):
    import jax.numpy as jnp

    from sana_jax.models import sana

    known = {"0.6B": sana.SANA_600M, "1.6B": sana.SANA_1600M, "4.8B": sana.SANA_1_5_4800M}
    known["toy"] = sana.Sana(width=64, depth=4, heads=2, cross_heads=4, caption_width=32)
    return known[name].clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


def write_folder(folder, name, shard_bytes):
    """Random weights in diffusers' names; one tensor after the other, cut from one pool of numbers."""
    import ml_dtypes
    import numpy as np

    from sana_jax.checkpoints import rules
    from sana_jax.checkpoints.write import write_json, write_safetensors
    from sana_jax.components import published_rules
    from sana_jax.parameters import parameter_shapes
    from sana_jax.saving import component_config

    module = module_of(name)
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**24, np.float32)).astype(ml_dtypes.bfloat16)

    def tensors():
        for tensor, shape in rules.names(published_rules(module), parameter_shapes(module)).items():
            start = int(rng.integers(2**23))
            yield tensor, np.resize(pool[start:], shape)

    folder.mkdir(parents=True)
    write_json(folder / "config.json", component_config(module))
    write_safetensors(folder, "diffusion_pytorch_model", tensors(), shard_bytes)


def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def load(folder, devices):
    """What the child does: loads, then checks one tensor of every leaf against its file."""
    import jax
    import numpy as np

    from sana_jax.checkpoints import rules
    from sana_jax.components import prepare_sana
    from sana_jax.sharding import make_mesh

    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices]) if devices > 1 else None
    before, start = peak_bytes(), time.perf_counter()
    prepared = prepare_sana(folder)
    _, params = prepared.read(mesh)
    jax.block_until_ready(params)
    row = {"seconds": round(time.perf_counter() - start, 2), "peak": peak_bytes(), "before": before}
    leaves = jax.tree.leaves(params)
    row |= {"parameters": sum(leaf.nbytes for leaf in leaves), "platform": jax.devices()[0].platform}
    paths = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    last = {slot.path: (name, slot) for name, slot in rules.slots(prepared.rules, prepared.shapes).items()}
    for path, (name, slot) in last.items():
        layer = np.asarray(paths[path] if slot.layer is None else paths[path][slot.layer])
        found, stored = slot.layout.view(layer), prepared.checkpoint.read(name)
        assert found.tobytes() == stored.tobytes(), f"{path} is not {name}"
    print(json.dumps(row))


def measure(folder, model, shard_gb, devices):
    """One row."""
    write_folder(folder, model, int(shard_gb * GB))
    try:
        files = [file.stat().st_size for file in folder.glob("*.safetensors")]
        env = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if devices > 1:
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        command = [sys.executable, "-m", "benchmarks.load", "--child", str(folder), "--devices", str(devices)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        row = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    above = row["peak"] - (row["parameters"] if row["platform"] == "cpu" else 0)
    bound = max(files) + GB
    return {
        "model": model, "shard_gb": shard_gb, "devices": devices, "files": len(files), "seconds": row["seconds"],
        "parameters_gb": row["parameters"] / GB, "peak_gb": row["peak"] / GB, "before_gb": row["before"] / GB,
        "above_gb": above / GB, "bound_gb": bound / GB, "platform": row["platform"], "ok": above <= bound,
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="folder for the results, and for a moment the weights")
    parser.add_argument("--models", default="0.6B,1.6B", help="of 0.6B, 1.6B and 4.8B")
    parser.add_argument("--shard-gb", default="5,1", help="largest size of a file")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="toy size")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return load(pathlib.Path(args.child), args.devices)
    if args.output is None:
        parser.error("--output is needed")
    output, rows = pathlib.Path(args.output), []
    for model in ["toy"] if args.smoke else args.models.split(","):
        for shard_gb in [1e-4] if args.smoke else map(float, args.shard_gb.split(",")):
            row = {"model": model, "shard_gb": shard_gb, "devices": args.devices}
            rows.append(
                environment.attempt(row, lambda: measure(output / "weights", model, shard_gb, args.devices))  # noqa: B023
            )
            environment.write_result(output / "load.json", rows)
    print(environment.table(rows, COLUMNS + (("error",) if any("error" in row for row in rows) else ())))
    return int(not all(row.get("ok") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
