"""The kernels: the formulas of `xla.py`, run by `pallas_kernels.rows` in Pallas for its Triton backend."""

import functools

from pallas_kernels import rows
from pallas_kernels.adaln import xla


def modulate_forward(x, shift, scale, eps, tiles, interpret=False):
    """As `xla.modulate_forward`."""
    fn = functools.partial(xla.modulated, eps=eps)
    return rows.kernel(fn, [x], [shift, scale], 0, tiles["forward"], "modulate_forward", interpret)[0]


def modulate_backward(x, scale, gradient, eps, tiles, interpret=False):
    """As `xla.modulate_backward`."""
    fn = functools.partial(xla.modulated_pull, eps=eps)
    return rows.kernel(fn, [x, gradient], [scale], 2, tiles["backward"], "modulate_backward", interpret)


def add_gated_forward(x, gate, y, tiles, interpret=False):
    """As `xla.add_gated_forward`."""
    return rows.kernel(xla.gated, [x, y], [gate], 0, tiles["forward"], "add_gated_forward", interpret)[0]


def add_gated_backward(gate, y, gradient, tiles, interpret=False):
    """As `xla.add_gated_backward`."""
    tile, name = tiles["backward"], "add_gated_backward"
    dy, dgate = rows.kernel(xla.gated_pull, [y, gradient], [gate], 1, tile, name, interpret)
    return dgate, dy
