"""Two processes with two devices each: one dies, freezes or is asked to stop, and the job loses nothing."""

import json
import random
import shutil
import signal
import time

import pytest

from tests.chaos import tiny
from tests.chaos.conftest import PAIR
from tests.chaos.runs import HEARTBEAT, NIGHT, Run, assert_same, patiently, shared_memory

STEPS = tiny.config.steps
MARGIN = 5  # seconds behind the heartbeat in which the others must be gone
FATES = [  # what happens, to which process; the others learn of it from each other
    (signal.SIGTERM, 1),
    (signal.SIGSTOP, 1),
    (signal.SIGKILL, 0),
]
MORE = [(signal.SIGKILL, 1), (signal.SIGTERM, 0)]  # at night
ROUNDS = 20 if NIGHT else 1


def befalls(run, rng, number, which):
    """Starts the job, lets it happen to a process at a random moment; returns when all are gone."""
    starts = len(run.events("start") + run.events("resume"))
    with run.start(f"data.workers={rng.choice((0, 1))}"):
        run.until(lambda: len(run.events("start") + run.events("resume")) > starts, "a start")
        run.until_step(min(run.events()[-1]["step"] + rng.randint(2, 9), STEPS - 2))
        time.sleep(rng.uniform(0, 0.03))
        began = time.monotonic()
        run.send(number, which)
        if number == signal.SIGTERM:
            assert run.wait() == [0, 0], run.said()
            assert run.events()[-1]["step"] == run.checkpoints()[-1]
        elif run.processes[1 - which].wait() != 0:  # or it was done already
            assert time.monotonic() - began < HEARTBEAT + MARGIN
        run.end()
        assert run.orphans() == []


def test_whatever_happens_to_one_of_two_the_job_ends_the_same(tmp_path, cache, pair):
    rng, before = random.Random(1), shared_memory()
    for number in range(ROUNDS):
        run = Run(tmp_path / f"run{number}", cache, *PAIR, processes=2, devices=2)
        for fate in FATES if number == 0 else rng.choices(FATES + MORE, k=5):
            befalls(run, rng, *fate)
            if run.events("done"):
                break
        if not run.events("done"):
            run.finish()
        assert_same(run, pair)
    assert patiently(lambda: shared_memory() - before, 10) == set()


TOPOLOGIES = {  # processes, devices of each, mesh
    "1x1": (1, 1, ()),
    "1x4": (1, 4, ("mesh.fsdp=4",)),
    "1x8": (1, 8, ("mesh.data=4", "mesh.fsdp=2")),
    "4x1": (4, 1, ("mesh.data=2", "mesh.fsdp=2")),
}


@pytest.mark.parametrize("name", TOPOLOGIES if NIGHT else ["1x1", "1x8"])
def test_goes_on_with_other_devices(tmp_path, cache, pair, name):
    """The first loss within 1e-6 of that of two processes with two devices each, twenty within 1e-5."""
    processes, devices, mesh = TOPOLOGIES[name]
    run = Run(tmp_path / "run", cache, *mesh, processes=processes, devices=devices)
    for part in ("30", "trash"):
        if (pair.folder / "checkpoints" / part).exists():
            shutil.copytree(pair.folder / "checkpoints" / part, run.folder / "checkpoints" / part)
    run.finish("steps=50")
    assert run.events()[0]["step"] == 30  # it did go on
    found, expected = run.losses(), pair.losses()
    errors = [abs(found[step] - expected[step]) / abs(expected[step]) for step in range(31, 51)]
    assert errors[0] <= 1e-6 and max(errors) <= 1e-5, errors
    assert all(json.loads(line)["finite"] for line in run.lines())
    print(f"{name}: first loss {errors[0]:.1e}, twenty {max(errors):.1e}")


def test_another_position_is_seen(pair):
    """The control: the losses of the steps before, in their place, are far off."""
    losses = pair.losses()
    assert min(abs(losses[step - 1] - losses[step]) / losses[step] for step in range(31, 51)) > 1e-4
