"""The kernels: the formulas of `xla.py`, run by `pallas_kernels.rows` in Pallas for its Triton backend."""

import functools

from pallas_kernels import rows
from pallas_kernels.rms_residual import xla


def forward(x, y, scale, bias, eps, tiles, interpret=False):
    """As `xla.forward`."""
    fn = functools.partial(xla.added, eps=eps, dtype=x.dtype)
    vectors = [scale[None], bias[None]]
    return rows.kernel(fn, [x, y], vectors, 0, tiles["forward"], "rms_residual_forward", interpret)[0]


def backward(y, scale, gradient, eps, tiles, interpret=False):
    """As `xla.backward`."""
    fn = functools.partial(xla.added_pull, eps=eps)
    dy, dscale, dbias = rows.kernel(
        fn, [y, gradient], [scale[None]], 2, tiles["backward"], "rms_residual_backward", interpret
    )
    return dy, dscale[0], dbias[0]
