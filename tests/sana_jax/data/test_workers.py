"""Worker processes die only with their parent, always with it, and leave nothing behind."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sana_jax.data import workers
from sana_jax.data.loader import Loader
from sana_jax.data.schedule import Schedule
from sana_jax.errors import InputError
from tests.toy_reader import Data, Reader

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEADLINE = 60.0  # seconds until a test gives up


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie waits for its parent to ask, and holds nothing


def poll(condition, seconds=DEADLINE):
    """Seconds until `condition()` holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "still not so"
        time.sleep(0.005)
    return time.monotonic() - begin


@contextlib.contextmanager
def process(mode):
    """tests/loader_process.py as the leader of a process group of its own; hands out it and its group."""
    command = [sys.executable, "-m", "tests.loader_process", mode]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as popen:
        try:
            yield popen
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)


def ready(popen):
    """The workers' process ids, after the first batch."""
    assert popen.stdout.readline() == "started\n", popen.stderr.read()
    word, *pids = popen.stdout.readline().split()
    assert word == "ready" and len(pids) == 2, popen.stderr.read()
    return [int(pid) for pid in pids]


@pytest.mark.parametrize("whom", ["parent", "group"])
def test_kill_9_leaves_no_worker_and_no_shared_memory(whom):
    with process("stay") as popen:
        pids = ready(popen)
        maps = "".join(pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in [popen.pid, *pids])
        assert "/dev/shm" not in maps  # what has no name there cannot be left there
        if whom == "parent":
            popen.kill()
        else:
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait(DEADLINE)
        assert poll(lambda: not any(map(alive, pids))) < 1


def test_batches_are_anonymous_files():
    """So the test above looks at the right thing: the memory of a batch is mapped under this name."""
    with Loader(Reader(), Data(workers=1)) as loader:
        batch = next(loader)
        assert "memfd:sana_jax" in pathlib.Path("/proc/self/maps").read_text()
    latent = batch["latent"].copy()
    assert np.array_equal(batch["latent"], latent)  # still there when the loader is closed
    del batch
    assert "memfd:sana_jax" not in pathlib.Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "moment, number",
    [("at the start", signal.SIGTERM), ("later", signal.SIGTERM), ("later", signal.SIGINT)],
)
def test_a_notice_to_the_group_spares_workers(moment, number):
    with process("preempted") as popen:
        if moment == "later":
            ready(popen)
            os.killpg(popen.pid, number)
        else:
            assert popen.stdout.readline() == "started\n"
            poll(lambda: children(popen.pid))  # the first worker exists, and is importing
            for _ in range(20):
                os.killpg(popen.pid, number)
                time.sleep(0.02)
        out, err = popen.communicate(timeout=DEADLINE)
        assert out.splitlines()[-1] == "closed 0 True" and popen.returncode == 0 and not err, err


def children(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_script_that_fails_without_closing_ends():
    with process("raise") as popen:
        pids = ready(popen)
        _, err = popen.communicate(timeout=DEADLINE)
        assert popen.returncode == 1 and not any(map(alive, pids))
        assert err.endswith("KeyError: 'an error of the training script'\n")


@pytest.mark.parametrize("fault, fate", [("SIGKILL", "was killed by SIGKILL"), ("exit 0", "ended with exit code 0")])
def test_a_worker_that_dies_is_named(fault, fate):
    fatal = int(Schedule((97,), 12).rows(5)[1][0])  # in batch 5, which is the second worker's
    with Loader(Reader(faults={fatal: fault}), Data(workers=2)) as loader:
        next(loader)
        pids = loader._batches.pids
        with pytest.raises(workers.WorkerDied) as caught:
            for _ in range(5):
                next(loader)
    assert str(caught.value).startswith(f"data worker 2 of 2 (process {pids[1]}) {fate}")
    assert multiprocessing.active_children() == [] and not any(map(alive, pids))


def test_a_killed_worker_is_noticed_and_the_loader_goes_on_when_asked():
    with Loader(Reader(), Data(workers=1)) as loader:
        first = next(loader)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(workers.WorkerDied, match=f"process {worker.pid}"):
            while True:
                next(loader)
        assert time.monotonic() - begin < 5
        loader.seek(0)
        assert np.array_equal(next(loader)["latent"], first["latent"])


def numbered(number, allocate):
    batch = allocate({"number": ((1,), np.int64)})
    batch["number"][:] = number
    return batch


class Mistake:
    def __call__(self, number, allocate):
        if number == 2:
            raise ZeroDivisionError("in a worker")
        return numbered(number, allocate)


def test_an_error_in_a_worker_is_told():
    made = workers.Workers(Mistake(), range(10), count=1, threads=1, ahead=1)
    assert [next(made)["number"][0] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="(?s)a data worker failed.*ZeroDivisionError: in a worker"):
        next(made)
    made.close()
    assert multiprocessing.active_children() == []


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(InputError, match="(?s)data workers: .*lambda.*must come from a module"):
        workers.Workers(lambda number: {}, range(10), count=2, threads=1, ahead=1)
    assert multiprocessing.active_children() == []


class Stuck:
    def __call__(self, number, allocate):
        time.sleep(1000 if number else 0)
        return numbered(number, allocate)


def test_a_worker_that_is_stuck_is_closed():
    made = workers.Workers(Stuck(), range(10), count=1, threads=1, ahead=1)
    next(made)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 2 and multiprocessing.active_children() == []


class Backends:
    def __call__(self, number, allocate):
        from jax._src import xla_bridge

        return numbered(len(xla_bridge._backends), allocate)


def test_workers_touch_no_device():
    made = workers.Workers(Backends(), range(2), count=1, threads=1, ahead=1)
    found = next(made)
    made.close()
    assert found["number"] == 0


LAYOUT = {"a": ((7,), np.int32), "empty": ((0, 3), np.float32), "b": ((2, 3), "float16"), "c": ((), bool)}


def test_arrays_lie_where_the_header_says():
    blocks = workers.Blocks()
    block = blocks(LAYOUT)
    assert all(not array.any() and array.flags.writeable for array in block.values())
    block["a"][:], block["b"][1], block["c"][...] = np.arange(7), (1, 2, 3), True
    found = workers._arrays(np.frombuffer(workers._map(block.file), np.uint8))
    os.close(block.file)
    assert list(found) == list(LAYOUT)
    for name, (shape, dtype) in LAYOUT.items():
        assert found[name].dtype == dtype and found[name].shape == shape
        np.testing.assert_array_equal(found[name], block[name])
        assert found[name].ctypes.data % workers.ALIGNMENT == 0


def test_a_file_is_used_again_once_it_is_free():
    blocks = workers.Blocks()
    first, second = blocks(LAYOUT), blocks(LAYOUT)
    first["a"][:] = 1
    assert (first.number, second.number) == (0, 1)
    blocks.free.put(0)
    again = blocks(LAYOUT)
    assert again.number == 0 and again.file is None and not again["a"].any()
    blocks.free.put(0)
    larger = blocks({"a": ((100_000,), np.int32)})
    assert larger.number == 0 and larger.file is not None and larger["a"].size == 100_000
    for block in (first, second, larger):
        os.close(block.file)


def test_a_batch_that_is_held_is_never_written_to():
    """By name, by a view, or by jax, which may take an array as it lies; and files are used again."""
    with Loader(Reader(), Data(workers=2)) as loader:
        held = next(loader)
        view, device = next(loader)["latent"][3:, 0], jax.device_put(next(loader)["latent"])
        copies = {name: array.copy() for name, array in held.items()}, view.copy(), np.array(device)
        for _ in range(60):
            next(loader)
        for name, array in held.items():
            np.testing.assert_array_equal(array, copies[0][name], name)
        np.testing.assert_array_equal(view, copies[1])
        np.testing.assert_array_equal(device, copies[2])
        assert 3 <= len(loader._batches._memory) <= 12
    np.testing.assert_array_equal(held["latent"], copies[0]["latent"])
