"""Indices go to a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def index_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "sana_jax" / "data"
