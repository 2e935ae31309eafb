"""The frozen networks of a run give what the pipeline's own text path and encoder give."""

import dataclasses
import hashlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import saving, sharding, text
from sana_jax.data.synthetic import Synthetic
from sana_jax.errors import InputError
from sana_jax.experiment import Data, Experiment, Frozen, Init, Optim, Preview
from sana_jax.loading import load_pipeline
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.training import frozen
from sana_jax.training.objectives import Flow, LanguageModel
from sana_jax.training.objectives.flow import text_states
from sana_jax.training.optimizer import AdamW
from tests.toy_tokenizer import VOCAB_SIZE, make_tokenizer

GEMMA2 = Gemma2(vocab_size=VOCAB_SIZE, width=16, depth=2, heads=2, kv_heads=1, head_dim=8, hidden=24, query_scale=8)
DC_AE = DCAE(
    widths=(4, 4, 4, 8, 16, 32), encoder_depths=(1,) * 6, decoder_depths=(1,) * 6, encoder_attention=(None,) * 6,
    decoder_attention=(None,) * 6,
)  # fmt: skip
SANA = Sana(width=32, depth=1, heads=1, cross_heads=1, caption_width=16)
CHI = "Given a user prompt, describe colour, light and place. User Prompt: "
CAPTIONS = ["a red cat on a green chair", "an old house", ""]


def init(module, seed):
    return jax.jit(module.init)(jax.random.key(seed), *module.example_inputs())["params"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder with an instruction of its own."""
    path = tmp_path_factory.mktemp("frozen") / "pipeline"
    encoder = TextEncoder(GEMMA2, init(GEMMA2, 0), make_tokenizer(), CHI)
    saving.save_pipeline(Pipeline((SANA, init(SANA, 1)), (DC_AE, init(DC_AE, 2)), encoder, stack="nvlabs"), path)
    return path


def experiment(folder, **changes):
    fields = dict(
        model=SANA, objective=Flow(), data=Data(Synthetic(), batch=8, size=64, buckets=False, tokens=12),
        optim=Optim(AdamW()), steps=1, frozen=Frozen(str(folder), str(folder)), preview=Preview(every=0),
    )  # fmt: skip
    return Experiment(**fields | changes)


def load(config, names=("image", "ids", "ids_mask"), reader=None):
    return frozen.load(config, set(names), reader, sharding.make_mesh(data=8))


@pytest.mark.parametrize("chi", ["auto", "none"])
def test_live_captions_become_what_the_pipeline_makes_of_prompts(folder, chi):
    config = experiment(folder, frozen=Frozen(str(folder), str(folder), chi))
    constants, _ = load(config)
    batch = frozen.tokenizer(config, None)(CAPTIONS)
    states, mask = text_states(constants, batch)

    pipeline = load_pipeline(folder)
    expected, expected_mask = pipeline.encode_prompt(CAPTIONS, chi=chi, max_sequence_length=12)
    null, _ = pipeline.encode_prompt([""], chi="none", max_sequence_length=12)
    np.testing.assert_array_equal(mask, expected_mask)
    states, expected, valid = (np.asarray(a) for a in (states, expected, mask[..., None]))
    np.testing.assert_allclose(states * valid, expected * valid, atol=1e-5)
    np.testing.assert_allclose(constants.params["null"], null[0], atol=1e-5)
    assert ("prefix" in constants.params) == (chi == "auto")

    other, _ = pipeline.encode_prompt(CAPTIONS, chi="none" if chi == "auto" else CHI, max_sequence_length=12)
    assert np.abs((np.asarray(other) - states) * valid).max() > 1e-2  # the instruction is seen


def test_only_what_is_needed_is_loaded(folder):
    assert set(load(experiment(folder), ("latent", "states", "mask"))[0].modules) == set()
    assert set(load(experiment(folder), ("latent", "ids", "ids_mask"))[0].modules) == {"text"}
    assert set(load(experiment(folder))[0].modules) == {"dc_ae", "text"}
    shown = experiment(folder, preview=Preview(every=5, prompts=("a cat",)))
    assert set(load(shown, ("latent", "states", "mask"))[0].modules) == {"dc_ae", "text"}
    cached = types.SimpleNamespace(null=np.ones((12, 16), np.float16))
    constants, _ = load(experiment(folder), ("latent", "states", "mask"), cached)
    np.testing.assert_array_equal(constants.params["null"], cached.null)


def test_float16_weights_run_in_bfloat16(folder, tmp_path):
    params = jax.tree.map(lambda a: a.astype(jnp.float16), init(DC_AE, 2))
    saving.save_component(tmp_path / "vae", "diffusion_pytorch_model", DC_AE, params)
    config = experiment(folder, frozen=Frozen(str(tmp_path / "vae"), str(folder)))
    assert load(config)[0].modules["dc_ae"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["dc_ae", "text"])
def test_what_is_missing_is_named(folder, name):
    given = {"dc_ae": str(folder), "text": str(folder)} | {name: ""}
    with pytest.raises(InputError, match=f"frozen.{name}='': is needed"):
        load(experiment(folder, frozen=Frozen(**given)))


def test_a_language_model_learns_its_tokenizer_once(tmp_path, folder):
    source = Synthetic(records=30, size=16)
    config = experiment(
        folder, model=GEMMA2.clone(vocab_size=300), objective=LanguageModel(), frozen=Frozen(), workdir=str(tmp_path)
    )
    first = frozen.tokenizer(config, source.open())
    ids = first(["a large red circle on blue"])["ids"]
    assert ids.max() < 300 and (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    again = frozen.tokenizer(config, None)  # no caption is read
    np.testing.assert_array_equal(again(["a large red circle on blue"])["ids"], ids)
    assert text.load_tokenizer(tmp_path / "tokenizer").vocab_size <= 300
    with pytest.raises(InputError, match="model.vocab_size=270: .* tokens"):
        frozen.tokenizer(dataclasses.replace(config, model=GEMMA2.clone(vocab_size=270)), None)


def test_a_tokenizer_of_a_start_that_came_to_nothing_is_not_used(tmp_path, folder):
    reader = Synthetic(records=30, size=16).open()
    config = experiment(
        folder, model=GEMMA2.clone(vocab_size=400), objective=LanguageModel(), frozen=Frozen(), workdir=str(tmp_path)
    )
    assert frozen.tokenizer(config, reader).vocab_size > 300
    smaller = dataclasses.replace(config, model=GEMMA2.clone(vocab_size=300))
    assert frozen.tokenizer(smaller, reader).vocab_size <= 300
    with pytest.raises(InputError, match="knows the tokens of its own tokenizer"):
        frozen.tokenizer(dataclasses.replace(config, init=Init(weights="runs/other")), reader)


@pytest.mark.parametrize("changes, words", [
    ({"model": SANA.clone(caption_width=24)}, "model.caption_width=24: frozen.text=.* has width=16"),
    ({"model": SANA.clone(latent_channels=16)}, "model.latent_channels=16: frozen.dc_ae=.* has latent_channels=32"),
])  # fmt: skip
def test_networks_that_do_not_fit(folder, changes, words):
    with pytest.raises(InputError, match=words):
        load(experiment(folder, **changes))


def test_features_of_other_networks(folder):
    reader = types.SimpleNamespace(scaling_factor=0.3, meta={"instruction": hashlib.sha256(b"").hexdigest()})
    with pytest.raises(InputError, match="objective.scaling_factor=0.41407: these latents were made for 0.3"):
        load(experiment(folder), ("latent", "states", "mask"), reader)
    with pytest.raises(InputError, match="cached with another instruction"):
        frozen.with_instruction(experiment(folder), reader)
    without = experiment(folder, frozen=Frozen(str(folder), str(folder), "none"))
    assert frozen.with_instruction(without, reader) == without
    assert frozen.with_instruction(experiment(folder), None).frozen.chi == CHI


def test_no_texts_at_all(folder):
    with pytest.raises(InputError, match="frozen.text=''"):
        load(experiment(folder), ("latent",))
