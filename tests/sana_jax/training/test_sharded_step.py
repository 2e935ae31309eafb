"""A training step on eight devices is the step on one, however the mesh cuts it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax import experiment
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import abstract_parameters
from sana_jax.sharding import make_mesh
from sana_jax.training import layout, optimizer
from sana_jax.training.objectives import Flow, LanguageModel
from sana_jax.training.optimizer import CAME, AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step

MODEL = Sana(width=64, depth=2, heads=4, cross_heads=4, caption_width=32, qk_norm=True, remat="products")
TEXT = Gemma2(vocab_size=64, width=64, depth=1, heads=4, kv_heads=2, head_dim=16, hidden=96, query_scale=16)
ROWS, STEPS, BOUND = 16, 3, 1e-6
# eps: with Adam's own, what is rounded in an entry whose gradient is nearly 0 becomes a whole step.
RULES = {"adamw": AdamW(eps=1e-4), "came": CAME(eps1=1e-8, eps2=1e-8)}
RATES = {"adamw": 1e-2, "came": 1e-4}


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


def captions(step):
    rng = np.random.default_rng(step)
    mask = np.arange(9) < rng.integers(2, 10, size=(ROWS, 1))
    rows = {name: batch(step)[name] for name in ("weight", "position", "bad")}
    return rows | {"ids": (rng.integers(5, 64, size=mask.shape) * mask).astype(np.int32), "ids_mask": mask}


TRAINED = {"flow": (MODEL, Flow(), batch), "text": (TEXT, LanguageModel(recall=3), captions)}


@functools.cache
def program(rule, accumulate, sizes, trained):
    """(mesh, first state as host arrays, shardings, step)."""
    module, objective, _ = TRAINED[trained]
    mesh = make_mesh(**dict(sizes), devices=None if sizes else jax.devices()[:1])
    optim = experiment.Optim(RULES[rule], lr=RATES[rule], clip=0.1, accumulate=accumulate, ema=0.9)
    tx = optimizer.make(optim, STEPS, ROWS, abstract_parameters(module))
    layout.check_batch(ROWS, accumulate, mesh)
    params = module.init(jax.random.key(0), *module.example_inputs())["params"]
    state = create(params, tx, optim.ema)
    placed = layout.state_shardings(state, module, mesh)
    step = make_step(module, objective, tx, optim, {}, seed=1)
    step = jax.jit(layout.on_mesh(step, mesh), out_shardings=(placed, None))
    return mesh, jax.tree.map(np.asarray, state), placed, step


@functools.cache
def run(rule, accumulate=1, sizes=(), without=None, trained="flow"):
    """(losses, {path: parameter}) after STEPS steps; `without`: a row that does not count."""
    mesh, state, placed, step = program(rule, accumulate, sizes, trained)
    losses = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, placed)
        for number in range(STEPS):
            rows = TRAINED[trained][2](number)
            if without is not None:
                rows["weight"][without] = 0
            state, metrics = step(state, {"null": jnp.ones((6, 32))}, layout.put_batch(rows, mesh))
            losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda a: a.sharding, state) == placed
    return losses, {path: np.asarray(leaf) for path, leaf in flatten_dict(state.params, sep="/").items()}


def apart(a, b):
    """The largest relative difference of a loss, and of a parameter in its norm."""
    losses = max(abs(x - y) / abs(y) for x, y in zip(a[0], b[0], strict=True))
    return max(losses, *(np.linalg.norm(a[1][p] - b[1][p]) / np.linalg.norm(b[1][p]) for p in b[1]))


CASES = {
    "data": ("adamw", 1, (("data", 8),)),
    "fsdp": ("adamw", 1, (("fsdp", 8),)),
    "mix, accumulated": ("adamw", 2, (("data", 2), ("fsdp", 2), ("tensor", 2))),
    "fsdp and tensor, factored moments": ("came", 1, (("fsdp", 2), ("tensor", 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_sharded_is_unsharded(case):
    rule, accumulate, sizes = CASES[case]
    assert apart(run(rule, accumulate, sizes), run(rule)) < BOUND


def test_a_text_encoder_is_sharded_as_a_flow_is():
    """Also what is drawn for each state to recall.  Rounding is 2e-6 here, with two losses through a softmax."""
    whole = run("adamw", trained="text")
    assert apart(run("adamw", 2, CASES["mix, accumulated"][2], trained="text"), whole) < 4 * BOUND
    assert apart(run("adamw", without=11, trained="text"), whole) > 100 * BOUND


def test_one_row_of_sixteen_would_be_missed():
    assert apart(run("adamw", without=11), run("adamw")) > 100 * BOUND
