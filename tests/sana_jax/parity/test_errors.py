"""What `python -m sana_jax.parity` refuses: one line, status 2, before any weight is read."""

import dataclasses
import importlib.metadata
import json
import shutil

import pytest

from sana_jax.errors import CheckpointError
from sana_jax.parity import case as cases
from sana_jax.parity import peers
from sana_jax.parity.__main__ import main


def refused(capsys, *arguments):
    """The one line on standard error."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(peers, "load", load)
    monkeypatch.setattr(cases.Case, "load", load)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "gemma,blocks"], "only='blocks': must be one of 'gemma', 'block', 'dit', 'dc-ae', 'solver', 'pipeline'; did you mean 'block'?"),
        (["--only", ""], "only='': must be one of"),
        (["--dtype", "fp16"], "dtype='fp16': must be one of 'fp32', 'bf16'"),
        (["--size", "1024"], "size='1024': must be WIDTHxHEIGHT in pixels, e.g. 1024x1024"),
        (["--prompt", " "], "prompt=' ': must not be empty"),
    ],
)
def test_bad_arguments(capsys, tmp_path, arguments, words):
    assert words in refused(capsys, tmp_path, *arguments)


def test_unknown_flags_are_refused_by_argparse(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["model", "--onyl", "gemma"])
    assert stop.value.code == 2 and capsys.readouterr().err == "sana_jax.parity: error: unrecognized arguments: --onyl gemma\n"


@pytest.mark.parametrize("version, words", [(None, "torch is not installed (need 2.10 or newer)"), ("2.9.1+cpu", "torch is 2.9.1+cpu (need 2.10 or newer)")])
def test_packages_that_are_absent_or_too_old(capsys, tmp_path, monkeypatch, version, words):
    def installed(name):
        if name == "torch" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "torch" else "99.0"

    monkeypatch.setattr(importlib.metadata, "version", installed)
    message = refused(capsys, tmp_path)
    assert words in message and 'pip install -e ".[parity]"' in message and "diffusers is" not in message


@pytest.mark.parity
def test_folders_that_hold_no_pipeline(capsys, toy_folder, tmp_path, no_weights):
    assert "has no model_index.json" in refused(capsys, toy_folder / "vae")
    assert "absent" in refused(capsys, tmp_path / "absent")
    file = tmp_path / "Sana_1600M_1024px.pth"
    file.write_bytes(b"")
    assert f"must be a pipeline folder; python -m sana_jax.convert {file} DIR --dc-ae X --text Y makes one" in refused(capsys, file)
    model = shutil.copytree(toy_folder, tmp_path / "model")
    shutil.rmtree(model / "scheduler")
    assert "has no scheduler/" in refused(capsys, model)
    assert "has no scheduler/" in refused(capsys, toy_folder, "--reference", model)


@pytest.mark.parity
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "100x64"], "size: width=100: must be a multiple of 32; nearest valid 96"),
        (["--size", "64x8192"], "size: height=8192: must be an int in [64, 4096]; nearest valid 4096"),
        (["--steps", "0"], "steps=0: must be an int in [1, 1000]; nearest valid 1"),
    ],
)
def test_pictures_that_cannot_be_painted(capsys, toy_folder, no_weights, arguments, words):
    assert words in refused(capsys, toy_folder, *arguments)


@pytest.mark.parity
@pytest.mark.parametrize(
    "part, key, value, words",
    [
        ("transformer", "sample_size", 32, "transformer: sample_size is 16 in the model and 32 in the reference: not one structure"),
        ("vae", "scaling_factor", 0.5, "vae: scaling_factor is 0.41407 in the model and 0.5 in the reference"),
        ("text_encoder", "attn_logit_softcapping", 30.0, "text_encoder: attention_softcap is 50.0 in the model and 30.0"),
    ],
)
def test_structures_must_be_one(capsys, toy_folder, tmp_path, no_weights, part, key, value, words):
    reference = shutil.copytree(toy_folder, tmp_path / "reference")
    path = reference / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert words in refused(capsys, toy_folder, "--reference", reference)


@pytest.mark.parity
def test_a_peer_without_all_its_weights_is_not_filled_with_random_ones(toy_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(toy_folder, tmp_path / "model")
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    case = cases.make(
        toy_folder, toy_folder, prompt="a", size=(64, 64), steps=1, rungs=cases.RUNGS, bfloat16=False
    )
    with pytest.raises(CheckpointError, match="SanaTransformer2DModel misses, or does not know, proj_out.bias"):
        peers.load(dataclasses.replace(case, reference=model), "transformer", peers.prepare())
