"""What sample.py refuses by itself: one line that names field, value and rule, before any model is read."""

import pytest

import sana_jax
from tests.test_sample import refused


def never(*_, **__):
    raise AssertionError("a model was loaded for a request that is wrong by itself")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "prompt: give it once, as the only word without a flag or with --prompt"),
        ("cat --prompt dog --model .", "prompt: give it once"),
        ("cat", "model: none given and none is bundled yet; pass --model with a folder in diffusers layout"),
        ("cat --model", "argument --model: expected one argument"),
        ("cat dog --model .", "unrecognized arguments: dog"),
        ("cat --model . --step 3", "unrecognized arguments: --step 3; did you mean --steps?"),
        ("cat --model . --sed=3", "unrecognized arguments: --sed=3; did you mean --seed?"),
        ("cat --model . --steps few", "argument --steps: invalid int value: 'few'"),
        ("cat --model . --steps 0", "steps=0: must be an int in [1, 1000]; nearest valid 1"),
        ("cat --model . --guidance-scale -1", "guidance_scale=-1.0: must be a number in [0, 100]; nearest valid 0"),
        ("cat --model . --guidance-scale nan", "guidance_scale=nan: must be a number in [0, 100]"),
        ("cat --model . --seed -1", "seed=-1: must be an int in [0, 4294967295]; nearest valid 0"),
        ("cat --model . --num-images 0", "num_images=0: must be an int in [1, 4096]; nearest valid 1"),
        ("cat --model . --height 0", "height=0: must be in [1, 8192]; nearest valid 32"),
        ("cat --model . --height -64", "height=-64: must be in [1, 8192]; nearest valid 32"),
        ("cat --model . --width 100000", "width=100000: must be in [1, 8192]; nearest valid 8192"),
        ("cat --model . --width 64.5", "argument --width: invalid int value: '64.5'"),
        ("cat --model . --max-sequence-length 1", "max_sequence_length=1: must be an int in [2, 4096]; nearest"),
        ("cat --model . --sampler flow-eular", "sampler='flow-eular': must be one of 'flow-dpm-solver', 'flow-eu"),
        ("cat --model . --dtype bf61", "dtype='bf61': must be one of auto, float32, fp32, bfloat16, bf16, fl"),
        ("cat --model . --stack nvlab", "stack='nvlab': must be one of 'auto', 'diffusers', 'nvlabs'; did you me"),
        ("cat --model . --chi absent.txt", "absent.txt: cannot be read (No such file or directory)"),
        ("cat --model . --chi latin.txt", "latin.txt: must be UTF-8"),
        ("cat --model . --output cat.jpg", "output='cat.jpg': must end in .png, or be a folder"),
        ("cat --model . --output latin.txt/cat.png", "output='latin.txt/cat.png': cannot be written (Not a dir"),
        ("cat --model . --output latin.txt/folder", "output='latin.txt/folder': cannot be written (Not a dir"),
    ],
)  # fmt: skip
def test_wrong_by_itself(monkeypatch, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes("Häuschen".encode("latin-1"))
    monkeypatch.setattr(sana_jax, "load_pipeline", never)
    assert refused(monkeypatch, tmp_path, *arguments.split()).startswith(message)


def test_odd_arguments_end_in_one_line_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sana_jax, "load_pipeline", never)
    assert refused(monkeypatch, tmp_path, "cat", "").startswith("unrecognized arguments:")
    assert "did you mean" not in refused(monkeypatch, tmp_path, "cat", "two\nlines")


def test_models_that_are_none(monkeypatch, tmp_path):
    def message(model):
        return refused(monkeypatch, tmp_path, "cat", "--model", model, "--output", "new/cat.png", "--compile-cache", "none")

    assert "has no model_index.json, is not a pipeline in diffusers layout" in message(tmp_path)
    assert "must be a folder in diffusers layout, or a Hugging Face id (owner/name)" in message("no/such/folder")
    assert "model='nobody/nothing': not a local folder, and the download failed: " in message("nobody/nothing")
