"""What a training step changes and what it leaves, on a model of two leaves."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax.training import optimizer
from sana_jax.training.objectives import Terms
from sana_jax.training.optimizer import CAME, AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step

LINE = nn.Dense(3)
B = 8


@dataclasses.dataclass(frozen=True)
class Regression:
    """(line(x + noise) - y)^2; the noise is keyed by row."""

    def __call__(self, model, frozen, params, batch, keys):
        noise = 0.1 * jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        error = model.apply({"params": params}, batch["x"] + noise) - batch["y"]
        return Terms(jnp.sum(error**2, axis=1), batch["weight"] * batch["tokens"], {"sigma": batch["sigma"], "x": batch["x"][:, 0]})


class Root(Regression):
    """A finite loss whose gradient is not: d sqrt(p) / dp at 0."""

    def __call__(self, model, frozen, params, batch, keys):
        terms = super().__call__(model, frozen, params, batch, keys)
        return terms._replace(loss=terms.loss + jnp.sqrt(0 * params["bias"].sum()))


@functools.cache
def program(objective=Regression(), seed=1, **changes):
    """(state, step) of a run."""
    plain = dict(
        rule=AdamW(), lr=1e-2, lr_rule="none", base_batch=256, warmup=0, decay="constant", clip=0.1,
        accumulate=1, ema=0.9, freeze=(), no_decay=(),
    )  # fmt: skip
    optim = types.SimpleNamespace(**plain | changes)
    params = LINE.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    tx = optimizer.make(optim, 100, B, params)
    return create(params, tx, optim.ema), jax.jit(make_step(LINE, objective, tx, optim, {}, seed))


def batch(start=0, **changes):
    rng = np.random.default_rng(start)
    x = rng.normal(size=(B, 4)).astype(np.float32)
    return {
        "weight": np.ones(B, np.float32),
        "tokens": np.arange(1, B + 1, dtype=np.float32),
        "sigma": rng.uniform(size=B).astype(np.float32),
        "position": np.arange(start, start + B, dtype=np.uint32),
        "x": x,
        "y": 2 * x[:, 1:] - 1,
    } | changes


def same(a, b):
    leaves = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in leaves)


LEARNED = ("params", "ema", "opt_state")


def run(state, step, starts):
    for start in starts:
        state, metrics = step(state, {}, batch(start))
    return state, metrics


@pytest.mark.parametrize("rule", [AdamW(), CAME()])
def test_it_learns_and_repeats(rule):
    start, step = program(rule=rule)
    _, first = step(start, {}, batch(0))
    state, last = run(start, step, [0, 8] * 20)
    assert last["loss"] < 0.9 * first["loss"]
    again, last_again = run(start, step, [0, 8] * 20)
    assert same(state, again) and same(last, last_again)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (40, 0, 0)


def test_metrics():
    state, step = program(warmup=4)
    state, metrics = run(state, step, [0, 0])
    metrics = {name: np.asarray(value) for name, value in metrics.items()}
    assert {value.dtype for value in metrics.values()} == {np.dtype("float32")}
    assert metrics["lr"] == np.float32(0.25e-2) and metrics["finite"] == 1
    rows = batch()
    weight = rows["tokens"] / rows["tokens"].sum()
    assert metrics["weight"] == rows["tokens"].sum()
    np.testing.assert_allclose(metrics["x"], (weight * rows["x"][:, 0]).sum(), rtol=1e-5)
    np.testing.assert_array_equal(metrics["time_count"], np.histogram(rows["sigma"], np.linspace(0, 1, 11))[0])
    assert "sigma" not in metrics and (metrics["time_loss"][metrics["time_count"] == 0] == 0).all()
    # The loss by hand: which rows are where, and the mean by tokens.
    start, _ = program(warmup=4)
    keys = jax.vmap(lambda p: jax.random.fold_in(jax.random.key(1), p))(rows["position"])
    terms = Regression()(LINE, None, start.params, rows, keys)
    np.testing.assert_allclose(metrics["loss"], (weight * np.asarray(terms.loss)).sum(), rtol=1e-6)
    number = int(10 * rows["sigma"][0])
    there = (10 * rows["sigma"]).astype(int) == number
    np.testing.assert_allclose(metrics["time_loss"][number], np.asarray(terms.loss)[there].mean(), rtol=1e-6)


NAN = {"x": np.where(np.arange(B)[:, None] == 3, np.nan, batch(8)["x"]).astype(np.float32)}


@pytest.mark.parametrize("rule", [AdamW(), CAME()])
def test_a_batch_that_is_not_finite_changes_nothing(rule):
    start, step = program(rule=rule, decay="cosine")
    state, _ = run(start, step, [0, 8, 16])
    after, metrics = step(state, {}, batch(24, **NAN))
    assert not np.isfinite(metrics["loss"]) and metrics["finite"] == 0
    assert all(same(getattr(after, field), getattr(state, field)) for field in LEARNED)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (4, 1, 1)
    after, metrics = step(after, {}, batch(24, **NAN))
    assert (int(after.skipped), int(after.skipped_in_row)) == (2, 2)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (2, 2)

    # From here on as if they had never been; the learning rate too counts updates.
    expected, said = step(state, {}, batch(32))
    found, says = step(after, {}, batch(32))
    assert all(same(getattr(found, field), getattr(expected, field)) for field in LEARNED)
    assert not same(found.params, state.params)
    assert same((says["lr"], says["loss"]), (said["lr"], said["loss"]))
    assert (int(found.step), int(found.skipped), int(found.skipped_in_row)) == (6, 2, 0)


@pytest.mark.parametrize(
    "options, finite_gradient",
    [
        (dict(objective=Root()), False),
        (dict(rule=AdamW(weight_decay=1e38), lr=1e10, clip=None), True),  # the update alone overflows
    ],
)
def test_what_is_not_finite_though_the_loss_is(options, finite_gradient):
    state, step = program(**options)
    after, metrics = step(state, {}, batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) == finite_gradient
    assert all(same(getattr(after, field), getattr(state, field)) for field in LEARNED)
    assert int(after.skipped_in_row) == 1


def test_a_row_of_weight_0_may_hold_anything():
    """Its own loss is not asked for; a gradient would still carry a NaN of its inputs."""
    state, step = program(clip=None)
    holes = np.float32([1, 0, 1, 1, 0, 1, 1, 1])
    found, says = step(state, {}, batch(weight=holes))
    other, say = step(state, {}, batch(weight=holes, y=np.where(holes[:, None] > 0, batch()["y"], 1e6).astype(np.float32)))
    assert same((found, says), (other, say))
    assert says["weight"] == (holes * batch()["tokens"]).sum() and says["time_count"].sum() == 6


def test_a_batch_of_placeholders_teaches_nothing():
    start, step = program()
    state, _ = run(start, step, [0])
    after, metrics = step(state, {}, batch(8, weight=np.zeros(B, np.float32)))
    assert all(same(getattr(after, field), getattr(state, field)) for field in LEARNED)
    assert metrics["loss"] == 0 and metrics["finite"] == 1
    assert (int(after.skipped), int(after.skipped_in_row)) == (1, 0)
    # It neither ends a row of steps that were not finite nor prolongs it.
    after, _ = step(after, {}, batch(8, **NAN))
    after, _ = step(after, {}, batch(8, weight=np.zeros(B, np.float32)))
    assert (int(after.skipped), int(after.skipped_in_row)) == (3, 1)


def first_moment(state):
    return flatten_dict(state.opt_state[1].mu, sep="/")


def test_accumulation_equals_one_batch():
    """Also where the parts have unequal weights: there is one normaliser."""
    rows = batch(weight=np.float32([1, 0, 1, 1, 0, 1, 0, 1]))
    state, step = program(clip=None)
    _, in_parts = program(clip=None, accumulate=4)
    expected, said = step(state, {}, rows)
    found, says = in_parts(state, {}, rows)
    for path, moment in first_moment(expected).items():
        np.testing.assert_allclose(first_moment(found)[path], moment, rtol=1e-6, atol=1e-6 * np.abs(moment).max())
    np.testing.assert_allclose([says["loss"], says["x"], says["grad_norm"]], [said["loss"], said["x"], said["grad_norm"]], rtol=1e-6)
    np.testing.assert_array_equal(says["time_count"], said["time_count"])


def test_moving_average():
    start, step = program()
    assert same(start.ema, start.params)
    first, _ = run(start, step, [0])
    second, _ = run(first, step, [8])
    for path, average in flatten_dict(second.ema, sep="/").items():
        p0, p1, p2 = (np.float64(flatten_dict(s.params, sep="/")[path]) for s in (start, first, second))
        np.testing.assert_allclose(average, 0.81 * p0 + 0.09 * p1 + 0.1 * p2, atol=1e-7)


def test_frozen_parameters_stay():
    start, step = program(freeze=("bias",))
    after, _ = run(start, step, [0, 8])
    assert same((after.params["bias"], after.ema["bias"]), (start.params["bias"], start.params["bias"]))
    assert not same(after.params["kernel"], start.params["kernel"])


def test_seed():
    state, step = program()
    _, other = program(seed=2)
    assert step(state, {}, batch())[1]["loss"] != other(state, {}, batch())[1]["loss"]
