"""Every implementation of adaLN's two operations against float64, forward and backward, from one table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import adaln, dispatch, rows
from pallas_kernels.adaln import add_gated, modulate, xla
from pallas_kernels.dispatch import KernelError
from tests.pallas_kernels import accuracy

# Several tiles in a run and several runs, where the tables' own would take all of a test at once.
SMALL = dict(elements=256, warps=4, stages=1, programs=4)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "tiles", lambda *_: dict.fromkeys(("forward", "backward"), SMALL))


def arrays(op, b, n, d, r, dtype, seed=0):
    """Arguments of the operation, with r rows of each vector, and a gradient of the result."""
    rng = np.random.default_rng(seed)
    x, y, gradient = (jnp.asarray(rng.standard_normal((b, n, d)) + mean, dtype) for mean in (2, 0, 0))
    shift, scale = (jnp.asarray(rng.standard_normal((r, d)), jnp.float32) for _ in range(2))
    return ((x, shift, scale) if op is modulate else (x, scale, y)), gradient


@functools.cache
def run(op, implementation, **options):
    fn = functools.partial(op, implementation=implementation, **options)
    return accuracy.quickly_compiled(accuracy.with_gradients(fn))


def truth(op, args, gradient, **options):
    fn = functools.partial(op, implementation="reference", **options)
    return accuracy.exact(accuracy.with_gradients(fn), args, gradient)


@pytest.mark.parametrize("op", [modulate, add_gated])
@pytest.mark.parametrize(
    "b, n, d, r, dtype",
    [
        (2, 37, 40, 2, "float32"),  # nothing fits
        (3, 21, 72, 1, "bfloat16"),  # vectors that serve all images
        (1, 8, 128, 1, "float32"),  # all fits: no mask
    ],
)
def test_every_implementation_is_exact(small_tiles, op, b, n, d, r, dtype):
    args, gradient = arrays(op, b, n, d, r, dtype)
    want, found = truth(op, args, gradient), []
    for implementation in ("xla", "pallas_interpret"):
        run.cache_clear()  # the tiles are no part of its key
        fn = run(op, implementation)
        got = fn(args, gradient)
        found.append(got)
        assert got[0].dtype == dtype and [a.dtype for a in got[1]] == [a.dtype for a in args]
        assert accuracy.problems(got, want) == [], implementation
        again = fn(args, gradient)
        assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(again)))
    assert dtype != "float32" or accuracy.agree(*found)


def test_the_tiles_of_the_table_at_full_width():
    args, gradient = arrays(modulate, 1, 3, 2240, 1, "bfloat16")
    got = run(modulate, "pallas_interpret")(args, gradient)
    assert accuracy.problems(got, truth(modulate, args, gradient)) == []


def test_what_is_wrong_is_caught(monkeypatch, small_tiles):
    (x, *vectors), gradient = arrays(modulate, 1, 5, 40, 1, "float32")
    args = (x - 2) * 1e-3, *vectors
    want = accuracy.exact(functools.partial(modulate, implementation="reference"), *args)

    def off(implementation, **options):
        got = accuracy.quickly_compiled(functools.partial(modulate, implementation=implementation, **options))(*args)
        return not accuracy.error(got, want) < accuracy.FORWARD

    for implementation in ("xla", "pallas_interpret"):
        assert not off(implementation) and off(implementation, eps=1.1e-6)
    forward, pallas = xla.modulated, "pallas_interpret"
    with monkeypatch.context() as patch:  # scale instead of 1 + scale
        patch.setattr(xla, "modulated", lambda *a, **k: forward(*a[:3], a[3] - 1, **k))
        assert off("xla") and off(pallas)
    with monkeypatch.context() as patch:  # a mean over the channels of the padding too
        patch.setattr(rows, "masked_mean", lambda x, inside, d: jnp.sum(x, axis=1, keepdims=True) / d)
        assert off(pallas)
    # What lies behind the last token is NaN in the interpreter: a load that takes it in shows in sums.
    monkeypatch.setattr(rows, "load", lambda ref, mask: ref[...])
    pull = accuracy.quickly_compiled(lambda g: jax.vjp(functools.partial(modulate, implementation=pallas), *args)[1](g))
    assert np.isnan(pull(gradient)[1]).all()


def test_a_scan_of_blocks_computed_again():
    """As a network has them: the gradients of two layers under vmap, scan and remat."""
    (x, shift, scale), gradient = arrays(modulate, 2, 6, 16, 2, "float32")

    def network(implementation, x, shift, scale):
        def layer(x, vectors):
            shift, scale = vectors
            y = modulate(x, shift, scale, implementation=implementation)
            return add_gated(x, scale, jnp.tanh(y), implementation=implementation), None

        layers = jax.tree.map(lambda v: jnp.stack([v, -v]), (shift, scale))
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, layers)[0]

    def mapped(*args):
        each = jax.vmap(lambda *args: network("pallas_interpret", *(a[None] for a in args))[0])
        return each(*args)

    args = x - 2, shift, scale
    want = accuracy.exact(accuracy.with_gradients(functools.partial(network, "reference")), args, gradient)
    got = accuracy.quickly_compiled(accuracy.with_gradients(mapped))(args, gradient)
    assert accuracy.problems(got, want) == []


def test_one_array_is_kept_for_the_backward_pass():
    for op in (modulate, add_gated):
        (x, *others), _ = arrays(op, 1, 64, 64, 1, "bfloat16")
        for implementation in ("xla", "pallas_interpret"):
            fn = functools.partial(op, implementation=implementation)
            pull = jax.eval_shape(lambda *args, fn=fn: jax.vjp(fn, *args)[1], x, *others)
            assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull)) < 1.2 * x.size * 2


def test_missing_values_stay_in_their_row():
    (x, shift, scale), _ = arrays(modulate, 2, 9, 24, 1, "float32")
    x = x.at[1, 4, 7].set(jnp.nan)
    for implementation in ("xla", "pallas_interpret"):
        fn = accuracy.quickly_compiled(functools.partial(modulate, implementation=implementation))
        bad = np.isnan(fn(x, shift, scale))
        assert bad[1, 4].all() and bad.sum() == 24


def test_auto_tells_the_two_operations_apart(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 16, 8), jnp.float32)
    row = dict(device=jax.devices()[0].device_kind, dtype="float32", implementation="pallas_interpret",
               where={"n": [1, 99], "gated": [1, 1]}, error=1e-7, bound=2e-6, speedup=1.5)  # fmt: skip
    table = dispatch.table
    monkeypatch.setattr(dispatch, "table", lambda folder: {**table(folder), "auto": [row]})
    assert [adaln.choose(op, x, "auto") for op in ("modulate", "add_gated")] == ["xla", "pallas_interpret"]


@pytest.mark.parametrize(
    "op, change, message",
    [
        (modulate, dict(implementation="cuda"), "implementation='cuda': must be auto, reference"),
        (modulate, dict(x=((2, 8), "float32")), r"x.shape=\(2, 8\): must be \[b, n, d\]"),
        (modulate, dict(x=((2, 0, 8), "float32")), r"x.shape=\(2, 0, 8\): must be without an empty axis"),
        (modulate, dict(x=((2, 4, 8), "int32")), "x.dtype=int32: must be a float type"),
        (modulate, dict(shift=((8,), "float32")), r"shift.shape=\(8,\): must be \(2, 8\) or \(1, 8\)"),
        (modulate, dict(shift=((1, 8), "float32")), r"scale.shape=\(2, 8\): must be that of shift, \(1, 8\)"),
        (modulate, dict(eps=0.0), "eps=0.0: must be a positive number"),
        (modulate, dict(x=((2, 4, 8), "float16"), implementation="pallas"), "x.dtype=float16: .* float32 for a kernel"),
        (modulate, dict(x=((2, 2**28, 8), "float32"), implementation="pallas"), r"x\[0\].size=2147483648: .*int32"),
        (
            modulate,
            dict.fromkeys(("shift", "scale"), ((1, 5000), "float32"))
            | dict(x=((2, 4, 5000), "float32"), implementation="jax_triton"),
            "d=5000: must be at most 4096 for a kernel",
        ),
        (add_gated, dict(y=((2, 5, 8), "float32")), r"y.shape=\(2, 5, 8\): must be that of x, \(2, 4, 8\)"),
        (add_gated, dict(y=((2, 4, 8), "bfloat16")), "y.dtype=bfloat16: must be that of x, float32"),
        (add_gated, dict(gate=((3, 8), "float32")), r"gate.shape=\(3, 8\): must be \(2, 8\) or \(1, 8\)"),
    ],
)
def test_bad_input_is_named(op, change, message):
    whole, row = ((2, 4, 8), "float32"), ((2, 8), "float32")
    given = {"x": whole} | (dict(shift=row, scale=row) if op is modulate else dict(gate=row, y=whole))
    options = {name: value for name, value in change.items() if name not in given}
    avals = {name: jax.ShapeDtypeStruct(*change.get(name, value)) for name, value in given.items()}
    with pytest.raises(KernelError, match=f"^{op.__name__}: {message}"):
        jax.eval_shape(lambda kw: op(**kw, **options), avals)
