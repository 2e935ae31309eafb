"""Starts train.py as its users do, ends it as fate does, and reads what it left."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import uuid

from tests.quick import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
TINY = "tests/chaos/tiny.py"
NIGHT = os.environ.get("SANA_JAX_NIGHT") == "1"  # .ci/nightly: all of it, and many times
MARK = "SANA_JAX_CHAOS"  # a variable of every process of a run, so that none is overlooked
HEARTBEAT = 5  # seconds
PATIENCE = 900 if NIGHT else 180  # seconds for anything on a busy machine; what must be quick is measured


class Run:
    """A run folder and the processes that train in it.

    Args:
      cache: folder of compiled programs, shared so that a start takes a second or two.
      overrides: of the experiment, such as "data.workers=2".
      processes, devices: of the job, and CPU devices of each process.
      script: in place of train.py, such as ("-m", "tests.chaos.faults", "slow_compile").
      outputs: where to keep what the processes say, the run folder if left out.
    """

    def __init__(self, folder, cache, *overrides, processes=1, devices=1, script=("train.py",), outputs=None):
        self.folder, self.cache, self.overrides = pathlib.Path(folder), cache, overrides
        self.outputs = pathlib.Path(outputs or folder)
        self.count, self.devices, self.script = processes, devices, script
        self.processes, self.mark = [], uuid.uuid4().hex

    def start(self, *overrides):
        """Starts every process in a group of its own; returns self."""
        job = []
        if self.count > 1:
            job = [f"distributed.coordinator=localhost:{free_port()}", f"distributed.processes={self.count}"]
            job += [f"distributed.heartbeat_seconds={HEARTBEAT}", "distributed.shutdown_seconds=20"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(self.devices, quick=True),
            "XDG_CACHE_HOME": str(self.cache),
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.outputs.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for i in range(self.count):
            mine = [f"distributed.process={i}"] if self.count > 1 else []
            with open(self.log(i), "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *self.script, TINY, f"workdir={self.folder}", *self.overrides, *overrides, *job, *mine],
                        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                )
        return self

    def log(self, process=0):
        """The file with what a process of the last start said."""
        return self.outputs / f"output-{process}.txt"

    def said(self):
        """What all processes of the last start said."""
        return "\n".join(self.log(i).read_text(errors="replace") for i in range(self.count))

    def wait(self, seconds=PATIENCE):
        """Exit codes of all processes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def finish(self, *overrides):
        """Starts, and waits for a good end; returns self."""
        with self.start(*overrides):
            codes = self.wait()
            assert codes == [0] * self.count, f"exit codes {codes}\n{self.said()}"
        return self

    def until(self, true, what):
        """Waits until true(), which must come before any process ends."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, f"{what} did not happen\n{self.said()}"
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * self.count or true(), f"{what} did not happen, exit codes {ended}\n{self.said()}"
            time.sleep(0.002)
        return self

    def until_step(self, step):
        return self.until(lambda: self.step() >= step, f"step {step}")

    def send(self, number, process=0):
        self.processes[process].send_signal(number)

    def end(self):
        """kill -9 of what is still there; waits for it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        for pid in self.living():  # a worker that outlived its trainer: told by the test, not left behind by it
            os.kill(pid, signal.SIGKILL)

    def living(self):
        """Process ids of everything that was started by this run and is there, workers included."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        if b"\nState:\tZ" not in (entry / "status").read_bytes():
                            found.append(int(entry.name))
                except OSError:  # gone, or not ours to read
                    pass
        return found

    def orphans(self, seconds=10):
        """What is still living after a while; none is what one hopes for."""
        return patiently(self.living, seconds)

    def lines(self):
        """metrics.jsonl, whole lines only."""
        path = self.folder / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        return data[: data.rfind(b"\n") + 1].decode().splitlines()

    def losses(self):
        """{step: loss}"""
        return {line["step"]: float.fromhex(line["loss_hex"]) for line in map(json.loads, self.lines())}

    def step(self):
        """The last step with a line."""
        lines = self.lines()
        return json.loads(lines[-1])["step"] if lines else 0

    def events(self, kind=None):
        path = self.folder / "events.jsonl"
        data = path.read_bytes() if path.exists() else b""
        found = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return [event for event in found if kind in (None, event["kind"])]

    def state_hash(self):
        (done,) = self.events("done")
        return done["state_hash"]

    def checkpoints(self):
        folder = self.folder / "checkpoints"
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []


def patiently(found, seconds):
    """found(), again and again until it is empty or the time is over."""
    deadline = time.monotonic() + seconds
    while (now := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def shared_memory():
    """Names in /dev/shm that no living process uses: what a dead one left, here or elsewhere."""
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for entry in pathlib.Path("/proc").iterdir() if names else ():
        if entry.name.isdigit():
            try:
                used = (entry / "maps").read_text()
            except OSError:  # gone, or not ours to read
                continue
            names = {name for name in names if f"/dev/shm/{name}" not in used}
    return names


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def assert_same(run, reference):
    """The same lines, byte for byte, and the same state, bit for bit."""
    assert run.lines() == reference.lines()
    assert run.state_hash() == reference.state_hash()
