"""Saved folders: the same bits, the same pictures in diffusers, whole or absent."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from sana_jax import saving
from sana_jax.checkpoints.read import open_checkpoint, read_json
from sana_jax.errors import InputError
from sana_jax.loading import load_pipeline
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.stacks import NVLABS
from tests.toy_pipeline import Rectangle, torch_latents

pytestmark = pytest.mark.parity  # the toy folder is made by the peers


@pytest.fixture(scope="module")
def pipeline(toy_folder):
    return load_pipeline(toy_folder)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "new" / "pipeline"
    pipeline.save(folder)
    return folder


def parts(pipeline):
    return [pipeline.sana, pipeline.dc_ae, (pipeline.text.gemma2, pipeline.text.params)]


def assert_same(a, b):
    for (module_a, params_a), (module_b, params_b) in zip(parts(a), parts(b), strict=True):
        assert module_a == module_b
        assert jax.tree.structure(params_a) == jax.tree.structure(params_b)
        for x, y in zip(jax.tree.leaves(params_a), jax.tree.leaves(params_b), strict=True):
            assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype, bits", [("fp32", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_load_of_save_is_bit_exact(toy_folder, pipeline, saved, tmp_path, dtype, bits):
    if dtype != "fp32":
        pipeline, saved = load_pipeline(toy_folder, dtype=dtype), tmp_path / "saved"
        pipeline.save(saved)
    assert open_checkpoint(saved / "transformer").dtypes == {bits}
    again = load_pipeline(saved)
    assert_same(pipeline, again)
    assert (again.stack, again.flow_shift) == (pipeline.stack, pipeline.flow_shift)


def test_saved_tensors_are_those_of_the_peers(toy_folder, saved):
    """Names, shapes and bits, so that no reader of the original can tell the copy from it."""
    for name, stem in [("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]:
        ours, theirs = (dict(open_checkpoint(folder / name, (stem,)).tensors()) for folder in (saved, toy_folder))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
        ours, theirs = (read_json(folder / name / "config.json") for folder in (saved, toy_folder))
        for key in ours.keys() & theirs.keys() - {"rope_theta"}:
            assert ours[key] == theirs[key], f"{name}: {key}"


def test_diffusers_paints_the_same_from_a_saved_folder(toy_folder, saved):
    import diffusers

    size, images = Rectangle(64, 96), []
    for folder in (toy_folder, saved):
        peer = diffusers.SanaPipeline.from_pretrained(folder)
        peer.set_progress_bar_config(disable=True)
        assert peer.scheduler.config.flow_shift == 3.0
        images.append(
            peer(
                "a red cat", negative_prompt="a dog", complex_human_instruction=None, num_inference_steps=2,
                latents=torch_latents(size.noise(1)), height=size.height, width=size.width,
                use_resolution_binning=False, output_type="np",
            ).images
        )  # fmt: skip
    assert images[0].shape == (1, 64, 96, 3) and images[0].std() > 0.05
    assert np.abs(images[0] - images[1]).max() <= 1e-6


def test_what_the_format_of_diffusers_cannot_say_is_kept(pipeline, tmp_path):
    text = dataclasses.replace(pipeline.text, instruction="Say more.\nUser Prompt: ")
    Pipeline(pipeline.sana, pipeline.dc_ae, text, stack="nvlabs", flow_shift=4.5).save(tmp_path / "a")
    again = load_pipeline(tmp_path / "a")
    assert (again.stack, again.flow_shift) == (NVLABS, 4.5)
    assert again.sana[0].attention_eps == NVLABS.attention_eps and again.sana[0].clamp
    instruction = again.instruction()
    assert (instruction.text, instruction.source) == ("Say more.\nUser Prompt: ", "checkpoint")
    other = load_pipeline(tmp_path / "a", stack="diffusers")
    assert other.stack.name == "diffusers" and not other.sana[0].clamp, "the caller's word counts more"
    lines = json.loads((tmp_path / "a" / "sana_jax.json").read_text())
    lines["complex_human_instruction"] = ["Say more.", "User Prompt: "]
    (tmp_path / "a" / "sana_jax.json").write_text(json.dumps(lines))
    assert load_pipeline(tmp_path / "a").instruction() == instruction


def test_a_folder_of_ones_own_is_refused(pipeline, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    for target in ("mine", "file"):
        with pytest.raises(InputError, match="exists and is not an empty folder; nothing was written"):
            pipeline.save(tmp_path / target)
    with pytest.raises(InputError, match="below: cannot be written"):
        pipeline.save(tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    pipeline.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_the_folder_is_as_open_as_others(saved):
    """A temporary folder is private; what it becomes follows the umask, and so do the files in it."""
    mask = saving.umask()
    for path in [saved, *saved.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_what_a_folder_cannot_hold_is_refused(pipeline, tmp_path):
    odd = dataclasses.replace(NVLABS, clamp=False)
    with pytest.raises(InputError, match="text=None"):
        Pipeline(pipeline.sana, pipeline.dc_ae).save(tmp_path / "a")
    with pytest.raises(InputError, match="stack='nvlabs' with changed fields: .* one of diffusers, nvlabs"):
        Pipeline(pipeline.sana, pipeline.dc_ae, pipeline.text, stack=odd).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write_safetensors", "write_json", "replace"])
def test_a_save_that_fails_leaves_nothing(pipeline, tmp_path, monkeypatch, error, step):
    owner = os if step == "replace" else saving
    works, calls = getattr(owner, step), []

    def fail_at_the_end(*args, **kwargs):
        calls.append(args)
        folder = tmp_path / "a"
        if os.fspath(args[-1]) == os.fspath(folder) if step == "replace" else len(calls) == 3:
            raise error
        return works(*args, **kwargs)

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(owner, step, fail_at_the_end)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        pipeline.save(tmp_path / "a")
    if expected is InputError:
        assert "a: cannot be written" in str(caught.value) and "No space left" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert calls and not any(tmp_path.rglob("*.*"))
    assert {p.name for p in tmp_path.iterdir()} <= {"a"} and not any(tmp_path.joinpath("a").glob("*"))


def test_a_text_encoder_may_come_without_an_instruction(pipeline, saved):
    assert isinstance(pipeline.text, TextEncoder) and pipeline.text.instruction is None
    assert read_json(saved / "sana_jax.json") == {"stack": "diffusers"}
