"""What the machine is and what it can do at most; and the helpers that every benchmark shares.

    python -m benchmarks.environment --output DIR [--smoke]

Protocol: a host clock around the call and a wait for its result, 20 repeats after 5 warm-ups, median
with the 10th and 90th percentile.  Inputs are random, never zero: matrix products of zeros run
faster than real ones.  The two ceilings are a large copy (bytes read plus written) and an 8192-cubed
bfloat16 product; every fraction that the other scripts report can be divided by those of that day.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
LIMIT = 30.0  # seconds for one measurement; the smoke runs lower it
PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "sana_jax")


def measure(fn, repeats=20, warmups=5, wait=None):
    """Times `fn()`.

    Args:
      fn: does the work; its result is handed to `wait`.
      wait: blocks until the result is there; None is `jax.block_until_ready`.
    After LIMIT seconds no further repeat starts once there are 5, and after a quarter of it no
    further warm-up once there are 2: `repeats` says how many there were.
    Returns:
      {"ms", "p10", "p90", "repeats"}, milliseconds.
    """
    import numpy as np

    if wait is None:
        import jax

        wait = jax.block_until_ready
    start, times = time.perf_counter(), []
    for i in range(warmups):
        if i < 2 or time.perf_counter() - start < LIMIT / 4:
            wait(fn())
    for i in range(repeats):
        if i >= 5 and time.perf_counter() - start > LIMIT:
            break
        begin = time.perf_counter()
        wait(fn())
        times.append(1e3 * (time.perf_counter() - begin))
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {"ms": round(median, 4), "p10": round(p10, 4), "p90": round(p90, 4), "repeats": len(times)}


def nvidia_smi():
    """{field: value} of the first GPU as nvidia-smi prints it, or {}."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), (part.strip() for part in line.splitlines()[0].split(","))))


@functools.cache
def machine():
    """Versions, device and command of this process."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    flags = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "TORCH"))}
    command = ["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {"versions": versions, "flags": flags, "command": " ".join(command), "at_start": nvidia_smi()}


def write_result(path, rows, **more):
    """Writes {"machine", "clocks", "rows", ...} as JSON; called after every row, so nothing is lost."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "clocks": nvidia_smi(), **more, "rows": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def table(rows, columns):
    """Rows as aligned text, one line each; absent values are blank."""

    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [list(columns)] + [[text(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip() for line in lines)


def attempt(row, work):
    """row | work(), or row with the first line of the error: one failure must not end the run."""
    try:
        return row | work()
    except Exception as error:  # any: what a compiler or a card can raise is not ours to list
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        return row | {"error": f"{type(error).__name__}: {message}"[:300]}


def fan_in(path, shape):
    """Inputs of one output of a kernel; leading axes that only stack layers do not count."""
    if "depthwise" in path or path.split("/")[-2].removeprefix("scale_").isdigit():
        return shape[-3] * shape[-2]
    if len(shape) == 4:
        return shape[0] * shape[1] * shape[2]
    return shape[-2]


def random_params(module, seed=0):
    """Parameters of `module` in its param_dtype, drawn on the device at the scale of trained ones.

    Kernels have a standard deviation of 1 / sqrt(fan in), norm weights lie around 1 (Gemma's, which
    hold w of 1 + w, around 0), biases and tables are small.
    """
    import flax.traverse_util
    import jax

    from sana_jax.models.gemma2 import Gemma2
    from sana_jax.parameters import parameter_shapes

    @functools.partial(jax.jit, static_argnums=1)  # one small program for each distinct shape
    def draw(key, shape, mean, scale):
        return (mean + scale * jax.random.normal(key, shape, module.param_dtype)).astype(module.param_dtype)

    leaves, key = {}, jax.random.key(seed)
    for i, (path, shape) in enumerate(parameter_shapes(module).items()):
        name, mean = path.split("/")[-1], 0.0
        if name == "kernel":
            scale = fan_in(path, shape) ** -0.5
        elif name == "scale":
            scale, mean = 0.1, 0.0 if isinstance(module, Gemma2) else 1.0
        else:
            scale = 0.02
        leaves[path] = draw(jax.random.fold_in(key, i), shape, mean, scale)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def arguments(docstring):
    """A parser with what every script takes: --output and --smoke."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, for a machine without a GPU")
    return parser


def ceilings(smoke):
    """Rows of the copy and of the product."""
    import jax
    import jax.numpy as jnp

    rows, n = [], 512 if smoke else 8192
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    row = measure(lambda product=jax.jit(jnp.matmul): product(a, b))
    rows.append({"what": f"bf16 matmul {n}^3"} | row | {"tflops": 2 * n**3 / row["ms"] / 1e9})
    count = 2**20 if smoke else 2**31  # 4 GiB in, 4 GiB out
    x = jnp.tile(a.reshape(-1), max(1, count // a.size))
    row = measure(lambda copy=jax.jit(lambda x: -x): copy(x))
    rows.append({"what": "copy"} | row | {"gbs": 4 * x.size / row["ms"] / 1e6})
    small = jnp.ones(8)
    row = measure(lambda step=jax.jit(lambda x: x + 1): step(small), repeats=100)
    rows.append({"what": "one tiny program, host to host"} | row)
    return rows


def main():
    args = arguments(__doc__).parse_args()
    import jax

    rows = ceilings(args.smoke)
    device = jax.devices()[0]
    write_result(
        pathlib.Path(args.output) / "environment.json", rows,
        device=device.device_kind, memory=device.memory_stats(),
    )  # fmt: skip
    print(device.device_kind, machine()["versions"], nvidia_smi(), sep="\n")
    print(table(rows, ("what", "ms", "p10", "p90", "tflops", "gbs")))


if __name__ == "__main__":
    main()
