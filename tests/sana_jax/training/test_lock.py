import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from sana_jax.errors import InputError
from sana_jax.training.lock import locked

HOLDER = """
import sys, time
from sana_jax.training.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(InputError, match=rf"another job holds it \(pid {os.getpid()} on host {socket.gethostname()}\)"):
            with locked(tmp_path / "run"):
                raise AssertionError("two jobs in one folder")
    with locked(tmp_path / "run"):  # free again
        pass
    assert stat.S_IMODE(os.stat(tmp_path / "run").st_mode) == 0o700


def test_a_killed_job_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"pid {child.pid} "):
            with locked(tmp_path):
                pass
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_holder_that_does_not_say_who_it_is(tmp_path):
    with locked(tmp_path):
        (tmp_path / "LOCK").write_text("")
        with pytest.raises(InputError, match="it does not say which"):
            with locked(tmp_path):
                pass


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with locked(tmp_path):
            1 / 0
    with locked(tmp_path):
        pass


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"workdir='.*file': cannot be written \(File exists, errno 17\)"):
        with locked(tmp_path / "file"):
            pass
