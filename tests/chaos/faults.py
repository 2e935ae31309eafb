"""train.py with something wrong in its surroundings: `python -m tests.chaos.faults NAME CONFIG workdir=RUN`."""

import json
import os
import resource
import subprocess
import sys
import time

import jax

import train
from sana_jax import compile_cache
from sana_jax.training.watchdog import Watchdog

COMPILING = "a compilation that takes long"


def slow_compile():
    """The program of a step compiles for ten minutes."""
    original = jax.stages.Lowered.compile

    def compile(self, *args, **kwargs):
        print(COMPILING, flush=True)
        time.sleep(600)
        return original(self, *args, **kwargs)

    jax.stages.Lowered.compile = compile


def small_files():
    """No file may have more than 40 kB: what a full disk is to a checkpoint, but not to a log."""
    said = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # without the limit: what is said is a file too
    for stream in (1, 2):
        os.dup2(said.stdin.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def probe():
    """Resident memory, live arrays and compilations so far of every step, in a line at the end."""
    rows, compiled, original = [], compile_cache.count_seconds(), Watchdog.beat
    page = os.sysconf("SC_PAGE_SIZE")

    def beat(self):
        original(self)
        with open("/proc/self/statm") as file:
            rows.append((int(file.read().split()[1]) * page, len(jax.live_arrays()), len(compiled)))

    Watchdog.beat = beat
    return lambda: print("PROBE", json.dumps(rows), flush=True)


if __name__ == "__main__":
    after = {"slow_compile": slow_compile, "small_files": small_files, "probe": probe}[sys.argv[1]]()
    code = train.main(sys.argv[2:])
    if after:
        after()
    sys.exit(code)
