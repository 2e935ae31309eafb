"""What the operations on rows share: how arrays are cut, over programs and over devices, and the kernels
for cards that are not there, as test_static.py has them for the others.

SANA_JAX_NIGHT=1 adds widths.
"""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import adaln, dispatch, rms_residual, rows
from pallas_kernels.adaln import add_gated, modulate
from pallas_kernels.rms_residual import add_rms_norm
from tests.pallas_kernels import accuracy, gpu, test_adaln, test_rms_residual

F32 = jnp.float32
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

def marked(*cases):
    return [pytest.param(*case, marks=gpu.STATIC) for case in cases]


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


N = 65535  # rows, of which a run has several tiles
WIDTHS = (2240, 128) + (1152, 1024, 72) * accuracy.NIGHT  # one row of a tile's elements, and many


# The operations of a table have a name each in the place of the width, or "any" where there is one.
TABLES = {modulate: adaln.FOLDER, add_gated: adaln.FOLDER, add_rms_norm: rms_residual.FOLDER}
TILES = [
    (op, device, dtype)
    for op, folder in TABLES.items()
    for device, dtype, name in gpu.rows_of(folder)
    if name in (op.__name__, "any")
]


def small(op):
    return program(op, 2, 97, 72, "bfloat16", "pallas")


@pytest.mark.parametrize("op, device, dtype", marked(*TILES))
def test_pallas_tiles_fit(op, device, dtype, monkeypatch):
    cards = gpu.take(monkeypatch, device)
    for d in WIDTHS:
        assert gpu.check_pallas(program(op, 2, N, d, dtype, "pallas"), cards) == 2


@pytest.mark.parametrize("op", marked(*((op,) for op in OPS)))
def test_only_tiles_differ_among_cards(op, monkeypatch):
    """tests/pallas_kernels/test_static.py has the control."""
    gpu.take(monkeypatch, "default")
    first, *others = (gpu.pallas_kernels(*program(op, 2, N, 2240, "bfloat16", "pallas"), sm=sm) for sm in gpu.SHARED)
    assert len(first) == 2 and others == [first] * 2


@pytest.mark.parametrize("op, device, dtype", marked(*TILES))
def test_jax_triton_tiles_fit(op, device, dtype, monkeypatch):
    for sm in gpu.take(monkeypatch, device):
        for d in WIDTHS:
            assert gpu.check_jax_triton(monkeypatch, program(op, 2, N, d, dtype, "jax_triton"), sm) == 2


@pytest.mark.parametrize("op", marked(*((op,) for op in OPS)))
def test_what_is_ragged_is_masked_and_nothing_is_written_twice(op):
    assert gpu.faults(small(op)) == set()


@pytest.mark.parametrize("op", marked(*((op,) for op in OPS)))
def test_jax_triton_under_vmap_scan_and_remat(op):
    """Its calls know none of these; the forward and backward passes are lowered under all three."""
    fn = functools.partial(op, implementation="jax_triton")
    call = {
        modulate: lambda x, v: fn(x, v[None], v[None]),
        add_gated: lambda x, v: fn(x, v[None], x),
        add_rms_norm: lambda x, v: fn(x, x, v, v),
    }[op]

    def loss(x, v):
        images = jax.checkpoint(jax.vmap(lambda one: call(one[None], v)))
        return jax.lax.scan(lambda total, some: (total + images(some).sum(), None), jnp.zeros((), x.dtype), x)[0]

    assert gpu.lower(jax.grad(loss), jax.ShapeDtypeStruct((2, 3, 8, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16,), F32))


# --- Negative controls: each check finds what it is there for.


@pytest.mark.parametrize("op", marked((modulate,)))
def test_a_missing_mask_is_caught(op, monkeypatch):
    monkeypatch.setattr(rows, "load", lambda ref, mask: ref[...])
    if jax.__version_info__ < (0, 12):  # which masks by itself
        assert "no mask" in {what for _, what in gpu.faults(small(op))}


@pytest.mark.parametrize("op", marked((add_gated,)))
def test_a_race_is_caught(op, monkeypatch):
    """Every image writes the block of the first."""
    block = rows.pl.BlockSpec

    def first(shape, index_map):
        return block(shape, lambda t, i: index_map(t, 0))

    monkeypatch.setattr(rows, "pl", types.SimpleNamespace(**{**vars(rows.pl), "BlockSpec": first}))
    assert "a race" in {what for _, what in gpu.faults(small(op))}


@pytest.mark.parametrize("op", marked((modulate,)))
def test_a_spill_is_caught(op, monkeypatch):
    accuracy.coarse(monkeypatch, elements=16384, warps=2)
    with pytest.raises(AssertionError, match="spills="):
        gpu.check_pallas(program(op, 2, N, 2240, "float32", "pallas"), [90])
