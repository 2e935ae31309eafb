"""A training step as a whole: what it changes, what it leaves, and what it does not depend on."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax.models.sana import Sana
from sana_jax.training import optimizer
from sana_jax.training.objectives import Flow, Terms
from sana_jax.training.optimizer import CAME, AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step

TOY = Sana(width=32, depth=2, heads=2, cross_heads=2, ffn_ratio=1.5, latent_channels=4, caption_width=8)
B, M = 8, 3
NULL = {"null": np.random.default_rng(9).normal(size=(M, 8)).astype(np.float16)}


def settings(**changes):
    plain = dict(
        rule=AdamW(), lr=1e-2, lr_rule="none", base_batch=256, warmup=2, decay="constant", clip=0.1,
        accumulate=1, ema=0.9, freeze=(), no_decay=(),
    )  # fmt: skip
    return types.SimpleNamespace(**plain | changes)


@functools.cache
def params():
    return TOY.init(jax.random.key(0), *TOY.example_inputs())["params"]


@functools.cache
def program(objective=Flow(caption_dropout=0.3), **changes):
    """(state, step) of a run of the toy."""
    optim = settings(**changes)
    tx = optimizer.make(optim, 100, B, params())
    return create(params(), tx, optim.ema), jax.jit(make_step(TOY, objective, tx, optim, {}, seed=1))


def batch(start=0, rows=B, weight=None):
    rng = [np.random.default_rng(start + i) for i in range(rows)]
    return {
        "weight": np.ones(rows, np.float32) if weight is None else np.float32(weight),
        "position": np.arange(start, start + rows, dtype=np.uint32),
        "latent": np.stack([r.normal(size=(4, 3, 4)) for r in rng]).astype(np.float16),
        "states": np.stack([r.normal(size=(M, 8)) for r in rng]).astype(np.float16),
        "mask": np.arange(M) < np.array([r.integers(1, M + 1) for r in rng])[:, None],
    }


def take(rows, index):
    return {name: a[index] for name, a in rows.items()}


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True))


def distance(a, b, start):
    """The largest |a - b| / |b - start| of a leaf."""
    a, b, start = (flatten_dict(jax.tree.map(np.float64, tree), sep="/") for tree in (a, b, start))
    return max(np.linalg.norm(a[p] - b[p]) / np.linalg.norm(b[p] - start[p]) for p in b)


@pytest.mark.parametrize("rule", [AdamW(), CAME()])
def test_it_learns_and_repeats(rule):
    start, step = program(rule=rule)

    def run():
        state, losses = start, []
        for i in range(12):
            state, metrics = step(state, NULL, batch(8 * (i % 2)))
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = run()
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    again, losses_again = run()
    assert same(state, again) and losses == losses_again
    assert int(state.step) == 12 and int(state.skipped) == 0


def test_metrics():
    state, step = program()
    for i in range(2):
        state, metrics = step(state, NULL, batch())
    metrics = {name: np.asarray(value) for name, value in metrics.items()}
    assert {value.dtype for value in metrics.values()} == {np.dtype("float32")}
    assert metrics["lr"] == np.float32(0.5e-2) and metrics["weight"] == B and metrics["finite"] == 1
    assert metrics["time_count"].sum() == B and metrics["time_count"].shape == (10,)
    np.testing.assert_allclose((metrics["time_loss"] * metrics["time_count"]).sum() / B, metrics["loss"], rtol=1e-6)
    assert "sigma" not in metrics


def poisoned():
    rows = batch(8)
    rows["latent"][3, 0, 0, 0] = np.nan
    return rows


@pytest.mark.parametrize("rule", [AdamW(), CAME()])
def test_a_batch_that_is_not_finite_changes_nothing(rule):
    state, step = program(rule=rule)
    for i in range(3):
        state, _ = step(state, NULL, batch(8 * i))
    after, metrics = step(state, NULL, poisoned())
    assert not np.isfinite(metrics["loss"]) and metrics["finite"] == 0
    for field in ("params", "ema", "opt_state"):
        assert same(getattr(after, field), getattr(state, field))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (4, 1, 1)
    after, _ = step(after, NULL, poisoned())
    assert (int(after.skipped), int(after.skipped_in_row)) == (2, 2)

    # From here on, as if they had never been: the rate too counts updates.
    expected, said = step(state, NULL, batch(24))
    found, says = step(after, NULL, batch(24))
    for field in ("params", "ema", "opt_state"):
        assert same(getattr(found, field), getattr(expected, field))
    assert said["lr"] == says["lr"] and said["loss"] == says["loss"]
    assert (int(found.step), int(found.skipped), int(found.skipped_in_row)) == (6, 2, 0)


class Overflowing(Flow):
    """A finite loss whose gradient is not: d sqrt(p) / dp at 0."""

    def __call__(self, model, frozen, params, batch, keys):
        terms = super().__call__(model, frozen, params, batch, keys)
        return terms._replace(loss=terms.loss + jnp.sqrt(0 * params["patch_embed"]["bias"].sum()))


def test_a_gradient_that_is_not_finite():
    state, step = program(Overflowing())
    after, metrics = step(state, NULL, batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert same(after.params, state.params) and int(after.skipped) == 1


def test_an_update_that_is_not_finite():
    state, step = program(rule=AdamW(weight_decay=1e38), lr=1e10, clip=None, warmup=0)
    after, metrics = step(state, NULL, batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert same(after.params, state.params) and int(after.skipped_in_row) == 1


def test_rows_of_weight_0_do_not_exist():
    """Whatever is in them, NaN included, and wherever they stand."""
    state, step = program(clip=None, ema=None, warmup=0)
    rows, holes = batch(), batch(weight=[1, 0, 1, 1, 0, 1, 1, 1])
    for name in ("latent", "states"):
        holes[name][[1, 4]] = 0
    holes["mask"][[1, 4]] = False
    keep = np.array([0, 2, 3, 5, 6, 7])
    expected, said = step(state, NULL, take(rows, keep))
    found, says = step(state, NULL, holes)
    np.testing.assert_allclose(says["loss"], said["loss"], rtol=1e-6)
    np.testing.assert_allclose(says["grad_norm"], said["grad_norm"], rtol=1e-6)
    assert says["weight"] == 6 and says["time_count"].sum() == 6
    assert distance(found.opt_state[1].mu, expected.opt_state[1].mu, jax.tree.map(np.zeros_like, found.opt_state[1].mu)) <= 1e-6
    # Control: the same rows, counted.
    _, wrong = step(state, NULL, holes | {"weight": np.ones(B, np.float32)})
    assert abs(wrong["loss"] - said["loss"]) > 1e-3


def test_a_batch_of_placeholders_teaches_nothing():
    state, step = program()
    state, _ = step(state, NULL, batch())
    after, metrics = step(state, NULL, batch(8, weight=np.zeros(B)))
    assert same((after.params, after.ema, after.opt_state), (state.params, state.ema, state.opt_state))
    assert metrics["loss"] == 0 and metrics["finite"] == 1
    assert (int(after.skipped), int(after.skipped_in_row)) == (1, 0)


def moments(state):
    return state.opt_state[1].mu


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_equals_one_batch(count):
    """Also where the parts have unequal weights: there is one normaliser."""
    rows = batch(weight=[1, 0, 1, 1, 0, 1, 0, 1])
    state, step = program(clip=None, warmup=0)
    _, in_parts = program(clip=None, warmup=0, accumulate=count)
    expected, said = step(state, NULL, rows)
    found, says = in_parts(state, NULL, rows)
    np.testing.assert_allclose(says["loss"], said["loss"], rtol=1e-6)
    np.testing.assert_array_equal(says["time_count"], said["time_count"])
    assert distance(moments(found), moments(expected), jax.tree.map(np.zeros_like, moments(found))) <= 1e-6


def test_order_of_rows_does_not_matter():
    """Noise and times go with a row's number, not with its place."""
    state, step = program(clip=None, warmup=0)
    rows = batch()
    _, said = step(state, NULL, rows)
    _, says = step(state, NULL, take(rows, np.arange(B)[::-1]))
    np.testing.assert_allclose(says["loss"], said["loss"], rtol=1e-6)
    _, other = step(state, NULL, rows | {"position": rows["position"] + np.uint32(B)})
    assert abs(other["loss"] - said["loss"]) > 1e-3


def test_moving_average():
    state, step = program()
    first, _ = step(state, NULL, batch())  # rate 0
    second, _ = step(first, NULL, batch(8))
    third, _ = step(second, NULL, batch(16))
    assert same(first.ema, state.params)
    for path, average in flatten_dict(third.ema, sep="/").items():
        p1, p2, p3 = (np.float64(flatten_dict(s.params, sep="/")[path]) for s in (first, second, third))
        np.testing.assert_allclose(average, 0.81 * p1 + 0.09 * p2 + 0.1 * p3, atol=1e-6)


def test_frozen_parameters_stay():
    state, step = program(freeze=("blocks/.*", "key_value/.*"), warmup=0)
    after, _ = step(state, NULL, batch())
    for path, leaf in flatten_dict(after.params, sep="/").items():
        old = flatten_dict(state.params, sep="/")[path]
        assert same(leaf, old) == path.startswith(("blocks/", "key_value/")), path


class TwoNumbers(Flow):
    """Extras are means by weight."""

    def __call__(self, model, frozen, params, batch, keys):
        weight = batch["weight"] * jnp.arange(B, dtype=jnp.float32)
        loss = params["head"]["out"]["bias"].sum() * jnp.ones(B) + jnp.arange(B, dtype=jnp.float32)
        return Terms(loss, weight, {"twice": 2 * jnp.arange(B, dtype=jnp.float32)})


def test_weights_of_an_objective():
    state, step = program(TwoNumbers())
    _, metrics = step(state, NULL, batch())
    mean = sum(i * i for i in range(B)) / sum(range(B))
    np.testing.assert_allclose([metrics["loss"], metrics["twice"], metrics["weight"]], [mean, 2 * mean, 28], rtol=1e-6)
    assert "time_loss" not in metrics
