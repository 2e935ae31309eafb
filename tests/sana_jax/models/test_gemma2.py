"""Gemma 2 against transformers' Gemma2Model, with random weights and every position compared."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2, rotary_table
from tests import peers, toy_tokenizer

BOUND = 5e-5  # float32, largest absolute difference, where the states have an rms of about 1
TOY = Gemma2(640, 72, 3, 4, 2, 16, 128, query_scale=9)


def texts(lengths, m, seed=0, vocab_size=640):
    """ids and right-padded mask [b m]; padding is id 0, as tokenizers have it."""
    mask = np.arange(m) < np.asarray(lengths)[:, None]
    return np.random.default_rng(seed).integers(5, vocab_size, mask.shape) * mask, mask


def random_params(module, seed=0, scale=0.3):
    ids, rng = jax.ShapeDtypeStruct((1, 4), jnp.int32), np.random.default_rng(seed)
    tree = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    draw = lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))  # noqa: E731
    return jax.tree.map(draw, tree)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, ids, mask, prefix=None):
    return module.apply({"params": params}, ids, mask, prefix)


def run(module, params, ids, mask, prefix=None):
    return np.asarray(apply(module, params, jnp.asarray(ids), jnp.asarray(mask), prefix))


def run_peer(peer, ids, mask, **kwargs):
    import torch

    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        return peer(ids, attention_mask=mask, **kwargs)


def states_of(peer, ids, mask):
    return run_peer(peer, ids, mask).last_hidden_state.float().numpy()


# Structure


def test_published_size():
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(GEMMA2_2B.init, jax.random.key(0), ids, ids)["params"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    assert sum(np.prod(leaf.shape) for leaf in flat.values()) == 2_614_341_888
    assert flat["embedding"].shape == (256000, 2304)
    assert flat["layers/query/kernel"].shape == (26, 2304, 2048)
    assert flat["layers/key/kernel"].shape == flat["layers/value/kernel"].shape == (26, 2304, 1024)
    assert flat["layers/out/kernel"].shape == (26, 2048, 2304)
    assert flat["layers/gate/kernel"].shape == flat["layers/up/kernel"].shape == (26, 2304, 9216)
    assert flat["layers/down/kernel"].shape == (26, 9216, 2304)
    assert all(path.endswith(("/kernel", "/scale")) for path in flat if path != "embedding")


def test_ids_beyond_the_vocabulary_give_nan():
    params = random_params(TOY)
    states = run(TOY, params, [[5, 640], [5, 6]], np.ones((2, 2), bool))
    assert np.isnan(states[0, 1]).all() and np.isfinite(states[1]).all()


def test_padding_has_no_influence():
    params = random_params(TOY)
    ids, mask = texts([7, 4], 12)
    changed = np.where(mask, ids, 99)
    a, b = run(TOY, params, ids, mask), run(TOY, params, changed, mask)
    np.testing.assert_array_equal(a[mask], b[mask])
    short = run(TOY, params, ids[:, :7], mask[:, :7])
    np.testing.assert_allclose(short[mask[:, :7]], a[mask], atol=1e-5)


def test_prefix_and_rest_equal_the_whole():
    module = TOY.clone(sliding_window=5)
    params = random_params(module)
    ids, mask = texts([20, 13, 9], 20)
    ids[:, :8] = ids[0, :8]  # one prefix for all
    whole = run(module, params, ids, mask)
    make = jax.jit(functools.partial(module.apply, method="encode_prefix"))
    prefix = make({"params": params}, ids[:1, :8])
    assert prefix.keys.shape == prefix.values.shape == (3, 1, 8, 2, 16)
    rest = run(module, params, ids[:, 8:], mask[:, 8:], prefix=prefix)
    np.testing.assert_allclose(np.asarray(prefix.states)[0], whole[0, :8], atol=2e-5)
    np.testing.assert_allclose(rest[mask[:, 8:]], whole[:, 8:][mask[:, 8:]], atol=2e-5)


def test_a_broken_layer_is_found():
    params = random_params(TOY)
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, 0, 0].set(jnp.inf)
    ids, mask = texts([6], 6)
    look = jax.jit(functools.partial(TOY.apply, mutable=["intermediates"]))
    _, sown = look({"params": params}, ids, mask)
    absmax = np.asarray(sown["intermediates"]["layers"]["absmax"][0])
    assert list(np.isfinite(absmax)) == [True, False, False]


def test_rotary_table_in_float64():
    for theta in (10_000.0, 1e6):
        cos, sin = rotary_table(jnp.arange(900), 256, theta, jnp.float32)
        angle = np.arange(900)[:, None] / theta ** (np.arange(0, 256, 2) / 256)
        # One ulp of a frequency is 6e-8 of an angle of up to 900.
        np.testing.assert_allclose(cos, np.cos(angle), atol=6e-5)
        np.testing.assert_allclose(sin, np.sin(angle), atol=6e-5)


# Parity


@pytest.mark.parity
@pytest.mark.parametrize("window, seed", [(4096, 0), (5, 1)])
def test_states_agree_at_all_positions(window, seed):
    peer, module, params = toy_tokenizer.make_gemma2(seed, sliding_window=window)
    ids, mask = texts([24, 11, 3, 1], 24, seed)
    expected, got = states_of(peer, ids, mask), run(module, params, ids, mask)
    assert peers.rms(expected) >= 1
    error = np.abs(got - expected)
    print(f"window {window}: max error {error.max():.1e}, rms {peers.rms(expected):.2f}")
    assert error.max() <= BOUND
    alone = np.concatenate([run(module, params, i[None], m[None]) for i, m in zip(ids, mask)])
    assert np.abs(alone - got).max() <= 2e-5


@pytest.mark.parity
def test_layers_agree_one_by_one():
    import torch

    peer, module, params = toy_tokenizer.make_gemma2(2, sliding_window=6)
    ids, mask = texts([16, 9], 16)
    hidden = run_peer(peer, ids, mask, output_hidden_states=True).hidden_states
    for depth in (1, 2):  # axis 0 of every leaf is depth, so a shorter model is a slice
        part = params | {"layers": jax.tree.map(lambda a: a[:depth], params["layers"])}
        got = run(module.clone(depth=depth), part, ids, mask)
        with torch.no_grad():
            expected = peer.norm(hidden[depth])
        error = np.abs(got - expected.numpy()).max()
        print(f"after layer {depth}: max error {error:.1e}")
        assert error <= BOUND


@pytest.mark.parity
def test_long_texts_and_published_head_size():
    peer, module, params = toy_tokenizer.make_gemma2(
        4, 1.0, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=300,
    )  # fmt: skip
    ids, mask = texts([800], 800)
    expected, got = states_of(peer, ids, mask), run(module, params, ids, mask)
    error = np.abs(got - expected).max()
    print(f"800 tokens, heads of 256: max error {error:.1e}, rms {peers.rms(expected):.2f}")
    assert peers.rms(expected) >= 1 and error <= BOUND


def without_one(params):
    norms = lambda path, a: a - 1 if path[-1].key == "scale" else a  # noqa: E731
    return jax.tree_util.tree_map_with_path(norms, params)


def regrouped(params):
    """Query heads 0 1 2 3 -> 0 2 1 3: what tiling key heads instead of repeating them computes."""
    order, layers = [0, 2, 1, 3], params["layers"]
    query, out = layers["query"]["kernel"], layers["out"]["kernel"]
    query = query.reshape(3, 72, 4, 16)[:, :, order].reshape(query.shape)
    out = out.reshape(3, 4, 16, 72)[:, order].reshape(out.shape)
    return params | {"layers": layers | {"query": {"kernel": query}, "out": {"kernel": out}}}


CONTROLS = {
    "no soft cap": (dict(attention_softcap=None), lambda p: p),
    "w instead of 1 + w": ({}, without_one),
    "no embedding scale": ({}, lambda p: p | {"embedding": p["embedding"] / 72**0.5}),
    "another rope theta": (dict(rope_theta=9000.0), lambda p: p),
    "tiled key heads": ({}, regrouped),
    "full instead of sliding": (dict(sliding_window=4096), lambda p: p),
    "a window one too wide": (dict(sliding_window=7), lambda p: p),
    "scale from head_dim": (dict(query_scale=16), lambda p: p),
}


@pytest.mark.parity
@pytest.mark.parametrize("control", CONTROLS)
def test_the_bound_notices(control):
    fields, change = CONTROLS[control]
    peer, module, params = toy_tokenizer.make_gemma2(0, sliding_window=6)
    ids, mask = texts([24, 11], 24)
    expected = states_of(peer, ids, mask)
    error = np.abs(run(module.clone(**fields), change(params), ids, mask) - expected)[mask].max()
    print(f"{control}: max error {error:.1e}")
    assert error > 10 * BOUND


@pytest.mark.parity
def test_bfloat16_is_as_accurate_as_torch():
    import torch

    ours, theirs = [], []
    for seed in range(5):
        peer, module, params = toy_tokenizer.make_gemma2(seed, 1.0)
        ids, mask = texts([24, 11, 5], 24, seed)
        peer = peer.to(torch.bfloat16)  # rounds the weights; the reference has them rounded, too
        low = states_of(peer, ids, mask)
        expected = states_of(peer.float(), ids, mask)
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        low_module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        got = apply(low_module, params, jnp.asarray(ids), jnp.asarray(mask))
        assert got.dtype == jnp.bfloat16
        ours.append(peers.rms(np.asarray(got, np.float32) - expected))
        theirs.append(peers.rms(low - expected))
    ratios = np.asarray(ours) / theirs
    print(f"rms error: ours {np.mean(ours):.4f}, torch {np.mean(theirs):.4f}, {ratios.round(2)}")
    assert np.sqrt(np.mean(np.square(ours))) <= 1.2 * np.sqrt(np.mean(np.square(theirs)))
    assert ratios.max() <= 1.2
