"""What the operations share: their error, their choice of implementation, their tables of tiles.

A table, `tiles.json` in the folder of an operation, holds

    tiles: {device or "default": {dtype: {width: {pass: {name: value}}}}}
    auto:  [{device, dtype, implementation, where: {size: [low, high]}, error, bound, speedup}]

A row of `auto` is a measurement on that device: the relative error against float64 and what was
allowed, and the time of the XLA form divided by that of the kernel.
"""

import functools
import importlib
import json
import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas", "pallas_interpret", "jax_triton")
KERNELS = ("pallas", "pallas_interpret", "jax_triton")
MAX_ELEMENTS = 2**31 - 1  # of an image: kernels address its elements with int32

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


def passes(package, name, tiles, cuts, partition, names=("forward", "backward"), **options):
    """(forward, backward) of an implementation, functions of arrays alone.

    Args:
      package: of the operation; a module of it has functions of these `names`.
      tiles: () -> the tiles of a kernel.
      cuts, partition: kernels, which XLA does not see into, go through `partition(function, Cut)` if that is given.
      options: keywords of the functions.
    """
    if name in KERNELS:
        options["tiles"] = tiles()
    if name in ("pallas", "pallas_interpret"):
        name, options["interpret"] = "pallas_triton", name == "pallas_interpret"
    module = importlib.import_module(f"{package}.{name}")  # here, as Triton may not be installed
    made = tuple(functools.partial(getattr(module, fn), **options) for fn in names)
    if partition is None or "tiles" not in options:
        return made
    return tuple(partition(fn, cut) for fn, cut in zip(made, cuts))


def require(condition, op, argument, value, supported):
    if not condition:
        raise KernelError(f"{op}: {argument}={value}: must be {supported}")


def wide(dtype):
    """The type to compute in: float32, or float64 where that is what came."""
    return dtype if dtype == jnp.float64 else jnp.float32


def require_float(op, name, array):
    require(jnp.issubdtype(array.dtype, jnp.floating), op, f"{name}.dtype", array.dtype, "a float type")


def require_addressable(op, name, array):
    """Raises KernelError if an image, array[0], has more elements than a kernel can address."""
    size = array.size // array.shape[0]
    limit = f"at most {MAX_ELEMENTS} for a kernel, whose offsets in an image are int32"
    require(size <= MAX_ELEMENTS, op, f"{name}[0].size", size, limit)


def listed(values):
    """The words of an error: 'a, b or c'."""
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} or {last}" if most else last


def abstract_device():
    """The card that is compiled for where the mesh in force names one that may not be there, or None."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def device_kind():
    """The name of the card that the program is traced for."""
    device = abstract_device()
    return jax.devices()[0].device_kind if device is None else device.device_kind


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


def choose(op, folder, implementation, dtype, sizes, obstacle):
    """The name of the implementation to run.

    Args:
      op, folder: the name of the operation, for messages, and where its tiles.json lies.
      implementation: one of IMPLEMENTATIONS.
      dtype, sizes: of the call, {name: int}, as in the rows of `auto`.
      obstacle: () -> None, or the KernelError that a kernel would raise for these arguments.
    Raises:
      KernelError: no such implementation, or a kernel is asked for by name and cannot run.
    """
    require(implementation in IMPLEMENTATIONS, op, "implementation", repr(implementation), listed(IMPLEMENTATIONS))
    if implementation not in ("auto", *KERNELS):
        return implementation  # without a look at the device
    obstacle = obstacle()
    if implementation != "auto":
        if obstacle is not None:
            raise obstacle
        return implementation
    device = device_kind()
    row = next((r for r in table(folder)["auto"] if holds(r, device, dtype, sizes)), None)
    if obstacle is not None:
        chosen, why = "xla", f"the kernels do not run: {obstacle}"
    elif row is None:
        chosen, why = "xla", "no measurement says that a kernel is right and faster"
    else:
        chosen, why = row["implementation"], f"measured {row['speedup']:.2f} times as fast as xla"
    _log(op, device, str(dtype), tuple(sizes.items()), chosen, why)
    return chosen


@functools.cache  # once for each kind of call
def _log(op, device, dtype, sizes, chosen, why):
    shape = ", ".join(f"{name}={size}" for name, size in sizes)
    logger.info("%s on %s, %s, %s: %s (%s)", op, device, dtype, shape, chosen, why)
