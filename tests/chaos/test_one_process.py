"""A run that is killed, stopped or started twice ends as if nothing had happened: same lines, same bits."""

import os
import random
import shutil
import signal
import time

import pytest

from tests.chaos import faults, tiny
from tests.chaos.runs import NIGHT, PATIENCE, Run, assert_same, patiently, shared_memory

KILLS = 100 if NIGHT else 5  # with 0, 2, 2, 1 and 1 workers, one before the first step
EVERY, STEPS = tiny.config.checkpoint.every, tiny.config.steps


def test_kill_9_at_random_moments(tmp_path, cache, alone):
    """Each start has another number of data workers; some kills come before the first step."""
    rng, before, kills, lost, restarts = random.Random(10), shared_memory(), 0, [], []
    while kills < KILLS:
        run, seen = Run(tmp_path / f"run{kills}", cache), 0
        while not run.events("done"):
            starts = len(run.events("start") + run.events("resume"))
            with run.start(f"data.workers={rng.choice((0, 0, 1, 2))}"):
                began = time.monotonic()
                if kills == KILLS:
                    assert run.wait() == [0], run.said()
                elif rng.random() < 0.15:
                    time.sleep(rng.uniform(0, 2))  # while it starts
                else:
                    run.until(lambda: len(run.events("start") + run.events("resume")) > starts, "a start")
                    first = run.events()[-1]["step"]
                    lost.append(seen - first)
                    run.until_step(min(first + 1, STEPS - 1))
                    restarts.append(time.monotonic() - began)
                    run.until_step(min(first + rng.randint(1, 9), STEPS - 1))
                    time.sleep(rng.uniform(0, 0.03))
                run.end()
                kills += run.processes[0].returncode == -signal.SIGKILL
                seen = max(seen, run.step())
                assert run.orphans() == []
        assert_same(run, alone)
        shutil.rmtree(run.folder)
    assert patiently(lambda: shared_memory() - before, 10) == set()
    assert max(lost) <= 2 * EVERY, lost  # of the last interval, and of one whose checkpoint was on its way
    assert min(restarts) < 60, restarts  # two or three on an idle machine
    print(f"{kills} kills, steps lost {lost}, seconds to the first step {[round(s, 1) for s in restarts]}")


def stop(run, at, number, group):
    """Sends a signal at a step; the seconds until the process was gone."""
    run.until_step(at)
    began = time.monotonic()
    (os.killpg if group else os.kill)(run.processes[0].pid, number)
    assert run.wait() == [0], run.said()
    return time.monotonic() - began


SIGNALS = [  # at this step, the signal, whether to the whole group, and the data workers
    (20, signal.SIGTERM, True, 2),  # as SLURM and docker do it: the workers get it too
    (30, signal.SIGINT, True, 2),  # Ctrl-C
]
MORE = [(10, signal.SIGTERM, False, 0)]  # at night; by day one of two processes gets it so


def test_a_signal_saves_the_step_and_leaves_with_0(tmp_path, cache, alone):
    run = Run(tmp_path / "run", cache)
    for at, number, group, workers in (MORE if NIGHT else []) + SIGNALS:
        with run.start(f"data.workers={workers}"):
            took = stop(run, at, number, group)
            (*_, stopped) = run.events("stopped")
            assert at <= stopped["step"] == run.checkpoints()[-1] <= at + 15, (at, stopped)
            assert took < 15 and run.orphans() == []
    assert_same(run.finish(), alone)


def test_a_signal_while_a_program_compiles(tmp_path, cache, alone):
    """It does not wait for the end of the compilation, and no sample is lost that was read for it."""
    slow = ("-m", "tests.chaos.faults", "slow_compile")
    first = Run(tmp_path / "run", cache, script=slow)
    with first.start():
        first.until(lambda: faults.COMPILING in first.said(), "a compilation")
        first.send(signal.SIGTERM)
        began = time.monotonic()
        assert first.wait() == [0], first.said()
        assert time.monotonic() - began < 15
    assert_same(Run(first.folder, cache).finish(), alone)


def test_a_hang_is_shown_and_ends_with_5(tmp_path, cache):
    run = Run(tmp_path / "run", cache, "data.source.stuck_at=17", "reliability.hang_seconds=1.5")
    for workers in (0, 1):
        with run.start(f"data.workers={workers}"):
            assert run.wait() == [5], run.said()
            assert "watchdog: nothing happened for" in run.said() and "loader.py" in run.said()
            assert run.orphans() == []


def test_a_damaged_compile_cache_costs_only_time(tmp_path, cache, alone):
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    programs = [path for path in sorted(own.rglob("*")) if path.is_file() and "cache" in path.name]
    assert len(programs) > 5
    for i, path in enumerate(programs):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes([bytes(data), data[: len(data) // 2], bytes(len(data)), b""][i % 4])
    run = Run(tmp_path / "run", own, "steps=12").finish()
    assert run.lines() == alone.lines()[:12]


def test_a_full_disk_does_not_stop_the_run_but_is_no_good_end(tmp_path, cache, alone):
    run = Run(tmp_path / "run", cache, "steps=6", script=("-m", "tests.chaos.faults", "small_files"))
    with run.start():
        assert run.wait() == [1]
        assert run.orphans() == []
    assert run.lines() == alone.lines()[:6] and not run.events("done")
    assert os.listdir(run.folder / "checkpoints") == []
    for step in (3, 6):
        assert f"checkpoints/{step}: this checkpoint could not be written (File too large, errno 27)" in run.said()
    with run.start("reliability.stop_on_failed_save=true"):
        assert run.wait() == [1]
    assert [event["step"] for event in run.events("save")] == [3, 6, 3]  # the second start stopped at its first


@pytest.mark.parametrize("workdir, words", [("file", "is a file"), ("file/below", "cannot be written (Not a directory, errno 20)")])
def test_a_folder_that_cannot_be(tmp_path, cache, workdir, words):
    (tmp_path / "file").write_text("")
    run = Run(tmp_path / workdir, cache, outputs=tmp_path / "said")
    with run.start():
        assert run.wait(PATIENCE) == [2] and words in run.said()
