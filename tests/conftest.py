"""Settings of every test, and toy pipelines made by the peers' own classes."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile

from tests.quick import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax; tests never touch an accelerator
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One for the whole run: both workers and every process that a test starts compile the same toys.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder = tempfile.mkdtemp(prefix="sana_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)

import jax
import pytest

from tests.no_skip import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent float32 in a bfloat16 model
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    """Without PyTorch the parity tests are skipped, all of them in this one place; CI forbids it."""
    absent = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if absent:
        skip = pytest.mark.skip(reason=f"needs the extra `parity`: no {' and no '.join(absent)}")
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def gradients_of_torch():
    """The parity command switches them off for its process, which here goes on to the next test."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A pipeline folder written by diffusers' SanaPipeline.save_pretrained, float32."""
    from tests.toy_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("toy") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder
