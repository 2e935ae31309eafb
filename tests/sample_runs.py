"""sample.py run in this process, on the toy pipeline."""

import contextlib
import io
import json
import shutil
import types
import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import sample
import sana_jax

CACHE_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """What sample.py sets for its whole process is set back here; fingerprints go to a folder of ours."""
    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    compilation_cache.reset_cache()  # it may have been found disabled by now
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(toy_folder, tmp_path_factory):
    """The toy pipeline as a model of 64 x 64 pixels, for which no table of sizes is published."""
    folder = shutil.copytree(toy_folder, tmp_path_factory.mktemp("sample") / "toy")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": 2}))
    return folder


def run(*arguments):
    """(status, stdout, stderr) of sample.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.resetwarnings()  # as in a plain process, but each time
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            status = sample.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def refused(monkeypatch, tmp_path, *arguments, lines=1):
    """The message of a run that fails and leaves nothing in its folder."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*arguments)
    assert status == 2, (status, out, err)
    assert err.startswith("sample.py: error: ") and err.endswith("\n")
    assert lines is None or err.count("\n") == lines, err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    return err.removeprefix("sample.py: error: ").rstrip("\n")


@pytest.fixture
def painter(monkeypatch, tmp_path):
    """Calls of `generate`, which gives grey pictures; `before` is called first, with the number of the call."""
    painter = types.SimpleNamespace(calls=[], before=lambda number: None)

    def generate(self, prompts, *, num_images, height, width, **arguments):
        painter.calls.append((prompts, arguments | {"num_images": num_images, "height": height, "width": width}))
        painter.before(len(painter.calls))
        return np.full((len(prompts) * num_images, height, width, 3), 128, np.uint8)

    monkeypatch.setattr(sana_jax.Pipeline, "generate", generate)
    monkeypatch.chdir(tmp_path)
    return painter
