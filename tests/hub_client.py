"""Fixtures of the tests that download: a client with caches of its own, and a pipeline to fetch."""

import contextlib
import json
import time
import types

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from sana_jax.errors import InputError
from sana_jax.hub import download
from tests.hub_server import serve

NAME = "Efficient-Large-Model/Sana_Toy_diffusers"
SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {"a": SHARD.format(1), "b": SHARD.format(2)}}).encode()
READ = {  # a pipeline with a sharded transformer; equal files would be one in the cache
    "model_index.json": b'{"n": 1}',
    "sana_jax.json": b'{"n": 2}',
    "scheduler/scheduler_config.json": b'{"n": 3}',
    "tokenizer/tokenizer.json": b"tokens",
    "tokenizer/tokenizer_config.json": b'{"n": 4}',
    "tokenizer/special_tokens_map.json": b'{"n": 5}',
    "transformer/config.json": b'{"n": 6}',
    "transformer/diffusion_pytorch_model.safetensors.index.json": INDEX,
    "transformer/" + SHARD.format(1): b"1" * 1000,
    "transformer/" + SHARD.format(2): b"2" * 1000,
    "vae/config.json": b'{"n": 7}',
    "vae/diffusion_pytorch_model.safetensors": b"v" * 1000,
    "text_encoder/config.json": b'{"n": 8}',
    "text_encoder/model.safetensors": b"t" * 1000,
}


HURRIED = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # between tries


@pytest.fixture(name="here")
def client_here(tmp_path, monkeypatch):
    """A hub's client with caches of its own, and no proxy or token between it and this machine."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for module in (file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", HURRIED)
    huggingface_hub.utils.disable_progress_bars()
    yield monkeypatch
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.close_session()


def point_to(monkeypatch, url):
    """The library reads HF_ENDPOINT once, at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(name="online")
def client_online(here):
    """A function that serves repositories and points the client there; it returns the server."""
    with contextlib.ExitStack() as stack:

        def start(**repositories):
            named = {NAME if name == "toy" else f"owner/{name}": value for name, value in repositories.items()}
            server = stack.enter_context(serve(named))
            point_to(here, server.url)
            return server

        yield start


def fetched(server):
    """What was downloaded, relative to the repository."""
    return [line.split("/", 2)[2] for line in server.log if line.startswith("GET ") and "/api/" not in line]


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(*args, **kwargs):
    lines = []
    with pytest.raises(InputError) as caught:
        download.find_model(*args, report=lines.append, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
