"""A disk that is full, a folder that is none, or that may not be written."""

import contextlib
import errno
import gc
import os
import resource
import shutil
import time

import jax
import pytest

from sana_jax.errors import InputError
from sana_jax.training.fingerprint import state_hash
from sana_jax.training.store import SaveError, Store
from tests.sana_jax.training.toy_state import abstract, make_state

# What fails leaves the rest of its work to a loop that orbax has closed: noise on stderr.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def noise_in_its_own_test():
    yield
    gc.collect()


@contextlib.contextmanager
def no_file_over(size):
    """A disk that is full, for the one process that is this test: writing more gives EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def told_of(store, seconds=30):
    """The error that `check`, called as a loop over steps would, raises."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            store.check()
        except SaveError as error:
            return error
        time.sleep(0.01)
    raise AssertionError("no error was told")


def test_a_failed_save_is_told_by_check_and_leaves_nothing(tmp_path):
    store = Store(tmp_path, keep=2)
    store.save(1, make_state(1))
    store.wait()
    with no_file_over(2000):
        assert store.save(2, make_state(2))  # begun: it fails behind our back
        error = told_of(store)
    assert f"{tmp_path}/2: this checkpoint could not be written (File too large, errno 27); the newest is 1" in str(error)
    assert error.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["1"]  # its parts are gone, and with them what they took
    assert store.save(2, make_state(2))  # the same step can be tried again
    store.close()
    assert store.steps() == [1, 2]


def test_the_run_may_go_on_and_no_older_step_is_lost(tmp_path):
    told = []
    store = Store(tmp_path, keep=1, stop_on_failure=False, log=told.append)
    store.save(1, make_state(1))
    store.wait()
    with no_file_over(2000):
        for step in (2, 3):
            store.save(step, make_state(step))
            with pytest.raises(SaveError):  # but asked whether all is saved, it does not say yes
                store.wait()
    assert store.steps() == [1] and len(told) == 2
    assert all("errno 27" in line and "the run goes on" in line for line in told)
    store.save(4, make_state(4))
    store.wait()
    store.close()
    assert os.listdir(tmp_path) == ["4"]
    again = Store(tmp_path)
    assert state_hash(again.restore(abstract(make_state()))[1]) == state_hash(make_state(4))
    again.close()


def test_a_save_that_fails_at_the_end_is_told_by_close(tmp_path):
    store = Store(tmp_path)
    with no_file_over(2000):
        store.save(1, make_state(1))
        with pytest.raises(SaveError, match="the newest is None"):
            store.close()
    assert os.listdir(tmp_path) == []


def test_space_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    store = Store(tmp_path)
    needed = 1.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(make_state()))
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((needed + 1, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free)))
        with contextlib.nullcontext() if enough else pytest.raises(InputError, match=r"has 0.00 GB free, a checkpoint needs 0.00 GB \(1.3"):
            store.check_space(abstract(make_state()))
    store.close()


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"^{path}: cannot be written \(.*, errno (17|20)\)$"):
            Store(path)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may do anything: the system's refusal, from the call that would give it

        def refuse(path, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"shut: cannot be written \(Permission denied, errno 13\)"):
        Store(folder)
