"""Every operation in every float type: gradients have the types of what they are of, and float64 is float64."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import depthwise, dispatch
from pallas_kernels.dispatch import KernelError
from pallas_kernels.mix_ffn import mix_ffn, xla
from tests.pallas_kernels import accuracy
from tests.pallas_kernels.test_dispatch import OPS, arguments, operations, run


def convolved(*args, implementation):
    """An operation of one implementation."""
    return depthwise.depthwise_conv(*args)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("op", [*OPS, convolved], ids=lambda op: op.__name__)
def test_gradients_have_the_types_of_what_they_are_of(op, dtype):
    shapes = OPS.get(op, ((1, 3, 4, 8), (3, 3, 8), (8,)))
    names = ["reference", "xla"] + ["pallas_interpret"] * (dtype in dispatch.DTYPES)
    with jax.enable_x64(dtype == "float64"):
        args = arguments(shapes, dtype)
        for name in names:
            out, gradients = jax.eval_shape(run(op, name), *args)
            assert [a.dtype for a in (out, *gradients)] == [dtype] * (1 + len(args)), name


@operations
def test_float64_is_computed_in_float64(op):
    with jax.enable_x64(True):
        args = arguments(OPS[op], "float64")
        got, want = (jax.tree.leaves(jax.jit(run(op, name))(*args)) for name in ("xla", "reference"))
        assert max(accuracy.error(a, b) for a, b in zip(got, want, strict=True)) < 1e-14


def test_the_forms_of_gpus_compute_float64_too():
    """Those of the operations that differ on CPUs."""
    with jax.enable_x64(True):
        args = arguments(OPS[mix_ffn], "float64")
        out, gradients = run(mix_ffn, "reference")(*args)
        options = dict(first_silu=True)
        got = xla._forward(*args, **options), *xla._backward(*args, out, **options)
        assert max(accuracy.error(a, b) for a, b in zip(got, (out, *gradients), strict=True)) < 1e-14
        x, kernel, _ = args
        one, other = (fn(x, x, 3) for fn in (depthwise.kernel_gradient_by_row, depthwise.kernel_gradient))
        assert one.dtype == other.dtype == "float64" and accuracy.error(one, other) < 1e-14


def image(*shape):
    return jnp.zeros(shape)


@pytest.mark.parametrize(
    "args, message",
    [
        ((image(4, 4, 6), image(3, 3, 6)), r"x.shape=\(4, 4, 6\): must be \[b, h, w, c\]"),
        ((image(1, 4, 0, 6), image(3, 3, 6)), r"x.shape=\(1, 4, 0, 6\): must be without an empty axis"),
        ((image(1, 4, 4, 6), image(3, 3, 1)), r"kernel.shape=\(3, 3, 1\): must be \[k, k, c\], c that of x, 6"),
        ((image(1, 4, 4, 6), image(3, 3, 6), image(1)), r"bias.shape=\(1,\): must be \(6,\)"),
        ((image(1, 4, 4, 6), jnp.zeros((3, 3, 6), int)), "kernel.dtype=int32: must be a float type"),
    ],
)
def test_bad_input_of_the_convolution_is_named(args, message):
    with pytest.raises(KernelError, match=f"^depthwise_conv: {message}"):
        depthwise.depthwise_conv(*args)
