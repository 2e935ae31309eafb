"""Every implementation of the middle of Mix-FFN against float64, forward and backward, from one table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import KernelError
from pallas_kernels.mix_ffn import mix_ffn, pallas_triton, xla
from tests.pallas_kernels import accuracy


def arrays(b, h, w, c, dtype, seed=0):
    """(y, kernel, bias), gradient of the result."""
    rng = np.random.default_rng(seed)
    y, gradient = (jnp.asarray(rng.standard_normal((b, h, w, n)), dtype) for n in (2 * c, c))
    kernel, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 3, 2 * c), (2 * c,)))
    return (y, kernel, bias), gradient


@functools.cache
def run(implementation, first_silu):
    fn = functools.partial(mix_ffn, first_silu=first_silu, implementation=implementation)
    return accuracy.quickly_compiled(accuracy.with_gradients(fn))


def truth(args, gradient, first_silu):
    fn = functools.partial(mix_ffn, first_silu=first_silu, implementation="reference")
    return accuracy.exact(accuracy.with_gradients(fn), args, gradient)


CASES = [  # b, h, w, c, dtype, first_silu; those of float32 are jax-triton's too, in interpreted.py
    (2, 5, 9, 40, "float32", True),  # nothing fits
    (1, 1, 6, 5, "float32", False),
    (3, 17, 3, 33, "bfloat16", False),  # several blocks of the sums
]
LARGE = [(1, 9, 19, 24, "float32", False)] + accuracy.NIGHT * [
    (b, h, w, c, dtype, first_silu)
    for b, h, w, c in ((1, 32, 32, 480), (2, 33, 35, 72), (3, 1, 37, 8), (1, 64, 5, 130), (1, 128, 128, 16))
    for dtype, first_silu in (("float32", False), ("float32", True), ("bfloat16", True))
]


def check(case):
    *sizes, dtype, first_silu = case
    args, gradient = arrays(*sizes, dtype)
    want = truth(args, gradient, first_silu)
    found = {name: run(name, first_silu)(args, gradient) for name in ("xla", "pallas_interpret")}
    for implementation, got in found.items():
        assert got[0].dtype == got[1][0].dtype == dtype and got[0].shape == tuple(sizes)
        # In the backward pass what stands between its two passes is rounded too.
        assert accuracy.problems(got, want, 1.5) == [], implementation
    assert dtype != "float32" or accuracy.agree(*found.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_is_exact(case):
    check(case)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_twice_gives_the_same_bits(implementation):
    case = CASES[0]
    once, again = (run(implementation, case[-1])(args, gradient) for args, gradient in [arrays(*case[:-1])] * 2)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(once), jax.tree.leaves(again)))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_arrays(case, monkeypatch):
    accuracy.coarse(monkeypatch, columns=32)
    run.cache_clear()
    check(case)
    run.cache_clear()


@pytest.mark.parametrize("dtype, first_silu", [("float32", True), ("float32", False), ("bfloat16", True)])
def test_the_xla_form_of_gpus(dtype, first_silu):
    """Here the one of CPUs runs; they differ in where SiLU stands and in what the backward pass keeps."""
    args, gradient = arrays(1, 3, 4, 8, dtype)
    forms = (functools.partial(fn, first_silu=first_silu) for fn in (xla._forward, xla._backward))
    forward, backward = map(accuracy.quickly_compiled, forms)
    got = forward(*args), backward(*args, gradient)
    assert accuracy.problems(got, truth(args, gradient, first_silu), 1.5) == []


def test_wrong_padding_is_caught(monkeypatch):
    """A mask that forgets the right border takes in the next row's first pixel."""
    args, _ = arrays(1, 4, 8, 32, "float32")
    want = accuracy.exact(functools.partial(mix_ffn, implementation="reference"), *args)
    forward = functools.partial(mix_ffn, implementation="pallas_interpret")
    assert accuracy.error(forward(*args), want) < accuracy.FORWARD

    def mask(tile, row, shift=0):
        return tile.columns[:, None] + shift + tile.channels[None] >= 0

    monkeypatch.setattr(pallas_triton.Tile, "mask", mask)
    assert not accuracy.error(forward(*args), want) < accuracy.FORWARD


def test_large_and_missing_values():
    """SiLU of what exp cannot hold is 0 or the value itself; NaN goes on, to its neighbours alone."""
    (y, kernel, bias), _ = arrays(1, 5, 8, 4, "float32")
    y = y.at[0, 0, 0].set(-200.0).at[0, 0, 7].set(200.0).at[0, 4, 0].set(jnp.nan)
    want = mix_ffn(y, kernel, bias, implementation="reference")
    for implementation in ("xla", "pallas_interpret"):
        got = mix_ffn(y, kernel, bias, implementation=implementation)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        assert np.isnan(got).all(axis=-1).sum() == 4
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_vmap_scan_and_remat(implementation, monkeypatch):
    accuracy.coarse(monkeypatch, rows=1)  # less to compile
    (y, kernel, bias), _ = arrays(4, 2, 3, 2, "float32")
    fn = functools.partial(mix_ffn, kernel=kernel, bias=bias, implementation=implementation)
    accuracy.check_transformations(fn, y)


def test_y_alone_is_kept_for_the_backward_pass():
    (y, kernel, bias), _ = arrays(1, 16, 16, 64, "bfloat16")
    for implementation in ("xla", "pallas_interpret"):
        fn = functools.partial(mix_ffn, implementation=implementation)
        pull = jax.eval_shape(lambda y, fn=fn: jax.vjp(fn, y, kernel, bias)[1], y)
        assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull)) < 1.2 * y.size * 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(implementation="triton"), "implementation='triton': must be auto"),
        (dict(shape=(4, 4, 8)), r"y.shape=\(4, 4, 8\): must be \[b, h, w, 2 \* c\]"),
        (dict(shape=(0, 4, 4, 8)), "must be without an empty axis"),
        (dict(shape=(1, 4, 4, 7)), "an even last axis"),
        (dict(dtype="int8"), "y.dtype=int8: must be a float type"),
        (dict(dtype="float16", implementation="pallas"), "y.dtype=float16: must be bfloat16 or float32 for a kernel"),
        (dict(kernel=jnp.ones((9, 8))), r"kernel.shape=\(9, 8\): must be \(3, 3, 8\)"),
        (dict(bias=jnp.ones(4)), r"bias.shape=\(4,\): must be \(8,\)"),
        (dict(shape=(1, 20_000, 20_000, 8), implementation="pallas"), r"y\[0\].size=3200000000: .*int32"),
        (dict(shape=(1, 4096, 4096, 8), implementation="pallas"), r"h, w=\(4096, 4096\): .* 65535 blocks"),
    ],
)
def test_bad_input_is_named(change, message):
    y = jax.ShapeDtypeStruct(change.pop("shape", (1, 4, 4, 8)), change.pop("dtype", "float32"))
    fn = functools.partial(mix_ffn, **{"kernel": jnp.ones((3, 3, 8)), "bias": jnp.ones(8), **change})
    with pytest.raises(KernelError, match=f"^mix_ffn: .*{message}"):
        jax.eval_shape(fn, y)
