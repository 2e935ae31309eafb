"""A step of the flow loss: what it does not depend on."""

import functools
import types

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sana_jax.models.sana import Sana
from sana_jax.training import optimizer
from sana_jax.training.objectives import Flow
from sana_jax.training.optimizer import AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step

TOY = Sana(width=32, depth=2, heads=2, cross_heads=2, ffn_ratio=1.5, latent_channels=4, caption_width=8)
B, M = 8, 3
NULL = {"null": np.random.default_rng(9).normal(size=(M, 8)).astype(np.float16)}


@functools.cache
def program(accumulate=1):
    """(state, step); the first moment of Adam after one step is a tenth of the gradient."""
    optim = types.SimpleNamespace(
        rule=AdamW(), lr=1e-2, lr_rule="none", base_batch=256, warmup=0, decay="constant", clip=None,
        accumulate=accumulate, ema=None, freeze=(), no_decay=(),
    )  # fmt: skip
    params = jax.jit(TOY.init)(jax.random.key(0), *TOY.example_inputs())["params"]
    tx = optimizer.make(optim, 100, B, params)
    return create(params, tx), jax.jit(make_step(TOY, Flow(caption_dropout=0.3), tx, optim, {}, seed=1))


def batch(weight=(1,) * B):
    rng = [np.random.default_rng(i) for i in range(B)]
    return {
        "weight": np.float32(weight),
        "position": np.arange(B, dtype=np.uint32),
        "latent": np.stack([r.normal(size=(4, 3, 4)) for r in rng]).astype(np.float16),
        "states": np.stack([r.normal(size=(M, 8)) for r in rng]).astype(np.float16),
        "mask": np.arange(M) < np.array([r.integers(1, M + 1) for r in rng])[:, None],
    }


def take(rows, index):
    return {name: a[index] for name, a in rows.items()}


def distance(a, b):
    """Of two (state, metrics): the largest relative distance of loss, gradient norm and a leaf's gradient."""
    found, expected = (flatten_dict(jax.tree.map(np.float64, state.opt_state[1].mu), sep="/") for state, _ in (a, b))
    leaves = [np.linalg.norm(found[p] - expected[p]) / np.linalg.norm(expected[p]) for p in expected]
    scalars = [abs(float(a[1][name]) / float(b[1][name]) - 1) for name in ("loss", "grad_norm")]
    return max(leaves + scalars)


HOLES = (1, 0, 1, 1, 0, 1, 1, 1)


def test_rows_of_weight_0_do_not_exist():
    """Wherever they stand; the loader fills them with zeros, and no token of theirs is valid."""
    state, step = program()
    holes = batch(HOLES)
    for name in ("latent", "states", "mask"):
        holes[name][[1, 4]] = 0
    keep = np.flatnonzero(HOLES)
    expected, found = step(state, NULL, take(batch(), keep)), step(state, NULL, holes)
    assert distance(found, expected) <= 1e-6
    assert found[1]["weight"] == 6 and found[1]["time_count"].sum() == 6
    counted = step(state, NULL, holes | {"weight": np.ones(B, np.float32)})
    assert distance(counted, expected) > 1e-3


def test_order_of_rows_does_not_matter():
    """Noise and times go with a row's number, not with its place."""
    state, step = program()
    rows = batch()
    expected = step(state, NULL, rows)
    assert distance(step(state, NULL, take(rows, np.arange(B)[::-1])), expected) <= 1e-6
    assert distance(step(state, NULL, rows | {"position": rows["position"] + np.uint32(B)}), expected) > 1e-3


def test_accumulation_equals_one_batch():
    state, step = program()
    rows = batch(HOLES)
    assert distance(program(accumulate=4)[1](state, NULL, rows), step(state, NULL, rows)) <= 1e-6


def test_every_row_may_hide_all_of_its_tokens():
    """Nothing of it is infinite: a hidden token's logit is -10000."""
    state, step = program()
    _, metrics = step(state, NULL, batch() | {"mask": np.zeros((B, M), bool)})
    assert metrics["finite"] == 1
