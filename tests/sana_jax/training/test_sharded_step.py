"""A training step on eight devices is the step on one, however the mesh cuts it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax import experiment
from sana_jax.models.sana import Sana
from sana_jax.sharding import make_mesh
from sana_jax.training import initialise, layout, optimizer
from sana_jax.training.objectives import Flow
from sana_jax.training.optimizer import CAME, AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step

MODEL = Sana(width=64, depth=2, heads=4, cross_heads=4, caption_width=32, qk_norm=True, remat="products")
ROWS, STEPS, BOUND = 16, 3, 1e-6
# eps: with Adam's own, what is rounded in an entry whose gradient is nearly 0 becomes a whole step.
RULES = {"adamw": AdamW(eps=1e-4), "came": CAME(eps1=1e-8, eps2=1e-8)}
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(fsdp=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, tensor=4),
]


def batch(step):
    rng = np.random.default_rng(step)
    return {
        "latent": rng.normal(size=(ROWS, 4, 4, 32)).astype(np.float16),
        "states": rng.normal(size=(ROWS, 6, 32)).astype(np.float16),
        "mask": np.arange(6) < rng.integers(1, 7, size=(ROWS, 1)),
        "weight": np.ones(ROWS, np.float32),
        "position": np.arange(step * ROWS, (step + 1) * ROWS, dtype=np.uint32),
        "bad": np.zeros(ROWS, np.int32),
    }


@functools.cache
def run(rule, accumulate=1, sizes=(), without=None):
    """(losses, {path: parameter}) after STEPS steps; `without`: a row that does not count."""
    mesh = make_mesh(**(dict(sizes) or {"data": 1}), devices=None if sizes else jax.devices()[:1])
    optim = experiment.Optim(RULES[rule], lr=1e-2, clip=0.1, accumulate=accumulate, ema=0.9)
    tx = optimizer.make(optim, STEPS, ROWS, initialise.abstract(MODEL))
    layout.check_batch(ROWS, accumulate, mesh)
    params = MODEL.init(jax.random.key(0), *MODEL.example_inputs())["params"]
    with jax.set_mesh(mesh):
        make = functools.partial(create, tx=tx, ema=optim.ema)
        placed = layout.state_shardings(jax.eval_shape(make, params), MODEL, mesh)
        state = jax.jit(make, out_shardings=placed)(jax.device_put(params, placed.params))
        step = make_step(MODEL, Flow(), tx, optim, {}, seed=1)
        step = jax.jit(layout.on_mesh(step, mesh), donate_argnums=0, out_shardings=(placed, None))
        constants, losses = {"null": jnp.ones((6, 32))}, []
        for number in range(STEPS):
            rows = batch(number)
            if without is not None:
                rows["weight"][without] = 0
            state, metrics = step(state, constants, layout.put_batch(rows, mesh))
            losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda a: a.sharding, state) == placed
    return losses, {path: np.asarray(leaf) for path, leaf in flatten_dict(state.params, sep="/").items()}


def apart(a, b):
    """The largest relative difference of a loss, and of a parameter in its norm."""
    losses = max(abs(x - y) / abs(y) for x, y in zip(a[0], b[0], strict=True))
    return max(losses, *(np.linalg.norm(a[1][p] - b[1][p]) / np.linalg.norm(b[1][p]) for p in b[1]))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()))
def test_sharded_is_unsharded(sizes):
    assert apart(run("adamw", sizes=tuple(sizes.items())), run("adamw")) < BOUND


def test_sharded_is_unsharded_with_factored_moments():
    assert apart(run("came", sizes=(("fsdp", 4), ("tensor", 2))), run("came")) < BOUND


def test_sharded_is_unsharded_with_accumulation():
    assert apart(run("adamw", 2, (("data", 2), ("fsdp", 4))), run("adamw", 2)) < BOUND


def test_one_row_of_sixteen_would_be_missed():
    assert apart(run("adamw", without=11), run("adamw")) > 100 * BOUND
