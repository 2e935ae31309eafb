"""The door to the kernels: what it takes and refuses.  The depthwise convolution has a backward pass of its
own; it is that of the plain sum of taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import depthwise, dispatch
from sana_jax import ops
from sana_jax.errors import InputError


def arrays(size, dtype, bias=True):
    keys = jax.random.split(jax.random.key(size), 4)
    shapes = (2, 5, 4, 6), (size, size, 6), (6,), (2, 5, 4, 6)
    x, kernel, offset, gradient = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes))
    return (x, kernel, offset) if bias else (x, kernel), gradient


def library(x, kernel, bias=0.0):
    conv = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1], precision="highest",
    )  # fmt: skip
    return conv + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_depthwise_conv_and_its_gradients(size, bias):
    arguments, gradient = arrays(size, jnp.float32, bias)
    out, pull = jax.vjp(ops.depthwise_conv, *arguments)
    expected, expected_pull = jax.vjp(library, *arguments)
    for ours, theirs in zip((out, *pull(gradient)), (expected, *expected_pull(gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    flipped = jax.vjp(library, arguments[0], arguments[1][::-1, ::-1], *arguments[2:])[1](gradient)
    assert size == 1 or np.abs(flipped[0] - pull(gradient)[0]).max() > 0.1, "negative control"


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    arguments, gradient = arrays(3, jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in arguments]
    ours = jax.vjp(ops.depthwise_conv, *arguments)[1](gradient)
    theirs = jax.vjp(ops.depthwise_conv, *wide)[1](gradient.astype(jnp.float32))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_the_two_forms_of_the_kernel_gradient_agree():
    """That of the CPU and that of every other platform; the latter runs here nowhere else."""
    (x, _, _), gradient = arrays(5, jnp.float32)
    one, other = (fn(x, gradient, 5) for fn in (depthwise.kernel_gradient_by_row, depthwise.kernel_gradient))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 6), (4, 4, 6), (3, 5, 6)])
def test_a_kernel_without_a_centre(shape):
    with pytest.raises(InputError, match="kernel.shape=.* must be .* odd"):
        ops.depthwise_conv(jnp.zeros((1, 4, 4, 6)), jnp.zeros(shape))


X = jnp.ones((2, 4, 4, 16))
ROW = jnp.ones((1, 1, 1, 16))
OPS = {  # each with arguments that every implementation takes
    "relu_linear_attention": (jnp.ones((2, 16, 2, 48)), 1e-15),
    "mix_ffn": (X, jnp.ones((3, 3, 16)), jnp.ones(16)),
    "modulate": (X, ROW, ROW),
    "add_gated": (X, ROW, X),
    "add_rms_norm": (X, X, jnp.ones(16), jnp.ones(16)),
}


def of(dtype, args):
    return [a.astype(dtype) if isinstance(a, jax.Array) else a for a in args]


@pytest.mark.parametrize("name", OPS)
def test_the_door(name):
    op, args = getattr(ops, name), OPS[name]
    assert ops.KERNELS[0] == "auto" and jax.eval_shape(lambda: op(*args)).dtype == jnp.float32
    with pytest.raises(InputError, match="kernels='cuda': must be one of 'auto', .*'jax_triton'"):
        op(*args, kernels="cuda")
    # Kernels have two types, plain XLA has all of them: "auto" finds it, and a name is taken at its word.
    half = of(jnp.float16, args)
    for kernels in ("auto", "xla"):
        assert jax.eval_shape(lambda k=kernels: op(*half, kernels=k)).dtype == jnp.float16
    with pytest.raises(InputError, match="dtype=float16: must be bfloat16 or float32 for a kernel"):
        jax.eval_shape(lambda: op(*half, kernels="pallas"))
    with pytest.raises(InputError, match="shape=.*must be"):
        op(args[0][:, :0], *args[1:])


EMPTY = [tuple(0 if i == axis else size for i, size in enumerate(X.shape)) for axis in range(4)]
FLAT = [(2, 16, 16), (16,)]
GRIDS = [(2, 2, 8, 16), (2, 8, 2, 16), (2, 1, 16, 16), (1, 4, 4, 16), (2, 4, 4, 8), *FLAT, *EMPTY]
ROWS = [(2, 4, 4, 16), (2, 4, 1, 16), (2, 1, 4, 16), (3, 1, 1, 16), (0, 1, 1, 16), (2, 1, 1, 8), (1, 1, 1, 1), (2, 16)]
GRID_ARGUMENTS = {"modulate": (0,), "add_gated": (0, 2), "add_rms_norm": (0, 1)}
EITHER = r"must be \(2, 1, 1, 16\) or \(1, 1, 1, 16\)"
MISFITS = [  # (operation, which arguments, their shapes, what is said)
    *((name, which, FLAT, r"x.shape=.*must be \[b, h, w, d\]") for name, which in GRID_ARGUMENTS.items()),
    *((name, which, EMPTY, "x.shape=.*without an empty axis") for name, which in GRID_ARGUMENTS.items()),
    ("modulate", (1,), ROWS, f"shift.shape=.*{EITHER}"),
    ("modulate", (2,), [(2, 1, 1, 16), *ROWS], r"scale.shape=.*must be \(1, 1, 1, 16\)"),
    ("add_gated", (1,), ROWS, f"gate.shape=.*{EITHER}"),
    ("add_gated", (2,), GRIDS, "y.shape=.*must be"),
    ("add_rms_norm", (1,), GRIDS, "y.shape=.*must be"),
    ("add_rms_norm", (2,), [(1, 16), (8,), ()], r"scale.shape=.*must be \(16,\)"),
    ("add_rms_norm", (3,), [(1, 16), (8,), ()], r"bias.shape=.*must be \(16,\)"),
]


@pytest.mark.parametrize("name, which, shapes, message", MISFITS)
def test_what_does_not_fit_is_refused_and_not_cut_to_fit(name, which, shapes, message):
    for shape in shapes:
        args = [jnp.ones(shape) if i in which else arg for i, arg in enumerate(OPS[name])]
        with pytest.raises(InputError, match=f"^{name}: {message}"):
            jax.eval_shape(getattr(ops, name), *args)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_each_image_and_of_all(rows):
    """The control: what models pass."""
    row = jnp.ones((rows, 1, 1, 16))
    assert jax.eval_shape(ops.modulate, X, row, row).shape == jax.eval_shape(ops.add_gated, X, row, X).shape == X.shape


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_by_name_on_a_cpu(name):
    for kernels in dispatch.GPU_ONLY:
        with pytest.raises(InputError, match=f"implementation='{kernels}': must be auto, .* on a cpu"):
            getattr(ops, name)(*OPS[name], kernels=kernels)


def test_kernels_that_this_machine_does_not_run(monkeypatch):
    for name in ("pallas", "jax_triton"):
        with pytest.raises(InputError, match=f"kernels='{name}': needs an NVIDIA GPU, and this is a cpu; here: auto"):
            ops.require_runnable(name)
    with pytest.raises(InputError, match="kernels='jax-triton': .*did you mean 'jax_triton'"):
        ops.require_runnable("jax-triton")
    ops.require_runnable("xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ops.require_runnable("pallas")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="jax-triton is not installed"):
        ops.require_runnable("jax_triton")


def test_sums_over_many_tokens_leave_float16():
    """State and total of 4096 tokens: 32 * 32 * 4096 = 4e6; the largest float16 is 65504."""
    qkv = jnp.full((1, 4096, 1, 96), 32, jnp.float16)
    np.testing.assert_array_equal(jax.jit(ops.relu_linear_attention, static_argnums=1)(qkv, 1e-15), 32)
