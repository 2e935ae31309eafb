"""What the operations share: their error, their choice of implementation, their tables of tiles.

A table, `tiles.json` in the folder of an operation, holds

    tiles: {device or "default": {dtype: {width: {pass: {name: value}}}}}
    auto:  [{device, dtype, implementation, where: {size: [low, high]}, error, bound, speedup}]

A row of `auto` is a measurement on that device: the relative error against float64 and what was
allowed, and the time of the XLA form divided by that of the kernel.
"""

import functools
import importlib
import importlib.util
import json
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas", "pallas_interpret", "jax_triton")
KERNELS = ("pallas", "pallas_interpret", "jax_triton")
GPU_ONLY = ("pallas", "jax_triton")
DTYPES = ("bfloat16", "float32")  # that kernels take
MAX_ELEMENTS = 2**31 - 1  # of an image: kernels address its elements with int32
MAX_GRID = 65535  # programs along CUDA's second and third axis

# What Triton compiles for, by a part of the device's name.
CAPABILITY = {"A100": 80, "A30": 80, "A10": 86, "L4": 89, "RTX 4090": 89, "H100": 90, "H200": 90, "GH200": 90}

logger = logging.getLogger(__name__)


class KernelError(ValueError):
    """An argument that an operation cannot take: names the operation, the argument, its value, the rule."""


class Cut(NamedTuple):
    """How the arrays of a pass may be cut over devices.

    rule: for each array that the pass takes and gives, in order and without None, a name for each axis,
      such as "b n k m, r k c -> b n k c, b k c"; what has one name has one size.
    factors: the names along which each device may hold a part and work on it alone.  A result without
      one of them is a sum over it, which is then still to be added up over devices.
    """

    rule: str
    factors: str


class How(NamedTuple):
    """How an operation runs.

    name: an implementation, not "auto".
    or_xla: whether "xla" takes its place on platforms that it does not run on: nobody asked for it by name.
    partition: None, or what kernels, which XLA does not see into, go through: `partition(function, Cut)`.
    """

    name: str
    or_xla: bool
    partition: Callable | None


def passes(package, how, tiles, cuts, names=("forward", "backward"), **options):
    """(forward, backward) of an implementation, functions of arrays alone.

    Args:
      package: of the operation; a module of it has functions of these `names`.
      tiles: () -> the tiles of a kernel.
      cuts: of the functions, for `how.partition`.
      options: keywords of the functions.
    """
    if how.name not in KERNELS:
        return _functions(package, how.name, names, options)
    made = _functions(package, how.name, names, options | {"tiles": tiles()})
    if how.partition is not None:
        made = tuple(how.partition(fn, cut) for fn, cut in zip(made, cuts))
    if not how.or_xla or how.name not in GPU_ONLY:
        return made
    return tuple(map(_on_cuda, made, _functions(package, "xla", names, options)))


def _functions(package, name, names, options):
    if name in ("pallas", "pallas_interpret"):
        name, options = "pallas_triton", options | {"interpret": name == "pallas_interpret"}
    module = importlib.import_module(f"{package}.{name}")  # here, as Triton may not be installed
    return tuple(functools.partial(getattr(module, fn), **options) for fn in names)


def _on_cuda(kernel, other):
    """The kernel in what is lowered for CUDA; the card that is traced for may not be where a program runs.

    Compiled even where the rest is not: only then is the platform that of the arguments.  An eager call is
    compiled anew each time."""
    return jax.jit(lambda *args: jax.lax.platform_dependent(*args, cuda=kernel, default=other))


def require(condition, op, argument, value, supported):
    if not condition:
        raise KernelError(f"{op}: {argument}={value}: must be {supported}")


def wide(dtype):
    """The type to compute in: float32, or float64 where that is what came."""
    return jnp.float64 if jax.dtypes.canonicalize_dtype(dtype) == jnp.float64 else jnp.float32


def require_float(op, name, array):
    require(jnp.issubdtype(array.dtype, jnp.floating), op, f"{name}.dtype", array.dtype, "a float type")


def require_for_kernels(op, name, array):
    """Raises KernelError: an array [b ...] of a type, or with images of a size or number, that no kernel takes."""
    require(str(array.dtype) in DTYPES, op, f"{name}.dtype", array.dtype, f"{listed(DTYPES)} for a kernel")
    b, size = array.shape[0], array.size // array.shape[0]
    limit = f"at most {MAX_ELEMENTS} for a kernel, whose offsets in an image are int32"
    require(size <= MAX_ELEMENTS, op, f"{name}[0].size", size, limit)
    require(b <= MAX_GRID, op, "b", b, f"at most {MAX_GRID} for a kernel")


def listed(values):
    """The words of an error: 'a, b or c'."""
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} or {last}" if most else last


def abstract_device():
    """The card that is compiled for where the mesh in force names one that may not be there, or None."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def traced_for():
    """The device that the program is traced for, which may be lowered for another."""
    device = abstract_device() or jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def device_kind():
    """The name of the card that the program is traced for."""
    return traced_for().device_kind


def platform():
    """The platform that the program is traced for: "gpu", "cpu" and others."""
    return traced_for().platform


def installed(implementation):
    """Whether the packages are there that an implementation needs beside jax."""
    return implementation != "jax_triton" or importlib.util.find_spec("jax_triton") is not None


def require_runnable(op, implementation):
    """Raises KernelError: a kernel that is not for the platform at hand, or not installed."""
    here, value = platform(), repr(implementation)
    others = listed(name for name in IMPLEMENTATIONS if name not in GPU_ONLY)
    runs = here == "gpu" or implementation not in GPU_ONLY
    require(runs, op, "implementation", value, f"{others} on a {here}; this one needs an NVIDIA GPU")
    others = listed(name for name in IMPLEMENTATIONS if name != implementation)
    require(installed(implementation), op, "implementation", value, f"{others}; {implementation} is not installed")


def capability():
    """What Triton has to compile for: None is the card at hand."""
    device = abstract_device()
    here = jax.devices()[0]
    if device is None or (here.platform == "gpu" and here.device_kind == device.device_kind):
        return None
    for part, number in CAPABILITY.items():
        if part in device.device_kind:
            return number
    raise KernelError(f"device_kind={device.device_kind!r}: must name one of {listed(CAPABILITY)}")


@functools.cache
def table(folder):
    """The tiles.json of a folder."""
    return json.loads(pathlib.Path(folder, "tiles.json").read_text(encoding="utf-8"))


def tiles(folder, dtype, width):
    """{pass: {name: value}} for the device that is traced for, else for any."""
    given = table(folder)["tiles"]
    for device in (device_kind(), "default"):
        if (found := given.get(device, {}).get(str(dtype), {}).get(str(width))) is not None:
            return found
    raise KernelError(f"{folder}: tiles.json: no tiles for {dtype} at width {width}")


def holds(row, device, dtype, sizes):
    """Whether a row of `auto` speaks for this call, and says that the kernel was right and won."""
    return (
        row["device"] == device
        and row["dtype"] == str(dtype)
        and row["error"] <= row["bound"]
        and row["speedup"] > 1
        and all(low <= sizes[name] <= high for name, (low, high) in row["where"].items())
    )


def choose(op, folder, implementation, dtype, sizes, check):
    """The name of the implementation to run.

    Args:
      op, folder: the name of the operation, for messages, and where its tiles.json lies.
      implementation: one of IMPLEMENTATIONS.
      dtype, sizes: of the call, {name: int}, as in the rows of `auto`.
      check: () -> None; raises KernelError where no kernel takes these arguments.
    Raises:
      KernelError: no such implementation, or a kernel is asked for by name and cannot run.
    """
    require(implementation in IMPLEMENTATIONS, op, "implementation", repr(implementation), listed(IMPLEMENTATIONS))
    if implementation not in ("auto", *KERNELS):
        return implementation  # without a look at the device
    if implementation != "auto":
        check()
        require_runnable(op, implementation)
        return implementation
    device = device_kind()
    chosen, why = _measured(folder, device, dtype, sizes, check)
    _log(op, device, str(dtype), tuple(sizes.items()), chosen, why)
    return chosen


def _measured(folder, device, dtype, sizes, check):
    """(what "auto" takes, why)."""
    try:
        check()
    except KernelError as error:
        return "xla", f"the kernels do not run: {error}"
    rows = [row for row in table(folder)["auto"] if holds(row, device, dtype, sizes)]
    for row in rows:
        if installed(name := row["implementation"]):
            return name, f"measured {row['speedup']:.2f} times as fast as xla"
    if rows:
        return "xla", f"{rows[0]['implementation']} was measured to be faster and is not installed"
    return "xla", "no measurement says that a kernel is right and faster"


@functools.cache  # once for each kind of call
def _log(op, device, dtype, sizes, chosen, why):
    shape = ", ".join(f"{name}={size}" for name, size in sizes)
    logger.info("%s on %s, %s, %s: %s (%s)", op, device, dtype, shape, chosen, why)
