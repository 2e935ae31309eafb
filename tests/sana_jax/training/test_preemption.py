import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sana_jax.training.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_the_handlers_are_given_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested() and preemption.requested()
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


def test_a_second_ctrl_c_interrupts():
    with Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_waiting_gives_the_result_or_the_error():
    with Preemption() as preemption:
        assert preemption.while_waiting(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            preemption.while_waiting(lambda: 1 / 0)


def test_a_signal_ends_the_wait_behind_what_has_to_be_saved(monkeypatch):
    exits, saved, release = [], [], threading.Event()
    monkeypatch.setattr("sana_jax.training.preemption.os._exit", exits.append)
    with pytest.raises(SystemExit) as caught:
        with Preemption(log=saved.append) as preemption:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            preemption.while_waiting(release.wait, before_leaving=lambda: saved.append("state"))
    release.set()
    assert caught.value.code == 0 and exits == [0] and saved == ["SIGTERM: leaving", "state"]


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(2), KeyboardInterrupt()])
def test_what_could_not_be_saved_is_no_success(monkeypatch, error, capfd):
    def fail():
        raise error

    exits, release = [], threading.Event()
    monkeypatch.setattr("sana_jax.training.preemption.os._exit", exits.append)
    with pytest.raises(type(error)):
        with Preemption() as preemption:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            preemption.while_waiting(release.wait, before_leaving=fail)
    release.set()
    assert exits == [1] and type(error).__name__ in capfd.readouterr().err


COMPILES = """
import sys, time
from sana_jax.training.preemption import Preemption
with Preemption() as preemption:
    print("waiting", flush=True)
    preemption.while_waiting(lambda: time.sleep(600))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_leaves_with_0_in_the_middle_of_a_wait(number):
    child = subprocess.Popen([sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "waiting\n"
        began = time.monotonic()
        child.send_signal(number)
        _, errors = child.communicate(timeout=30)
        assert child.returncode == 0 and time.monotonic() - began < 5, errors
    finally:
        child.kill()
