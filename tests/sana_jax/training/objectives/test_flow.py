"""Where the flow loss takes its latents and its text states from, and what it draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import programs
from sana_jax.errors import InputError
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.training.objectives import Flow, Frozen
from sana_jax.training.objectives.flow import text_states

DC_AE = DCAE(
    widths=(4, 8, 8), latent_channels=4, encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1),
    encoder_attention=(None,) * 3, decoder_attention=(None,) * 3,
)  # fmt: skip
GEMMA2 = Gemma2(vocab_size=64, width=8, depth=2, heads=2, kv_heads=1, head_dim=4, hidden=16, query_scale=4)
SANA = Sana(width=16, depth=1, heads=2, cross_heads=2, latent_channels=4, caption_width=8)
B, LENGTH, HEAD = 3, 5, 6  # HEAD tokens of the instruction, the last of which is a prompt's first
TOTAL = HEAD + LENGTH - 2


@functools.cache
def params_of(module):
    return jax.jit(module.init)(jax.random.key(1), *module.example_inputs())["params"]


def keys(positions):
    return jax.vmap(lambda p: jax.random.fold_in(jax.random.key(0), p))(jnp.asarray(positions, jnp.uint32))


@functools.cache
def tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (B, TOTAL)).astype(np.int32)
    ids[:, :HEAD] = ids[0, :HEAD]
    valid = np.arange(TOTAL) < np.array([TOTAL, HEAD + 1, HEAD + 2])[:, None]
    return ids * valid, valid


@functools.cache
def frozen():
    null = np.random.default_rng(1).normal(size=(LENGTH, 8)).astype(np.float32)
    return Frozen({"dc_ae": DC_AE, "text": GEMMA2}, {"dc_ae": params_of(DC_AE), "text": params_of(GEMMA2), "null": null})


@functools.cache
def live():
    ids, valid = tokens()
    image = np.random.default_rng(2).integers(0, 256, (B, 16, 12, 3)).astype(np.uint8)
    return {"image": image, "ids": ids, "ids_mask": valid, "weight": np.ones(B, np.float32)}


@functools.cache
def cached():
    """What the same rows are in a cache: the autoencoder's own latents, the text encoder's selected states."""
    rows = live()
    selection = np.r_[0, TOTAL - LENGTH + 1 : TOTAL]
    encode = jax.jit(functools.partial(programs.apply, DC_AE, method="encode"))
    latent = encode(params_of(DC_AE), rows["image"] / np.float32(127.5) - 1)
    states = jax.jit(functools.partial(programs.apply, GEMMA2))(params_of(GEMMA2), rows["ids"], rows["ids_mask"])[:, selection]
    return {"latent": latent, "states": states, "mask": rows["ids_mask"][:, selection], "weight": rows["weight"]}


@functools.partial(jax.jit, static_argnums=0)
def program(objective, params, rows, frozen_params):
    return objective(SANA, Frozen(frozen().modules, frozen_params), params, rows, keys(range(B))).loss


def losses(objective, rows, frozen_params):
    return np.asarray(program(objective, params_of(SANA), rows, frozen_params))


def test_live_equals_cached():
    objective = Flow(caption_dropout=0.5)
    assert 0 < np.asarray(objective.draw(keys(range(B)), (4, 3, 4))[2]).sum() < B
    found, expected = losses(objective, live(), frozen().params), losses(objective, cached(), frozen().params)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    other = losses(objective, live() | {"image": live()["image"][::-1]}, frozen().params)
    assert np.abs(other - expected).max() > 1e-2


def test_what_a_batch_still_needs():
    assert Flow().frozen_needed(live()) == {"dc_ae", "text"}
    assert Flow().frozen_needed(cached()) == set()
    assert Flow().frozen_needed({"latent", "ids", "ids_mask"}) == {"text"}


def test_an_encoded_instruction_saves_work_and_changes_nothing():
    expected, mask = text_states(frozen(), live())
    start = HEAD - 1
    prefix = programs.prefix_program(params_of(GEMMA2), live()["ids"][:1, :start], gemma2=GEMMA2)
    with_prefix = frozen().params | {"prefix": prefix}
    found, same_mask = text_states(Frozen(frozen().modules, with_prefix), live())
    np.testing.assert_array_equal(mask, same_mask)
    assert mask.shape == (B, LENGTH) and found.shape == (B, LENGTH, 8)
    assert np.abs(found - expected)[np.asarray(mask)].max() <= 1e-5 * np.abs(expected).max()
    # A placeholder's ids are zeros: they are not where the instruction is taken from.
    holes = live() | {"ids": np.where(np.arange(B)[:, None] == 0, 0, live()["ids"])}
    rest, _ = text_states(Frozen(frozen().modules, with_prefix), holes)
    np.testing.assert_array_equal(rest[1:], found[1:])


def test_a_prefix_of_another_instruction():
    prefix = programs.prefix_program(params_of(GEMMA2), live()["ids"][:1, :3], gemma2=GEMMA2)
    with pytest.raises(InputError, match="prefix of 3 tokens"):
        text_states(Frozen(frozen().modules, frozen().params | {"prefix": prefix}), live())


def test_a_dropped_caption_is_the_empty_one_with_its_own_mask():
    """All dropped: the caption's words do not matter any more, how many they were does."""
    objective = Flow(caption_dropout=1.0)
    rows = cached()
    expected = losses(objective, rows, frozen().params)
    np.testing.assert_array_equal(losses(objective, rows | {"states": 0 * rows["states"]}, frozen().params), expected)
    longer = losses(objective, rows | {"mask": np.ones_like(rows["mask"])}, frozen().params)
    assert np.abs(longer - expected)[1:].max() > 1e-4
    null = frozen().params["null"]
    assert np.abs(losses(objective, rows, frozen().params | {"null": 2 * null[:, ::-1]}) - expected).max() > 1e-4


def test_a_dropped_caption_with_the_mask_of_the_empty_one():
    """All dropped: as if every caption were one token long; none dropped: no difference at all."""
    rows, params = cached(), frozen().params
    empty = losses(Flow(caption_dropout=1.0, dropped_mask="empty"), rows, params)
    short = np.broadcast_to(np.arange(rows["mask"].shape[1]) == 0, rows["mask"].shape)
    np.testing.assert_array_equal(losses(Flow(caption_dropout=1.0), rows | {"mask": short}, params), empty)
    assert np.abs(losses(Flow(caption_dropout=1.0), rows, params) - empty).max() > 1e-4
    kept = [losses(Flow(caption_dropout=1e-9, dropped_mask=mask), rows, params) for mask in ("caption", "empty")]
    np.testing.assert_array_equal(*kept)


def test_the_empty_caption_may_be_longer_than_a_batch():
    null = Flow().null(frozen(), cached()["states"][:, :3].astype(jnp.float16))
    np.testing.assert_array_equal(null, frozen().params["null"][:3].astype(np.float16))


def test_share_of_dropped_captions():
    dropped = np.asarray(Flow(caption_dropout=0.1).draw(keys(range(20000)), (1,))[2])
    assert abs(dropped.mean() - 0.1) <= 4 * np.sqrt(0.09 / 20000)


def test_draws_are_unlike_each_other():
    """Rows with numbers at the ends of uint32; and within a row, noise from what chooses time and dropout."""
    number, noise, _ = Flow().draw(keys([0, 1, 2**31, 2**32 - 2, 2**32 - 1]), (3, 3, 4))
    assert len(set(np.asarray(number).tolist())) > 1
    assert len(np.unique(np.asarray(noise))) == noise.size
    assert abs(np.std(noise) - 1) < 0.2


@pytest.mark.parametrize(
    "objective, change, message",
    [
        (Flow(), {"null": None}, "caption_dropout=0.1: needs the states of the empty caption"),
        (Flow(), {"null": np.zeros((2, 8), np.float32)}, r"null caption \(2, 8\)"),
        (Flow(scaling_factor=0.3), {}, "objective.scaling_factor=0.3: the autoencoder's is 0.41407"),
    ],
)
def test_errors(objective, change, message):
    params = {k: v for k, v in (frozen().params | change).items() if v is not None}
    rows = cached() if "null" in change else live()
    with pytest.raises(InputError, match=message):
        losses(objective, rows, params)


def test_a_model_that_embeds_guidance():
    with pytest.raises(InputError, match="guidance_embed=True"):
        Flow()(SANA.clone(guidance_embed=True), frozen(), {}, cached(), keys(range(B)))
