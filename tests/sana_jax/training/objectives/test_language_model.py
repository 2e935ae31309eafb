"""Next-token loss and all of its gradients against torch autograd through transformers' Gemma2ForCausalLM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.checkpoints import gemma2 as names
from sana_jax.models.gemma2 import Gemma2
from sana_jax.training.objectives import Frozen, LanguageModel, language_model
from tests import gradients, peers
from tests.toy_pipeline import GEMMA2

TOY = Gemma2(vocab_size=GEMMA2["vocab_size"], width=64, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=96, query_scale=16)
LENGTHS = (9, 4, 1, 6)  # the third has no token to predict


@functools.cache
def batch():
    mask = np.arange(9) < np.array(LENGTHS)[:, None]
    ids = np.random.default_rng(0).integers(5, TOY.vocab_size, mask.shape) * mask
    return {"ids": ids.astype(np.int32), "ids_mask": mask, "weight": np.float32([1, 1, 1, 1])}


@functools.partial(jax.jit, static_argnums=0)
def ours(module, params, rows, rest={}):
    """((loss, terms), gradients of `params`); `rest` are parameters that are not asked for theirs."""

    def loss(params):
        terms = LanguageModel()(module, Frozen({}, {}), params | rest, rows, None)
        return jnp.sum(terms.loss * terms.weight) / jnp.sum(terms.weight), terms

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def peer():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return peers.randomise(Gemma2ForCausalLM(Gemma2Config(**GEMMA2)), seed=4).requires_grad_(True)


def named(state):
    return {names.rename(name): array for name, array in state.items() if name not in names.UNUSED}


class Renamed:
    """The peer with the names of the table."""

    zero_grad = staticmethod(lambda: peer().zero_grad())
    named_parameters = staticmethod(lambda: named(dict(peer().named_parameters())).items())
    state_dict = staticmethod(lambda: named(peer().state_dict()))


@pytest.mark.parity
def test_loss_and_gradients(monkeypatch):
    import torch

    rows, table = batch(), names.transformers_rules()
    params = gradients.to_tree(TOY, table, named(peers.to_numpy_state(peer())))
    ids, mask = torch.tensor(rows["ids"]).long(), torch.tensor(rows["ids_mask"])
    loss = peer()(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
    expected = gradients.torch_gradients(Renamed, loss, TOY, table)

    (found, terms), grads = ours(TOY, params, rows)
    assert abs(found - loss.item()) <= 1e-5 * loss.item()
    assert gradients.worst(grads, expected) <= gradients.BOUND
    np.testing.assert_array_equal(terms.weight, [n - 1 for n in LENGTHS])
    assert terms.loss[2] == 0

    monkeypatch.setattr(language_model, "LOGIT_CAP", None)  # control: without the soft cap
    rest = {name: tree for name, tree in params.items() if name != "norm"}
    program = jax.jit(lambda part: ours.__wrapped__(TOY, part, rows, rest))
    (uncapped, _), wrong = program({"norm": params["norm"]})
    assert abs(uncapped - loss.item()) > 1e-4 * loss.item()
    assert gradients.worst(wrong, {"norm": expected["norm"]}) > 10 * gradients.BOUND


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_of_tokens(chunk, monkeypatch):
    """One softmax over the vocabulary, by hand in float64, whatever the chunks."""
    monkeypatch.setattr(language_model, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    states, embedding = rng.normal(size=(2, 8, 5)).astype("f"), 8 * rng.normal(size=(11, 5)).astype("f")
    ids = rng.integers(0, 11, (2, 8)).astype(np.int32)
    ids[0] = (states[0] @ embedding.T).argmax(-1)
    nll, hit = language_model.token_scores(jnp.asarray(states), jnp.asarray(embedding), jnp.asarray(ids))
    logits = 30 * np.tanh(np.float64(states) @ np.float64(embedding).T / 30)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(nll, -np.log(np.take_along_axis(p, ids[..., None], -1)[..., 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hit, p.argmax(-1) == ids)
    assert 0 < np.asarray(hit).sum() < hit.size


def test_recall():
    """What is asked of a state besides the next token: one of the tokens before it, by hand with numpy.roll."""
    rows, params, recall = batch(), TOY.init(jax.random.key(3), *TOY.example_inputs())["params"], 3
    keys = jax.vmap(jax.random.key)(jnp.arange(4))

    def terms(objective):
        return jax.jit(lambda params: objective(TOY, Frozen({}, {}), params, rows, keys))(params)

    found, plain = terms(LanguageModel(recall)), terms(LanguageModel())
    back = np.stack([language_model.places_back(key, 9, recall) for key in keys])
    assert set(back.ravel()) == {0, 1, 2} and (back <= np.arange(9)).all()
    assert set(plain.extra) == {"accuracy"} and set(found.extra) == {"accuracy", "next", "recall"}
    np.testing.assert_array_equal(found.extra["next"], plain.loss)
    states = np.float64(TOY.apply({"params": params}, rows["ids"], rows["ids_mask"]))
    table = np.float64(language_model.codes(*params["embedding"].shape))
    for i, length in enumerate(LENGTHS):
        asked, hits = [], []
        for t in range(1, length):
            logits = 30 * np.tanh(table @ np.roll(states[i, t], -(back[i, t] + 1) * (64 // 4)) / 30)
            token = rows["ids"][i, t - back[i, t]]
            asked.append(np.log(np.exp(logits).sum()) - logits[token])
            hits.append(logits.argmax() == token)
        np.testing.assert_allclose(found.loss[i] - plain.loss[i], np.mean(asked or [0]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.extra["recall"][i], np.mean(hits or [0]), atol=1e-6)
    np.testing.assert_array_equal(found.weight, plain.weight)


@pytest.mark.parametrize("asked", [True, False])
def test_states_learn_to_recall(asked):
    """Random tokens cannot be foreseen; those before are in the state after some steps, unless nobody asks."""
    optimizer = optax.adam(1e-2)
    module = TOY.clone(vocab_size=12)
    ids = np.random.default_rng(1).integers(0, 12, (40, 32, 9)).astype(np.int32)
    rest = {"ids_mask": np.ones((32, 9), bool), "weight": np.ones(32, "f")}

    @jax.jit
    def step(params, state, ids, key):
        def loss(params):
            terms = LanguageModel(3)(module, Frozen({}, {}), params, rest | {"ids": ids}, jax.random.split(key, 32))
            return (terms.loss if asked else terms.extra["next"]).mean(), terms.extra["recall"].mean()

        (_, recall), grads = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, recall

    params = module.init(jax.random.key(0), *module.example_inputs())["params"]
    state, recalls = optimizer.init(params), []
    for number, some in enumerate(ids):
        params, state, recall = step(params, state, some, jax.random.key(number))
        recalls.append(float(recall))
    assert np.mean(recalls[:2]) < 0.3 and (np.mean(recalls[-5:]) > (0.6 if asked else 0.3)) == asked, recalls


def test_needs_nothing():
    assert LanguageModel().frozen_needed({"ids", "ids_mask"}) == set() and LanguageModel().load() == ({}, [])
