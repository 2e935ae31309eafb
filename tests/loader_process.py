"""A process that reads from a loader with two workers and says so; the tests kill it or part of it.

    python -m tests.loader_process MODE

It prints "started", then with the first batch "ready PID PID", the workers'.  "stay" reads on until it
is killed.  "preempted" takes SIGTERM and SIGINT for a notice, reads five more batches once one has
come, and closes.  "raise" fails without closing.
"""

import multiprocessing
import signal
import sys
import time

from sana_jax.data.loader import Loader
from tests.toy_reader import Data, Reader

WAIT = 60.0  # seconds; no test takes so long, and nothing is left if one is cut off

# There is no `if __name__ == "__main__"`: workers must not import the main module.
mode = sys.argv[1]
notices = []
if mode == "preempted":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: notices.append(number))
loader = Loader(Reader(count=500), Data(workers=2, batch=64))
print("started", flush=True)
next(loader)
print("ready", *(process.pid for process in multiprocessing.active_children()), flush=True)
end = time.monotonic() + WAIT
while mode in ("stay", "preempted") and not notices and time.monotonic() < end:
    next(loader)
if mode == "preempted":
    for _ in range(5):
        next(loader)
    loader.close()
    print("closed", len(multiprocessing.active_children()), loader.samples >= 6 * 64, flush=True)
if mode == "raise":
    raise KeyError("an error of the training script")
