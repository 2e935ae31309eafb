"""The learning rate, and which parameters are trained, decayed, left alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.errors import InputError
from sana_jax.training import optimizer
from sana_jax.training.optimizer import CAME, AdamW, Muon

SHAPES = {
    "encoder/conv_in/kernel": (2, 3),
    "encoder/norm/scale": (3,),
    "decoder/block_0/norm/mean": (3,),
    "decoder/block_0/norm/var": (3,),
    "decoder/block_0/norm/scale": (3,),
}
PARAMS = unflatten_dict({path: jnp.ones(shape) for path, shape in SHAPES.items()}, sep="/")


def settings(**changes):
    plain = dict(
        rule=AdamW(), lr=1e-4, lr_rule="none", base_batch=256, warmup=0, decay="constant", clip=None, freeze=(), no_decay=()
    )
    return types.SimpleNamespace(**plain | changes)


@pytest.mark.parametrize("rule, batch, factor", [("none", 1024, 1), ("sqrt", 1024, 2), ("linear", 1024, 4), ("sqrt", 64, 0.5)])
def test_rate_follows_the_batch(rule, batch, factor):
    rate = optimizer.learning_rate(settings(lr_rule=rule), batch, 100)
    np.testing.assert_allclose([rate(0), rate(99)], 1e-4 * factor, rtol=1e-6)


def test_warm_up_then_constant():
    rate = optimizer.learning_rate(settings(warmup=4), 256, 100)
    found = [float(rate(jnp.int32(i))) for i in (0, 1, 4, 5, 99)]
    np.testing.assert_allclose(found, 1e-4 * np.array([0, 0.25, 1, 1, 1]), rtol=1e-6)


def test_warm_up_then_cosine():
    rate = optimizer.learning_rate(settings(warmup=20, decay="cosine"), 256, 100)
    found = [float(rate(i)) for i in (10, 20, 60, 100, 200)]
    np.testing.assert_allclose(found, 1e-4 * np.array([0.5, 1, 0.5, 0, 0]), rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("field, value", [("lr_rule", "square"), ("decay", "cosin")])
def test_unknown_words(field, value):
    with pytest.raises(InputError, match=f"optim.{field}='{value}'"):
        optimizer.learning_rate(settings(**{field: value}), 256, 100)


def test_statistics_are_never_trained():
    tx = optimizer.make(settings(), 10, 256, PARAMS)
    assert set(SHAPES) - tx.trained == {"decoder/block_0/norm/mean", "decoder/block_0/norm/var"}


@pytest.mark.parametrize("rule", [AdamW(), CAME()])
def test_frozen_parameters_have_no_state(rule):
    tx = optimizer.make(settings(rule=rule, freeze=("encoder/.*",)), 10, 256, PARAMS)
    assert tx.trained == {"decoder/block_0/norm/scale"}
    assert sum(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.ndim) == 2 * 3
    trained, frozen = optimizer.split(PARAMS, tx.trained)
    assert flatten_dict(trained, sep="/").keys() == tx.trained
    assert jax.tree.structure(optimizer.merge(trained, frozen)) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("field", ["freeze", "no_decay"])
def test_patterns_without_a_parameter(field):
    """All of them in one message, with the nearest path; part of a path is no match."""
    with pytest.raises(InputError) as error:
        optimizer.make(settings(**{field: ("encoder", "encoder/.*", "encoder/conv_in/kernal")}), 10, 256, PARAMS)
    said = str(error.value)
    assert said.startswith(f"optim.{field}: 'encoder' matches no parameter") and "'encoder/.*'" not in said
    assert "'encoder/conv_in/kernal' matches no parameter; did you mean 'encoder/conv_in/kernel'?" in said


def test_a_pattern_that_is_none():
    with pytest.raises(InputError, match="optim.freeze: '\\*' is not a regular expression"):
        optimizer.make(settings(freeze=("*",)), 10, 256, PARAMS)


def test_nothing_left():
    with pytest.raises(InputError, match="nothing is left to train"):
        optimizer.make(settings(freeze=(".*",)), 10, 256, PARAMS)


def test_decay_acts_where_it_should():
    """With gradients of 0 an update is the decay alone: - lr weight_decay p."""
    tx = optimizer.make(settings(rule=AdamW(weight_decay=0.5), lr=0.1, no_decay=(".*/scale",)), 10, 256, PARAMS)
    trained = optimizer.split(PARAMS, tx.trained)[0]
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trained), tx.init(PARAMS), trained)
    updates = flatten_dict(updates, sep="/")
    np.testing.assert_allclose(updates["encoder/conv_in/kernel"], -0.05)
    np.testing.assert_array_equal(updates["encoder/norm/scale"], 0)


MATRICES = {"blocks/out/kernel": (2, 6, 24), "blocks/project/kernel": (2, 24, 6), "blocks/depthwise/kernel": (2, 3, 3, 8), "head/kernel": (6, 4)}


def first_update(rule, seed=0):
    """(updates, gradients) by path of one step with random gradients, lr 1."""
    key = jax.random.key(seed)
    grads = {p: jax.random.normal(jax.random.fold_in(key, i), s) for i, (p, s) in enumerate(MATRICES.items())}
    tree = unflatten_dict(grads, sep="/")
    tx = optimizer.make(settings(rule=rule, lr=1.0), 10, 256, tree)
    updates, state = tx.update(tree, tx.init(tree), jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(tree))
    return flatten_dict(updates, sep="/"), grads


def test_muon_turns_every_layers_matrix_into_an_orthogonal_one():
    """The first momentum is the gradient U S V', whose update is about -U V', layer by layer, of Adam's size.

    Five iterations of the published coefficients leave singular values between 0.7 and 1.2.
    """
    updates, grads = first_update(Muon(rms=0.2, matrices=("blocks/(out|project)/kernel",)))
    for path in ("blocks/out/kernel", "blocks/project/kernel"):
        for update, grad in zip(updates[path], grads[path]):
            left, values, right = np.linalg.svd(grad, full_matrices=False)
            found = -np.asarray(update) / (0.2 * 24**0.5)
            np.testing.assert_allclose(found, left @ right, atol=0.15)
            assert np.all(np.abs(np.linalg.svd(found, compute_uv=False) - 0.95) < 0.3)
            assert values.min() < 0.6 * values.max()  # the gradient itself would not pass


def test_muon_leaves_the_rest_to_adam():
    with_muon, grads = first_update(Muon(matrices=("blocks/(out|project)/kernel",)))
    with_adam, _ = first_update(AdamW(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.03))
    for path in ("blocks/depthwise/kernel", "head/kernel"):
        np.testing.assert_array_equal(with_muon[path], with_adam[path])
    assert np.abs(with_muon["blocks/out/kernel"] - with_adam["blocks/out/kernel"]).max() > 0.1


def test_muon_without_its_matrices():
    with pytest.raises(InputError, match="optim.rule.matrices: 'layers/.*' matches no parameter"):
        first_update(Muon(matrices=("layers/.*",)))
