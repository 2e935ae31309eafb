"""What the operations on rows share: how arrays are cut, over programs and over devices, and the kernels
for cards that are not there, as test_static.py has them for the others.

SANA_JAX_NIGHT=1 adds widths.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import adaln, dispatch, rms_residual, rows
from pallas_kernels.adaln import add_gated, modulate
from pallas_kernels.rms_residual import add_rms_norm
from tests.pallas_kernels import accuracy, gpu, test_adaln, test_rms_residual

NIGHT = os.environ.get("SANA_JAX_NIGHT") == "1"
OPS = [modulate, add_gated, add_rms_norm]


def test_runs_cover_all_rows():
    for n in (1, 63, 64, 1000, 16384):
        for b in (1, 2, 5000):
            for d, elements in ((2240, 4096), (128, 4096), (1, 64)):
                padded, height, each, runs = rows.blocks(b, n, d, dict(elements=elements, programs=528))
                assert padded >= d > padded // 2 and height * padded == elements
                assert (runs - 1) * each * height < n <= runs * each * height and runs * b <= max(528 + b, b)


def arrays(op, r=1):
    if op is add_rms_norm:
        return test_rms_residual.arrays(2, 6, 8, "float32")
    return test_adaln.arrays(op, 2, 6, 8, r, "float32")


def in_halves(factor):
    """A `partition` that does on one device what two would do, each with half of the factor."""

    def partition(fn, cut):
        takes, gives = ([axes.split() for axes in side.split(",")] for side in cut.rule.split("->"))
        assert factor in cut.factors.split()

        def run(*args):
            assert [len(axes) for axes in takes] == [a.ndim for a in args]
            split = [jnp.split(a, 2, s.index(factor)) if factor in s else [a, a] for a, s in zip(args, takes)]
            halves, structure = zip(*(jax.tree.flatten(fn(*half)) for half in zip(*split)))
            pairs = zip(*halves, gives, strict=True)
            joined = [jnp.concatenate([x, y], s.index(factor)) if factor in s else x + y for x, y, s in pairs]
            return jax.tree.unflatten(structure[0], joined)

        return run

    return partition


@pytest.mark.parametrize("op, r", [(modulate, 1), (modulate, 2), (add_gated, 1), (add_gated, 2), (add_rms_norm, 1)])
def test_a_cut_changes_nothing(monkeypatch, op, r):
    """The rules say the truth; the formulas, not their kernels, are what is cut here."""

    def formula(fn, arrays, vectors, sums, tile, name, interpret):
        return rows.plain(fn, arrays, vectors)

    monkeypatch.setattr(rows, "kernel", formula)
    args, gradient = arrays(op, r)
    want = accuracy.exact(accuracy.with_gradients(functools.partial(op, implementation="reference")), args, gradient)
    for factor in "bn":
        fn = functools.partial(op, implementation="pallas_interpret", partition=in_halves(factor))
        assert accuracy.problems(accuracy.quickly_compiled(accuracy.with_gradients(fn))(args, gradient), want) == []


# --- Without a GPU.

static = [
    pytest.mark.static,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("jax_plugins", "triton", "jax_triton")),
        reason="needs the extra `static`",
    ),
]


def marked(*cases):
    return [pytest.param(*case, marks=static) for case in cases]


@pytest.fixture(autouse=True)
def no_layout_of_the_cpu(monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")  # where calls are looked at and not lowered


def program(op, b, n, d, dtype, implementation):
    """Forward and backward."""
    make = jax.ShapeDtypeStruct
    whole, row, vector = make((b, n, d), dtype), make((b, d), jnp.float32), make((d,), jnp.float32)
    args = {modulate: (whole, row, row), add_gated: (whole, row, whole), add_rms_norm: (whole, whole, vector, vector)}
    return accuracy.with_gradients(functools.partial(op, implementation=implementation)), args[op], whole


def fits(report, sm):
    assert report.spills == 0 and report.registers <= 255 and report.shared <= gpu.SHARED[sm], report


WIDTHS = (2240, 128) + (1152, 1024, 72) * NIGHT  # one row of a tile's elements, and many


# The operations of a table have a name each in the place of the width, or "any" where there is one.
TABLES = {modulate: adaln.FOLDER, add_gated: adaln.FOLDER, add_rms_norm: rms_residual.FOLDER}
TILES = [
    (op, device, dtype)
    for op, folder in TABLES.items()
    for device, dtype, name in gpu.rows_of(folder)
    if name in (op.__name__, "any")
]


@pytest.mark.parametrize("op, device, dtype", marked(*TILES))
def test_pallas_tiles_fit(op, device, dtype, monkeypatch):
    for sm in gpu.take(monkeypatch, device):
        for d in WIDTHS:
            kernels = gpu.pallas_kernels(*program(op, 2, 1023, d, dtype, "pallas"), sm=sm)
            assert len(kernels) == 2
            for kernel in kernels:
                fits(gpu.compile_pallas(kernel, sm), sm)


@pytest.mark.parametrize("op, device, dtype", marked(*TILES))
def test_jax_triton_tiles_fit(op, device, dtype, monkeypatch):
    for sm in gpu.take(monkeypatch, device):
        for d in WIDTHS:
            found = gpu.compile_jax_triton(monkeypatch, *program(op, 2, 1023, d, dtype, "jax_triton"), sm=sm)
            assert len(found) == 2
            for ir, report in found:
                assert "atomic" not in ir
                fits(report, sm)


@pytest.mark.parametrize("op", marked(*((op,) for op in OPS)))
def test_what_is_ragged_is_masked_and_nothing_is_written_twice(op):
    call = program(op, 2, 97, 72, "bfloat16", "pallas")
    kernels = {kernel.name: kernel for kernel in gpu.pallas_kernels(*call, sm=89)}
    calls = gpu.pallas_calls(*call)
    assert {call.params["name"] for call in calls} == set(kernels) and len(calls) == 2
    for call in calls:
        kernel = kernels[call.params["name"]]
        taken = gpu.ragged(call)
        assert len(taken) >= 4 and not taken & set(gpu.unmasked(kernel)), kernel.name
        assert set(gpu.writers(call)) == {1}, kernel.name
        assert b"atomic" not in kernel.ir


@pytest.mark.parametrize("op", marked((modulate,)))
def test_a_missing_mask_is_caught(op, monkeypatch):
    monkeypatch.setattr(rows, "load", lambda ref, mask: ref[...])
    call = program(op, 2, 97, 72, "bfloat16", "pallas")
    if jax.__version_info__ < (0, 12):  # which masks by itself
        ragged = {equation.params["name"]: gpu.ragged(equation) for equation in gpu.pallas_calls(*call)}
        for kernel in gpu.pallas_kernels(*call):
            assert ragged[kernel.name] & set(gpu.unmasked(kernel)), kernel.name
