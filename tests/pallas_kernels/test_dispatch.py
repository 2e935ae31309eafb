"""The choice of an implementation: what "auto" takes runs wherever the program does, what cannot run says so."""

import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.adaln import add_gated, modulate
from pallas_kernels.dispatch import KernelError
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.mix_ffn import mix_ffn
from pallas_kernels.rms_residual import add_rms_norm
from tests.pallas_kernels import accuracy, gpu

CARD = "NVIDIA H200"


def attend(qkv, scale, **options):
    return linear_attention(qkv, 1e-15, scale, **options)


OPS = {  # the shapes of their arguments
    attend: ((2, 8, 2, 48), (2, 2, 16)),
    mix_ffn: ((2, 3, 4, 8), (3, 3, 8), (8,)),
    modulate: ((2, 5, 8), (2, 8), (2, 8)),
    add_gated: ((2, 5, 8), (2, 8), (2, 5, 8)),
    add_rms_norm: ((2, 5, 8), (2, 5, 8), (8,), (8,)),
}
operations = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def arguments(shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def run(op, implementation="auto"):
    """Of arguments alone: the result, and the gradients of the sum of its squares."""

    def both(*args):
        out, pull = jax.vjp(functools.partial(op, implementation=implementation), *args)
        return out, pull(out)

    return both


def same(got, want):
    return all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.fixture
def auto(monkeypatch):
    """What "auto" takes on the card that is seen here: names of implementations, the first that there is."""
    names, table = [], dispatch.table
    won = dict(device=CARD, dtype="float32", where={}, error=1e-7, bound=2e-6, speedup=1.5)

    def with_rows(folder):
        return {**table(folder), "auto": [{**won, "implementation": name} for name in names]}

    monkeypatch.setattr(dispatch, "table", with_rows)
    monkeypatch.setattr(dispatch, "device_kind", lambda: CARD)
    return names


def without_jax_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jax_triton" else find(name, *a))


@operations
def test_a_kernel_that_auto_took_gives_way_on_a_cpu(op, auto, monkeypatch):
    """The card is seen, and the program is compiled for the CPU: as a whole, or one operation after the other."""
    taken, on_cuda = [], dispatch._on_cuda
    monkeypatch.setattr(dispatch, "_on_cuda", lambda *fns: taken.append(fns) or on_cuda(*fns))
    auto.append("pallas")
    args = arguments(OPS[op])
    want = jax.jit(run(op, "xla"))(*args)
    assert not taken and same(jax.jit(run(op))(*args), want) and taken
    if op is modulate:
        assert accuracy.agree(run(op)(*args), want)


def test_it_gives_way_under_vmap_scan_and_remat(auto):
    auto.append("pallas")
    y, *rest = arguments(((4, 3, 4, 8), *OPS[mix_ffn][1:]))
    accuracy.check_transformations(lambda y: mix_ffn(y, *rest), y)


def kernels_in(lowered):
    text = lowered.as_text()
    return text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call")


ON_CARDS = [(op, "pallas") for op in OPS] + [(modulate, "jax_triton")]


@pytest.mark.parametrize("op, name", [pytest.param(*case, marks=gpu.STATIC) for case in ON_CARDS])
def test_it_stays_where_the_program_is_for_the_card(op, name, auto, monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    args = arguments(OPS[op])
    assert kernels_in(gpu.lower(run(op), *args)) == 0
    auto.append(name)
    assert kernels_in(gpu.lower(run(op), *args)) == kernels_in(gpu.lower(run(op, name), *args)) > 1


def test_auto_passes_over_what_is_not_installed(auto, monkeypatch, caplog):
    without_jax_triton(monkeypatch)
    args = arguments(OPS[mix_ffn])

    def chosen():
        dispatch._log.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "pallas_kernels"):
            assert np.isfinite(jax.jit(lambda *args: mix_ffn(*args))(*args)).all()
        (said,) = caplog.messages
        return said

    auto.append("jax_triton")
    assert "xla (jax_triton was measured to be faster and is not installed)" in chosen()
    auto.append("pallas")
    assert "pallas (measured 1.50 times as fast as xla)" in chosen()


@operations
def test_a_kernel_by_name_is_refused_where_it_does_not_run(op, monkeypatch):
    args = arguments(OPS[op])
    name = "linear_attention" if op is attend else op.__name__
    for kernel in dispatch.GPU_ONLY:
        message = f"^{name}: implementation='{kernel}': must be auto, reference, xla or pallas_interpret on a cpu"
        with pytest.raises(KernelError, match=message):
            op(*args, implementation=kernel)
    without_jax_triton(monkeypatch)
    message = f"^{name}: implementation='jax_triton': must be auto, .* or pallas_interpret; jax_triton is not installed"
    with gpu.target(90), pytest.raises(KernelError, match=message):
        jax.eval_shape(functools.partial(op, implementation="jax_triton"), *args)


def test_what_a_program_is_traced_for():
    assert dispatch.platform() == "cpu"
    for device in ("cpu", jax.devices()[1]):
        with jax.default_device(device):
            assert dispatch.traced_for().platform == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert dispatch.traced_for() == jax.devices()[1]
    with gpu.target(90):
        assert (dispatch.platform(), dispatch.device_kind()) == ("gpu", gpu.KINDS[90])


def test_limits_of_all_kernels():
    for dtype in dispatch.DTYPES:
        dispatch.require_for_kernels("op", "x", jax.ShapeDtypeStruct((dispatch.MAX_GRID, 4), dtype))
    for shape, dtype, message in (
        ((1, 4), "float16", "op: x.dtype=float16: must be bfloat16 or float32 for a kernel"),
        ((3, 2**31), "float32", r"op: x\[0\].size=2147483648: must be at most 2147483647 for a kernel"),
        ((65536, 4), "float32", "op: b=65536: must be at most 65535 for a kernel"),
    ):
        with pytest.raises(KernelError, match=message):
            dispatch.require_for_kernels("op", "x", jax.ShapeDtypeStruct(shape, dtype))
