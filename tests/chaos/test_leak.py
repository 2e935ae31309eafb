"""What a long run must not gather: memory, arrays on the device, programs, processes, shared memory."""

import json

import numpy as np
import pytest

from tests.chaos.runs import NIGHT, Run, patiently, shared_memory

STEPS, WARM = (20000, 2000) if NIGHT else (1000, 500)
# The allocator needs some dozen checkpoints to settle (10 MB more, then 2 MB in 1000 steps): too long by day.
SAVE_EVERY = 150 if NIGHT else 10**6
LIMIT = 5e6  # bytes in 1000 steps
SHORT = {} if NIGHT else dict(steps=500, warm=250)  # enough for the control, but not beside checkpoints


def measure(folder, cache, *overrides, steps=STEPS, warm=WARM):
    """(bytes in 1000 steps, live arrays at each step, compilations so far) behind the warm-up."""
    settings = ("log.every=50", f"checkpoint.every={SAVE_EVERY}", f"steps={steps}", *overrides)
    run = Run(folder, cache, *settings, script=("-m", "tests.chaos.faults", "probe"))
    run.finish()
    (line,) = [line for line in run.log().read_text().splitlines() if line.startswith("PROBE ")]
    memory, arrays, compiled = np.array(json.loads(line.removeprefix("PROBE "))[warm:-1]).T  # not the last: its checkpoint is on its way
    slope = np.polyfit(np.arange(memory.size), memory, 1)[0] * 1000
    assert run.orphans() == []
    return slope, arrays, compiled


@pytest.mark.parametrize("workers", [0, 1] if NIGHT else [1])
def test_nothing_grows(tmp_path, cache, workers):
    before = shared_memory()
    slope, arrays, compiled = measure(tmp_path / "run", cache, f"data.workers={workers}")
    assert slope < LIMIT, slope
    early, late = np.array_split(arrays, 2)
    assert late.max() <= early.max(), (early.max(), late.max())
    assert compiled[0] == compiled[-1]
    assert patiently(lambda: shared_memory() - before, 10) == set()
    print(f"{workers} workers: {slope / 1e6:.2f} MB in 1000 steps")


def test_a_leak_would_be_seen(tmp_path, cache):
    """The control: a reader that keeps 4 KB of every record it reads."""
    slope, _, _ = measure(tmp_path / "run", cache, "data.source.leak=4096", **SHORT)
    assert slope > 2 * LIMIT, slope
