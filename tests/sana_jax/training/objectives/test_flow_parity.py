"""The flow loss and all of its gradients against torch autograd through diffusers' transformer.

Both sides get the same weights, noise and numbers of noise levels.  The loss agrees to 1e-5, each
leaf's gradient to 5e-5 of its norm; float32 leaves about 2e-6.
"""

import copy
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import flow
from sana_jax.checkpoints import sana as names
from sana_jax.models.sana import Sana
from sana_jax.training import optimizer
from sana_jax.training.objectives import Flow, Frozen
from sana_jax.training.optimizer import AdamW
from sana_jax.training.state import create
from sana_jax.training.step import make_step
from tests import gradients, peers
from tests.toy_pipeline import CAPTION, VARIANTS, make_transformer

pytestmark = pytest.mark.parity

LOSS_BOUND = 1e-5
ROWS, HEIGHT, WIDTH, TOKENS = 5, 6, 4, 7
FLOW = Flow(caption_dropout=0.4)
KEYS = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(ROWS))


STRUCTURES = {"1.0": {}, "1.5 at 4K": VARIANTS["1.5"] | VARIANTS["4K"]}  # with RMSNorm and with positions


@functools.cache
def peer(variant):
    return make_transformer(**STRUCTURES[variant]).requires_grad_(True)


def table(module):
    return names.diffusers_rules(module.heads, module.cross_heads, module.qk_norm, module.guidance_embed)


def convert(torch_module):
    module = Sana(**names.config_fields(dict(torch_module.config)))
    return module, gradients.to_tree(module, table(module), peers.to_numpy_state(torch_module))


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(TOKENS) < np.array([7, 2, 5, 1, 3])[:, None]
    return {
        "latent": (2 * rng.normal(size=(ROWS, HEIGHT, WIDTH, 32))).astype(np.float16),
        "states": rng.normal(size=(ROWS, TOKENS, CAPTION)).astype(np.float16),
        "mask": mask,
        "weight": np.float32([1, 1, 1, 0, 1]),
    }


NULL = np.random.default_rng(1).normal(size=(TOKENS + 2, CAPTION)).astype(np.float16)


@functools.cache
def program(objective, module):
    """(params, rows, rest) -> (loss, gradients), as a step takes them: the weighted mean of the rows.

    `rest` are parameters that are not asked for their gradients.
    """

    def loss(params, rows, rest):
        terms = objective(module, Frozen({}, {"null": NULL}), params | rest, rows, KEYS)
        return jnp.sum(terms.loss * terms.weight) / jnp.sum(terms.weight)

    return jax.jit(jax.value_and_grad(loss))


def of_the_head(objective=FLOW):
    """(loss, gradients of the head alone) of the first variant, traced at each call."""
    module, params = convert(peer("1.0"))
    rest = {name: tree for name, tree in params.items() if name != "head"}
    return program.__wrapped__(objective, module)({"head": params["head"]}, batch(), rest)


def is_seen(loss, grads):
    """Whether both are far beyond the bounds."""
    expected, theirs_grads = theirs("1.0")
    apart = gradients.worst(grads, {name: theirs_grads[name] for name in grads})
    return abs(loss - expected) > 10 * LOSS_BOUND * expected and apart > 10 * gradients.BOUND


def torch_loss(torch_module):
    """docs/numerics.md 5, items 2 to 6, written down once more in torch."""
    import torch

    rows = batch()
    number, noise, dropped = (np.asarray(a) for a in FLOW.draw(KEYS, (HEIGHT, WIDTH, 32)))
    assert 0 < dropped.sum() < ROWS and len(set(number.tolist())) == ROWS
    base = (1 - np.linspace(1, 0.001, 1000))[number]
    sigma = 3 * base / (1 + 2 * base)
    x0 = torch.tensor(rows["latent"]).float().permute(0, 3, 1, 2) * 0.41407
    eps = torch.tensor(noise).permute(0, 3, 1, 2)
    level = torch.tensor(sigma, dtype=torch.float32)[:, None, None, None]
    states = np.where(dropped[:, None, None], NULL[:TOKENS], rows["states"])
    out = torch_module(
        (1 - level) * x0 + level * eps,
        encoder_hidden_states=torch.tensor(states).float(),
        encoder_attention_mask=torch.tensor(rows["mask"].astype(np.int64)),
        timestep=torch.tensor((1000 * sigma).astype(np.int64)),
    ).sample
    weight = torch.tensor(rows["weight"])
    return (((out - (eps - x0)) ** 2).mean(dim=(1, 2, 3)) * weight).sum() / weight.sum()


@functools.cache
def theirs(variant):
    """(loss, gradients)."""
    torch_module = peer(variant)
    loss, module = torch_loss(torch_module), convert(torch_module)[0]
    return loss.item(), gradients.torch_gradients(torch_module, loss, module, table(module))


@pytest.mark.parametrize("variant", ["1.0", "1.5 at 4K"])
def test_loss_and_gradients(variant):
    module, params = convert(peer(variant))
    loss, grads = program(FLOW, module)(params, batch(), {})
    expected, theirs_grads = theirs(variant)
    assert abs(loss - expected) <= LOSS_BOUND * expected
    assert gradients.worst(grads, theirs_grads) <= gradients.BOUND


def test_mistakes_in_a_batch_are_seen():
    module, params = convert(peer("1.0"))
    dropped = np.asarray(FLOW.draw(KEYS, (HEIGHT, WIDTH, 32))[2])[:, None]
    mistakes = {
        "no mask": {"mask": np.ones((ROWS, TOKENS), bool)},
        "the mask of the empty caption": {"mask": np.where(dropped, np.arange(TOKENS) < 1, batch()["mask"])},
        "scaled twice": {"latent": batch()["latent"] * np.float16(0.41407)},
        "all rows": {"weight": np.ones(ROWS, np.float32)},
    }
    for name, change in mistakes.items():
        assert is_seen(*program(FLOW, module)(params, batch() | change, {})), name


def test_a_right_head():
    """The control of the controls below: without a mistake, nothing is seen."""
    loss, grads = of_the_head()
    expected, theirs_grads = theirs("1.0")
    assert abs(loss - expected) <= LOSS_BOUND * expected
    assert gradients.worst(grads, {"head": theirs_grads["head"]}) <= gradients.BOUND


def test_no_shift():
    assert is_seen(*of_the_head(dataclasses.replace(FLOW, shift=1.0)))


def test_a_flipped_target(monkeypatch):
    monkeypatch.setattr(flow, "target", lambda x0, noise: x0 - noise)
    assert is_seen(*of_the_head())


def test_times_that_are_not_truncated(monkeypatch):
    exact = flow.shift_sigma(1 - np.linspace(1, 0.001, 1000), 3.0)
    monkeypatch.setattr(flow, "levels", lambda shift: (np.float32(exact), np.float32(1000 * exact)))
    assert is_seen(*of_the_head())


def test_five_steps_of_training():
    """Loss, clipping and AdamW together, as a run has them: the same five losses, and weights in the end."""
    import torch

    torch_module = copy.deepcopy(peer("1.0"))
    module, params = convert(torch_module)
    # eps is above the rounding of gradients (about 1e-10): below, Adam makes full steps of that rounding,
    # another on every processor.  test_optimizer_parity.py has SANA's 1e-10.
    torch_optimizer = torch.optim.AdamW(torch_module.parameters(), lr=1e-3, eps=1e-7, weight_decay=0.03)
    rule = types.SimpleNamespace(
        rule=AdamW(eps=1e-7), lr=1e-3, lr_rule="none", base_batch=256, warmup=0, decay="constant", clip=0.1,
        accumulate=1, ema=None, freeze=(), no_decay=(),
    )  # fmt: skip
    tx = optimizer.make(rule, 5, ROWS, params)
    state, step = create(params, tx), jax.jit(make_step(module, FLOW, tx, rule, {}, seed=3))
    rows = batch() | {"position": np.arange(ROWS, dtype=np.uint32)}
    for _ in range(5):
        torch_optimizer.zero_grad()
        loss = torch_loss(torch_module)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(torch_module.parameters(), 0.1)
        torch_optimizer.step()
        state, metrics = step(state, {"null": NULL}, rows)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=LOSS_BOUND)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=gradients.BOUND)
    moved, expected = (jax.tree.map(np.subtract, tree, params) for tree in (state.params, convert(torch_module)[1]))
    for tree in (moved, expected):
        # The bias of keys moves all logits of a query alike: its gradient is 0 but for rounding, of
        # which Adam makes steps of full size.
        bias = tree["key_value"]["kv"]["bias"]
        tree["key_value"]["kv"]["bias"] = bias.reshape(len(bias), module.cross_heads, 2, -1)[:, :, 1]
    assert gradients.worst(moved, expected) <= 4e-4  # found 4e-5
