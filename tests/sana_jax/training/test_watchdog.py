import contextlib
import subprocess
import sys
import time

import pytest

from sana_jax.training.watchdog import EXIT_CODE, Watchdog

HANG = """
import sys, threading, time
from sana_jax.training.watchdog import Watchdog

def waits_for_a_batch_that_never_comes():
    {hang}

with Watchdog({seconds}) as watchdog:
    watchdog.beat()
    waits_for_a_batch_that_never_comes()
"""


def run(hang, seconds=0.3):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(hang=hang, seconds=seconds)], capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic() - began


def test_a_hang_is_shown_and_ended():
    done, took = run("time.sleep(600)")
    assert done.returncode == EXIT_CODE == 5
    assert "waits_for_a_batch_that_never_comes" in done.stderr
    assert done.stderr.index("watchdog: nothing happened for") < done.stderr.index("giving up, exit code 5")
    assert 0.6 <= took < 30


def test_a_hang_that_holds_the_interpreter_is_shown_and_ended():
    done, _ = run("import ctypes; ctypes.PyDLL(None).sleep(600)")  # PyDLL keeps the interpreter's lock
    assert done.returncode == 1 and "waits_for_a_batch_that_never_comes" in done.stderr


@pytest.fixture
def exits(monkeypatch):
    """The codes that the watchdog would have left with."""
    found = []
    monkeypatch.setattr("sana_jax.training.watchdog.os._exit", found.append)
    return found


@contextlib.contextmanager
def watching(seconds, path):
    with open(path, "w") as out, Watchdog(seconds, out) as watchdog:
        yield watchdog


def until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_says_nothing_while_there_are_beats_nor_in_a_pause(tmp_path, exits):
    with watching(2.0, tmp_path / "out") as watchdog:
        for _ in range(10):
            watchdog.beat()
            time.sleep(0.05)
        with watchdog.paused():
            time.sleep(2.5)
    assert (tmp_path / "out").read_text() == "" and exits == []


def test_tells_once_for_each_silence(tmp_path, exits):
    def told():
        return (tmp_path / "out").read_text().count("all threads:")

    with watching(0.2, tmp_path / "out") as watchdog:
        watchdog.beat()
        until(lambda: exits)
        assert told() == 1
        watchdog.beat()
        until(lambda: told() == 2)


@pytest.mark.parametrize("seconds", [0, None])
def test_off(tmp_path, seconds):
    with watching(seconds, tmp_path / "out") as watchdog:
        watchdog.beat()
        assert not watchdog._thread.is_alive()
