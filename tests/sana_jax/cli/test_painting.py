"""What a record says of the files that a picture was painted with."""

import json

import pytest
import safetensors.numpy

from sana_jax.cli import painting, records


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """A pipeline's text_encoder/ with its tokenizer/ beside it, of which only the bytes matter."""
    import numpy as np

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, files in {"text_encoder": ["config.json"], "tokenizer": ["tokenizer.json"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(json.dumps({"a": 1}))
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "text_encoder" / "model.safetensors")
    safetensors.numpy.save_file({"y": np.zeros(3)}, tmp_path / "sana.safetensors")
    return tmp_path / "text_encoder"


def sha256(encoder):
    loading = {"model": str(encoder.parent / "sana.safetensors"), "text": str(encoder)}
    return painting.fingerprint(records.LOADING | loading)


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors", "sana.safetensors"]
)
def test_every_file_that_is_read_counts(encoder, name):
    before = sha256(encoder)
    assert sha256(encoder) == before
    path = encoder.parent / name
    path.write_bytes(path.read_bytes() + b" ")
    assert sha256(encoder) != before
