"""Every implementation of linear attention against float64, forward and backward, from one table of cases."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.dispatch import KernelError
from pallas_kernels.linear_attention import linear_attention, pallas_triton, xla
from tests.pallas_kernels import accuracy

EPS = 1e-15


def arrays(b, n, k, c, dtype, normed, seed=0):
    """(qkv, norm_scale or None), gradient of the result."""
    rng = np.random.default_rng(seed)
    qkv, gradient = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((b, n, k, 3 * c), (b, n, k, c)))
    scale = jnp.asarray(rng.standard_normal((2, k, c)), jnp.float32) if normed else None
    return (qkv, scale), gradient


def attend(qkv, scale, implementation="auto", eps=EPS):
    return linear_attention(qkv, eps, scale, implementation=implementation)


@functools.cache
def run(implementation):
    fn = functools.partial(attend, implementation=implementation)
    return accuracy.quickly_compiled(accuracy.with_gradients(fn))


def truth(args, gradient, eps=EPS):
    fn = functools.partial(attend, implementation="reference", eps=eps)
    return accuracy.exact(accuracy.with_gradients(fn), args, gradient)


CASES = [  # b, n, k, c, dtype, normed; those of float32 are jax-triton's too, in interpreted.py
    (1, 40, 2, 16, "float32", False),
    (2, 75, 2, 16, "float32", True),
    (1, 33, 1, 64, "float32", False),
    (3, 130, 1, 32, "bfloat16", True),
    (2, 65, 1, 64, "bfloat16", False),
    (1, 3, 70, 32, "bfloat16", True),
    (1, 37, 36, 32, "bfloat16", False),
]
LARGE = [
    (1, 16384, 4, 32, "float32", False),
    (1, 1024, 70, 32, "float32", True),
    (1, 1000, 36, 32, "bfloat16", False),
]
LARGE += accuracy.NIGHT * [
    (1, 16384, 4, 32, "bfloat16", True),
    (2, 5000, 3, 64, "float32", False),
    *(
        (1 + (n + k) % 3, n, k, 32, dtype, normed)
        for n in (31, 256, 1000, 1024)
        for k in (36, 70)
        for dtype, normed in (("bfloat16", False), ("float32", True))
    ),
]


def check(case):
    args, gradient = arrays(*case)
    want = truth(args, gradient)
    (b, n, k, c, dtype, normed) = case
    # Through the norm a gradient is the sum of two that are rounded each.
    twice = 1.3 if normed else accuracy.NARROW
    found = {name: run(name)(args, gradient) for name in ("xla", "pallas_interpret")}
    for implementation, got in found.items():
        assert got[0].dtype == got[1][0].dtype == dtype and got[0].shape == (b, n, k, c)
        assert accuracy.problems(got, want, twice) == [], implementation
    assert dtype != "float32" or accuracy.agree(*found.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_is_exact(case):
    check(case)


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_twice_gives_the_same_bits(implementation):
    case = CASES[1]
    once, again = (run(implementation)(args, gradient) for args, gradient in [arrays(*case)] * 2)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(once), jax.tree.leaves(again)))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_arrays(case, monkeypatch):
    if not accuracy.NIGHT:  # then the tiles of the table
        accuracy.coarse(monkeypatch, rows=max(256, case[1] // 2 + 1))
    run.cache_clear()
    check(case)
    run.cache_clear()


def as_on_gpus(monkeypatch, cuts, factor=lambda x: x):
    """The XLA form that other platforms than CPUs get, its factors changed by `factor`; `cuts` gets the products
    that are computed in parts."""

    def platform_dependent(*args, default, **others):
        return default(*map(factor, args))

    def cut(x):
        high = x.astype(jnp.bfloat16).astype(jnp.float32)
        return high, x - high

    def einsum(equation, *factors, precision=None, **options):
        """What a CPU computes in float32, in parts as a GPU does."""
        if precision != xla.IN_PARTS:
            return whole(equation, *factors, precision=precision, **options)
        cuts.append(equation)
        (a, b), (c, d) = map(cut, factors)
        b, d = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (b, d))
        return sum(whole(equation, *pair, precision="highest") for pair in ((a, c), (a, d), (b, c)))

    whole = jnp.einsum
    monkeypatch.setattr(jnp, "einsum", einsum)
    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    return accuracy.quickly_compiled(accuracy.with_gradients(functools.partial(attend, implementation="xla")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("normed", [False, True])
def test_the_xla_form_of_gpus(monkeypatch, dtype, normed):
    args, gradient = arrays(2, 65, 2, 32, dtype, normed)
    want, bound, cuts = truth(args, gradient), 1.3 if normed else accuracy.NARROW, []
    assert accuracy.problems(as_on_gpus(monkeypatch, cuts)(args, gradient), want, bound) == []
    assert bool(cuts) == (dtype == "bfloat16")
    if dtype == "bfloat16":  # float32 factors without what bfloat16 leaves of them
        got = as_on_gpus(monkeypatch, cuts, lambda x: x.astype(dtype))(args, gradient)
        assert 0 in {which for which, *_ in accuracy.problems(got, want, bound)}


@pytest.mark.parametrize("normed", [False, True])
def test_sums_beyond_float16(monkeypatch, normed):
    """Of keys of 16 and values of 32 over 4096 tokens, the state is 2 million; the result is 32 everywhere."""
    (qkv, scale), gradient = arrays(1, 4096, 1, 16, "float16", normed)
    qkv = jnp.abs(qkv).at[..., 16:32].set(16).at[..., 32:].set(32)
    args = qkv, None if scale is None else jnp.abs(scale)
    out, _ = got = as_on_gpus(monkeypatch, [])(args, gradient)
    assert (out == 32).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_many_tiles_in_a_run():
    """Sums in one run or in several, not in as many as there are tiles: the same result."""
    args, gradient = arrays(1, 170, 1, 16, "float32", False)
    want = truth(args, gradient)
    tiles = dispatch.tiles(str(pallas_triton.__file__).rsplit("/", 1)[0], "float32", 16)
    for programs in (1, 3):
        table = {name: {**tile, "programs": programs} for name, tile in tiles.items()}
        out, state = pallas_triton.forward(args[0], None, EPS, table, interpret=True)
        dqkv, _ = pallas_triton.backward(args[0], None, state, gradient, EPS, table, interpret=True)
        assert accuracy.problems((out, (dqkv, None)), want) == []


def test_a_wrong_eps_is_caught():
    """Where the denominator is small; with eps lost in it, no test could tell."""
    args, gradient = arrays(1, 8, 1, 16, "float32", False)
    args = (args[0] * 1e-3, None)
    got = jax.jit(accuracy.with_gradients(lambda x, s: attend(x, s, "pallas_interpret", 1e-6)))(args, gradient)
    assert accuracy.problems(got, truth(args, gradient, 1e-6)) == []
    assert accuracy.problems(got, truth(args, gradient, 1.1e-6)) != []


def test_an_unmasked_load_is_caught(monkeypatch):
    """What lies behind the end is NaN in the interpreter, so a tile that takes it in shows."""
    args, _ = arrays(1, 75, 1, 16, "float32", False)
    assert np.isfinite(attend(*args, "pallas_interpret")).all()
    monkeypatch.setattr(pallas_triton.Tile, "load", lambda tile, ref: ref[tile.at, :])
    assert not np.isfinite(attend(*args, "pallas_interpret")).all()


def test_dead_heads_and_nan():
    """No positive query or key: zero, and zero gradients; NaN goes on."""
    args, gradient = arrays(1, 40, 2, 16, "float32", False)
    qkv = args[0].at[:, :, 0, :32].set(-1.0)
    for implementation in ("xla", "pallas_interpret"):
        out, (dqkv, _) = run(implementation)((qkv, None), gradient)
        assert not out[:, :, 0].any() and not dqkv[:, :, 0, :32].any() and np.isfinite(dqkv).all()
        out, _ = run(implementation)((qkv.at[0, 3, 1, 20].set(jnp.nan), None), gradient)
        assert np.isnan(out[:, :, 1]).all() and not np.isnan(out[:, :, 0]).any()


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_vmap_scan_and_remat(implementation):
    """Transformations, of the gradient too, give what the plain call gives."""
    (qkv, _), _ = arrays(4, 20, 1, 16, "float32", False)
    fn = functools.partial(attend, scale=None, implementation=implementation)
    accuracy.check_transformations(fn, qkv)


def test_little_is_kept_for_the_backward_pass():
    """qkv and the state: about three activations, not the nine of the plain derivative."""
    (qkv, _), _ = arrays(1, 1024, 2, 32, "bfloat16", False)

    def kept(implementation):
        pull = jax.eval_shape(lambda x: jax.vjp(lambda x: attend(x, None, implementation), x)[1], qkv)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pull)) / (qkv.size * 2 / 3)

    assert kept("xla") < 3.2 and kept("pallas_interpret") < 3.2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(implementation="cuda"), "implementation='cuda': must be auto, reference, xla, pallas"),
        (dict(shape=(2, 8, 48)), r"qkv.shape=\(2, 8, 48\): must be \[b, n, k, 3 \* c\]"),
        (dict(shape=(2, 0, 1, 48)), r"qkv.shape=\(2, 0, 1, 48\): must be without an empty axis"),
        (dict(shape=(2, 8, 1, 50)), "last axis divisible by 3"),
        (dict(dtype="int32"), "qkv.dtype=int32: must be a float type"),
        (dict(dtype="float16", implementation="pallas"), "qkv.dtype=float16: must be bfloat16 or float32 for a kernel"),
        (dict(shape=(2, 8, 1, 24), implementation="pallas_interpret"), "c=8: must be 16, 32 or 64 for a kernel"),
        (
            dict(shape=(2, 8, 1, 192), norm_scale=jnp.ones((2, 1, 64)), implementation="pallas_interpret"),
            "c=64: must be 16 or 32 for a kernel with a norm",
        ),
        (dict(shape=(1, 400_000, 70, 96), implementation="jax_triton"), r"qkv\[0\].size=2688000000: .*int32"),
        (dict(shape=(70_000, 1, 1, 96), implementation="pallas"), "b=70000: must be at most 65535"),
        (dict(eps=0.0), "eps=0.0: must be a positive number"),
        (dict(norm_scale=jnp.ones(16)), r"norm_scale.shape=\(16,\): must be \[2, k, c\], here \(2, 1, 16\)"),
    ],
)
def test_bad_input_is_named(change, message):
    shape, dtype = change.pop("shape", (2, 8, 1, 48)), change.pop("dtype", "float32")
    fn = functools.partial(linear_attention, **{"eps": EPS, **change})
    with pytest.raises(KernelError, match=f"^linear_attention: .*{message}"):
        jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, dtype))


def test_auto_takes_a_kernel_only_where_it_won(monkeypatch, caplog):
    args, _ = arrays(1, 16, 1, 16, "float32", False)
    device = jax.devices()[0].device_kind
    row = dict(device=device, dtype="float32", implementation="pallas_interpret", where={"n": [1, 99], "c": [16, 16]},
               error=1e-7, bound=2e-6, speedup=1.5)  # fmt: skip
    rows, table = [], dispatch.table
    monkeypatch.setattr(dispatch, "table", lambda folder: {**table(folder), "auto": rows})

    def chosen():
        dispatch._log.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "pallas_kernels"):
            attend(*args)
        (said,) = caplog.messages
        return said

    assert f"linear_attention on {device}, float32" in chosen() and "xla (no measurement" in chosen()
    for lost in (dict(speedup=0.9), dict(error=1e-5), dict(device="NVIDIA H200"), dict(where={"n": [17, 99]})):
        rows[:] = [{**row, **lost}]
        assert "xla (no measurement" in chosen()
    rows[:] = [row]
    assert "pallas_interpret (measured 1.50 times as fast as xla)" in chosen()
    args = (args[0].astype(jnp.float16), None)
    assert "xla (the kernels do not run: linear_attention: qkv.dtype=float16" in chosen()


def test_runs_cover_all_tokens():
    for n in (1, 63, 64, 65, 1000, 16384):
        for heads in (1, 70, 5000):
            tiles, parts = pallas_triton.runs(n, heads, 64, 528)
            assert (parts - 1) * tiles * 64 < n <= parts * tiles * 64 and parts <= max(1, pl.cdiv(528, heads))
