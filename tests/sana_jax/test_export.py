"""From the folder of a run to the folders that others read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax import components, export, extras, loading
from sana_jax.data.vocabulary import Words, learn
from sana_jax.errors import InputError
from sana_jax.experiment import Frozen
from tests.runs import DC_AE, GEMMA2, SANA, make_run, random_params

CAPTIONS = ["a large red circle on blue", "a small green ring on white", "a cat"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: an autoencoder, a text encoder, and the flow that uses both; only the last has an average."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "autoencoder", DC_AE)
    words = Words()
    learn(words.of(CAPTIONS), 320).save_pretrained(make_run(folder / "text", GEMMA2) / "tokenizer")
    words.write(folder / "text" / "tokenizer")
    frozen = Frozen(dc_ae=str(folder / "autoencoder"), text=str(folder / "text"), chi="Describe: ")
    make_run(folder / "flow", SANA, steps=(2, 3), ema=0.9, frozen=frozen)
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(runs):
    export.export(runs / "flow", runs / "exported")
    return runs / "exported"


def assert_equal(params, expected):
    params, expected = (flatten_dict(tree, sep="/") for tree in (params, expected))
    assert params.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


def doubled(params):
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def test_the_unconditional_half_has_the_mask_that_it_was_trained_with(runs, tmp_path, pipeline_folder):
    run = shutil.copytree(runs / "flow", tmp_path / "flow")
    config = json.loads((run / "config.json").read_text())
    config["objective"]["dropped_mask"] = "empty"
    (run / "config.json").write_text(json.dumps(config))
    export.export(run, tmp_path / "exported")
    for folder, stack in ((pipeline_folder, "nvlabs"), (tmp_path / "exported", "diffusers")):
        pipeline = loading.load_pipeline(folder)
        _, prompt_mask, _, mask = pipeline._conditions(["a large cat"], [""], "", 300, 1)
        assert pipeline.stack.name == stack and prompt_mask.sum() > 2
        assert mask.sum() == (prompt_mask.sum() if stack == "nvlabs" else 1)  # BOS alone


def test_a_pipeline_that_samples_as_it_was_trained(pipeline_folder):
    pipeline = loading.load_pipeline(pipeline_folder)
    assert (pipeline.stack.name, pipeline.flow_shift, pipeline.instruction().text) == ("nvlabs", 2.0, "Describe: ")
    assert pipeline.sana[0] == SANA and pipeline.dc_ae[0] == DC_AE and pipeline.text.gemma2 == GEMMA2
    assert pipeline.defaults == {"steps": 20, "guidance_scale": 4.5, "max_sequence_length": 300}, "the run's"
    assert pipeline.text.vocabulary.words == frozenset("a cat blue circle green large on red ring small white".split())
    assert_equal(pipeline.sana[1], doubled(random_params(SANA, 3)))
    assert_equal(pipeline.dc_ae[1], random_params(DC_AE, 3))
    assert_equal(pipeline.text.params, random_params(GEMMA2, 3))
    ids = pipeline.text.tokenizer(CAPTIONS[0])["input_ids"]
    assert ids[0] == 2 and pipeline.text.tokenizer.decode(ids, skip_special_tokens=True) == CAPTIONS[0]


@pytest.mark.parametrize("options, expected", [((), 2), (("--raw",), 1)])
def test_the_average_or_the_parameters_of_a_step(runs, tmp_path, options, expected):
    assert export.main([str(runs / "flow"), str(tmp_path / "out"), "--step", "2", *options]) == 0
    _, params = components.load_sana(tmp_path / "out" / "transformer")
    assert_equal(params, jax.tree.map(lambda leaf: np.float32(expected) * leaf, random_params(SANA, 2)))


def test_a_component_alone(runs, tmp_path):
    export.export(runs / "autoencoder", tmp_path / "vae")
    module, params = components.load_dc_ae(tmp_path / "vae")
    assert module == DC_AE
    assert_equal(params, random_params(DC_AE, 3))
    export.export(runs / "text", tmp_path / "text")
    module, params = components.load_gemma2(tmp_path / "text")
    assert module == GEMMA2
    assert_equal(params, random_params(GEMMA2, 3))
    assert (tmp_path / "text" / "tokenizer.json").is_file()


def test_components_stand_in_for_runs(runs, tmp_path, pipeline_folder):
    """--dc-ae and --text name folders that are published or exported as well."""
    export.export(runs / "text", tmp_path / "text")
    given = ["--dc-ae", str(pipeline_folder), "--text", str(tmp_path / "text"), "--dtype", "bf16", "--default", "guidance-scale=3"]
    assert export.main([str(runs / "flow"), str(tmp_path / "out"), *given]) == 0
    pipeline = loading.load_pipeline(tmp_path / "out")
    assert (pipeline.defaults["guidance_scale"], len(pipeline.text.vocabulary.words)) == (3, 11)
    for (module, params), model in ((pipeline.dc_ae, DC_AE), ((pipeline.text.gemma2, pipeline.text.params), GEMMA2)):
        assert module.param_dtype == jnp.bfloat16
        assert_equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(model, 3)))


def test_the_words_of_a_pipeline_come_along(runs, tmp_path, pipeline_folder):
    """Of one whose text encoder a run took over: the words are in its sana_jax.json, not beside its tokenizer."""
    export.export(runs / "flow", tmp_path / "again", text=pipeline_folder)
    assert extras.read(tmp_path / "again")["vocabulary"] == extras.read(pipeline_folder)["vocabulary"]
    (shutil.copytree(pipeline_folder, tmp_path / "plain") / extras.FILE).unlink()
    export.export(runs / "flow", tmp_path / "wordless", text=tmp_path / "plain")
    assert "vocabulary" not in extras.read(tmp_path / "wordless")


def test_what_cannot_be_exported(runs, tmp_path, capsys):
    def message(*arguments):
        assert export.main([*map(str, arguments)]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "is no folder of a run" in message(tmp_path / "none", out)
    assert "step=7" in message(runs / "flow", out, "--step", 7)
    assert "is a run of a Gemma2, needed is a DCAE" in message(runs / "flow", out, "--dc-ae", runs / "text")
    assert "no such folder or file" in message(runs / "flow", out, "--text", tmp_path / "none")
    assert "exists and is not an empty folder" in message(runs / "flow", runs)
    make_run(tmp_path / "bare", SANA)
    assert "frozen.dc_ae: the run names none; --dc-ae says" in message(tmp_path / "bare", out)
    (tmp_path / "bare" / "checkpoints" / "3" / "meta" / "metadata").write_text("{}")
    assert "meta is not what was saved" in message(tmp_path / "bare", out)
    assert "default=['steps=3']: of a pipeline alone" in message(runs / "text", out, "--default", "steps=3")
    assert "steps=0: must be an int" in message(runs / "flow", out, "--default", "steps=0")
    assert "field='stepz': must be one of 'stack'" in message(runs / "flow", out, "--default", "stepz=3")
    with pytest.raises(SystemExit):
        export.main([str(runs / "flow"), str(out), "--nothing"])


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana_jax.saving.write_safetensors", full)
    with pytest.raises(InputError, match="nothing was written"):
        export.export(runs / "autoencoder", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parity
def test_diffusers_reads_and_samples_it(pipeline_folder):
    import torch
    from diffusers import SanaPipeline

    peer = SanaPipeline.from_pretrained(pipeline_folder)
    assert peer.scheduler.config.flow_shift == 2.0 and peer.transformer.config.sample_size == 2
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaPipeline"
    picture = peer(
        CAPTIONS[0], height=64, width=64, num_inference_steps=2, complex_human_instruction=None, max_sequence_length=16,
        use_resolution_binning=False, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip
    assert picture.shape == (64, 64, 3) and np.isfinite(picture).all() and picture.std() > 0
