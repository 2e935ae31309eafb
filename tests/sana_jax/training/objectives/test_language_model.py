"""Next-token loss and all of its gradients against torch autograd through transformers' Gemma2ForCausalLM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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


def test_needs_nothing():
    assert LanguageModel().frozen_needed({"ids", "ids_mask"}) == set() and LanguageModel().load() == ({}, [])
