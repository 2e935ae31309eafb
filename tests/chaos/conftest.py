"""Runs that nothing happened to, for comparison."""

import pytest

from tests.chaos.runs import Run


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs of all runs of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def alone(tmp_path_factory, cache):
    """One process on one device, undisturbed."""
    return Run(tmp_path_factory.mktemp("alone") / "run", cache).finish()


@pytest.fixture(scope="session")
def pair(tmp_path_factory, cache):
    """Two processes with two devices each, undisturbed."""
    return Run(tmp_path_factory.mktemp("pair") / "run", cache, *PAIR, processes=2, devices=2).finish()


PAIR = ("mesh.data=2", "mesh.fsdp=2")
