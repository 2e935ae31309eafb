"""Every implementation of RMS normalisation and residual against float64, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import KernelError
from pallas_kernels.rms_residual import add_rms_norm
from tests.pallas_kernels import accuracy

SMALL = dict(elements=256, warps=4, stages=1, programs=4)  # several tiles in a run, several runs


def arrays(b, n, d, dtype, seed=0):
    """(x, y, scale, bias), gradient of the result."""
    rng = np.random.default_rng(seed)
    x, y, gradient = (jnp.asarray(rng.standard_normal((b, n, d)), dtype) for _ in range(3))
    scale, bias = (jnp.asarray(rng.standard_normal(d), jnp.float32) for _ in range(2))
    return (x, y, scale, bias), gradient


def run(implementation):
    fn = functools.partial(add_rms_norm, implementation=implementation)
    return accuracy.quickly_compiled(accuracy.with_gradients(fn))


def truth(args, gradient):
    fn = functools.partial(add_rms_norm, implementation="reference")
    return accuracy.exact(accuracy.with_gradients(fn), args, gradient)


@pytest.mark.parametrize("b, n, d, dtype", [(2, 37, 40, "float32"), (3, 21, 128, "bfloat16")])
def test_every_implementation_is_exact(monkeypatch, b, n, d, dtype):
    monkeypatch.setattr(dispatch, "tiles", lambda *_: dict.fromkeys(("forward", "backward"), SMALL))
    args, gradient = arrays(b, n, d, dtype)
    want, gave = truth(args, gradient), []
    wide = add_rms_norm(*args, implementation="reference")
    for implementation in ("xla", "pallas_interpret"):
        fn = run(implementation)
        got = fn(args, gradient)
        gave.append(got)
        assert got[0].dtype == dtype and [a.dtype for a in got[1]] == [a.dtype for a in args]
        found = accuracy.problems(got, want)
        if dtype == "bfloat16":  # the result is rounded twice, and so is the reference's
            found = [problem for problem in found if problem[0] != 0]
            assert accuracy.error(got[0], want[0]) <= accuracy.NARROW * accuracy.error(wide, want[0])
        assert found == [], implementation
        again = fn(args, gradient)
        assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(again)))
    assert dtype != "float32" or accuracy.agree(*gave)


def test_both_roundings():
    """The branch rounds, then the sum: where PyTorch does, and not elsewhere."""
    args, _ = arrays(1, 64, 96, "bfloat16")
    x, *others = args
    norm = accuracy.exact(functools.partial(add_rms_norm, implementation="reference"), jnp.zeros_like(x), *others)
    want = np.asarray(x, np.float64) + norm.astype(jnp.bfloat16).astype(np.float64)
    want = want.astype(jnp.bfloat16)
    once = (np.asarray(x, np.float64) + norm).astype(jnp.bfloat16)
    assert accuracy.error(once, want) > 1e-3
    for implementation in ("reference", "xla", "pallas_interpret"):
        fn = accuracy.quickly_compiled(functools.partial(add_rms_norm, implementation=implementation))
        assert accuracy.error(fn(*args), want) < 1e-4, implementation


def test_a_wrong_eps_is_caught():
    args, _ = arrays(1, 8, 40, "float32")
    args = args[0], args[1] * 3e-3, *args[2:]
    want = accuracy.exact(functools.partial(add_rms_norm, implementation="reference"), *args)
    for implementation in ("xla", "pallas_interpret"):
        fn = functools.partial(add_rms_norm, implementation=implementation)
        good, bad = (accuracy.quickly_compiled(functools.partial(fn, eps=eps))(*args) for eps in (1e-5, 1.1e-5))
        assert accuracy.error(good, want) < accuracy.FORWARD < accuracy.error(bad, want)


def test_y_alone_is_kept_for_the_backward_pass():
    args, _ = arrays(1, 64, 64, "bfloat16")
    for implementation in ("xla", "pallas_interpret"):
        fn = functools.partial(add_rms_norm, implementation=implementation)
        pull = jax.eval_shape(lambda *args, fn=fn: jax.vjp(fn, *args)[1], *args)
        assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull)) < 1.2 * args[1].size * 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(implementation="cuda"), "implementation='cuda': must be auto, reference"),
        (dict(x=((4, 8), "float32")), r"x.shape=\(4, 8\): must be \[b, n, d\]"),
        (dict(y=((1, 4, 8), "bfloat16")), "y.dtype=bfloat16: must be that of x, float32"),
        (dict(scale=((1, 8), "float32")), r"scale.shape=\(1, 8\): must be \(8,\)"),
        (dict(eps=-1.0), "eps=-1.0: must be a positive number"),
        (dict.fromkeys("xy", ((70_000, 1, 8), "float32")) | dict(implementation="pallas"), "b=70000: .* 65535"),
    ],
)
def test_bad_input_is_named(change, message):
    whole, row = ((1, 4, 8), "float32"), ((8,), "float32")
    given = dict(x=whole, y=whole, scale=row, bias=row)
    options = {name: value for name, value in change.items() if name not in given}
    avals = {name: jax.ShapeDtypeStruct(*change.get(name, value)) for name, value in given.items()}
    with pytest.raises(KernelError, match=f"^add_rms_norm: {message}"):
        jax.eval_shape(lambda kw: add_rms_norm(**kw, **options), avals)
