"""What a run says while it goes on: JSON lines in its folder, a line on the terminal, TensorBoard.

    metrics.jsonl   what a step is a function of: {"step", "loss", "loss_hex", "grad_norm", ...}.  A run
                    that was killed and one that never was have the same lines, byte for byte.
    timing.jsonl    clocks and counts of this process: {"step", "time", "images_per_second", ...}.
    events.jsonl    what happened when: {"time", "kind", ...}; starts, skipped steps, saves.  Never cut.

A line is one write, so that kill -9 loses none that was written.  When a run goes on behind step s,
lines of later steps are cut, since these steps are going to happen again.
"""

import collections
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from sana_jax.errors import InputError

EVERY_STEP = ("finite", "skipped", "skipped_in_row")  # read of each step, not only of logged ones
COUNTS = (*EVERY_STEP, "time_count")  # whole numbers, which come as float32


class Lagged:
    """Metrics on their way from the device, read one step late: the host has started the next step
    before it waits for this one's.

        for step, values, note in lagged.push(step, metrics, whole=step % 20 == 0, note=batch["position"]):

    Before a checkpoint is written, or the run ends, `drain` reads what is left: a line of a saved
    step would otherwise be lost with the process.
    """

    def __init__(self, depth=1):
        self._depth, self._waiting = depth, collections.deque()

    def push(self, step, metrics, whole, note=None):
        """[(step, {name: numpy value}, note)] of the steps that have waited long enough.

        Args:
          metrics: {name: array}, replicated on all devices.
          whole: whether all of them are of interest, or only `EVERY_STEP`.
          note: anything that shall come back with them.
        """
        names = [name for name in metrics if whole or name in EVERY_STEP]
        for name in names:
            metrics[name].copy_to_host_async()
        self._waiting.append((step, {name: metrics[name] for name in names}, note))
        return self._read(self._depth)

    def drain(self):
        """All that still waits, as `push` returns it."""
        return self._read(0)

    def _read(self, leave):
        ready = [self._waiting.popleft() for _ in range(len(self._waiting) - leave)]
        return [(step, {k: np.asarray(v) for k, v in values.items()}, note) for step, values, note in ready]


class Metrics:
    """The records of a run.  Only process 0 writes; on others every method does nothing.

    Attributes:
      began: Unix time of the run's first start.
      productive: seconds of its steps so far, as `timing.Clocks` counts them.
    """

    def __init__(self, workdir, total_steps, step=0, tensorboard=True):
        """Opens the records of a run that stands behind `step`, 0 of a new one.

        Raises InputError: the folder cannot be written.
        """
        self.began, self.productive = time.time(), 0.0
        self._writes, self._files, self._board = jax.process_index() == 0, {}, None
        self._bar = tqdm(
            total=total_steps, initial=step, unit="step", file=sys.stderr, dynamic_ncols=True,
            disable=not (self._writes and sys.stderr.isatty()),
        )  # fmt: skip
        self._total = total_steps
        if not self._writes:
            return
        folder = pathlib.Path(workdir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, last in (("metrics", step), ("timing", step), ("events", None)):
                path = folder / f"{name}.jsonl"
                if cut := keep_until(path, last):
                    self.say(f"{path}: {cut} line(s) cut, behind step {step} or not whole")
                self._files[name] = _Lines(path)
            first, last = next(read(folder / "events.jsonl"), {}), {}
            for last in read(folder / "timing.jsonl"):
                pass
        except OSError as error:
            raise InputError(f"workdir={str(workdir)!r}: cannot be written ({error.strerror})") from error
        self.began = first.get("time", self.began)
        self.productive = last.get("productive_seconds", 0.0)
        self.event("resume" if first else "start", step=step)
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            self.say("TensorBoard: not written, tensorboardX is not installed (pip install sana_jax[train])")
        elif tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step, values, clocks):
        """One step's line in metrics.jsonl and timing.jsonl, its scalars, and the line for people.

        Args:
          values: {name: number or short array}, functions of the step: those of `Lagged`.
          clocks: {name: number, or dict of numbers}, from `timing.Clocks.line`.
        """
        if not self._writes:
            return
        values = {"step": step, **plain(values)}
        clocks = {"step": step, **plain(clocks)}
        self._write("metrics", values)
        self._write("timing", clocks)
        words = summary(values, clocks)
        if self._bar.disable:
            print(f"step {step}/{self._total}  {words}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(step - self._bar.n)
        if self._board:
            for name, value in _scalars({**clocks, **values}):
                self._board.add_scalar(name, value, step)

    def event(self, kind, **fields):
        """A line in events.jsonl."""
        if self._writes:
            self._write("events", {"time": time.time(), "kind": kind, **plain(fields)})

    def picture(self, name, step, image):
        """uint8 [H W 3] for TensorBoard; the file of it is the caller's."""
        if self._board:
            self._board.add_image(name, image, step, dataformats="HWC")

    def say(self, text):
        """A line on the terminal, above the bar."""
        if self._writes:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self):
        """Closes all; what could not be written by now (a full disk) is said to be lost."""
        self._bar.close()
        if self._board:
            self._board.close()
        for file in self._files.values():
            self._attempt(file, b"")
            if lost := file.close():
                self.say(f"{file.path}: {lost} bytes could not be written and are lost")
        self._files, self._board, self._writes = {}, None, False

    def _write(self, name, record):
        line = json.dumps(record, allow_nan=False) + "\n"
        self._attempt(self._files[name], line.encode("utf-8"))

    def _attempt(self, file, data):
        try:
            file.add(data)
            file.refused = False
        except OSError as error:
            if not file.refused:
                self.say(f"{file.path}: cannot be written ({error.strerror}); its lines are kept until they can")
            file.refused = True


class _Lines:
    """A file that lines are appended to; what a full disk refuses waits for the next line."""

    def __init__(self, path):
        self.path, self.refused = path, False
        self._file, self._pending = open(path, "ab", buffering=0), b""

    def add(self, data):
        self._pending += data
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self):
        self._file.close()
        return len(self._pending)


def read(path):
    """The records of a file of JSON lines; of a file that is being written, without a torn last line."""
    if not pathlib.Path(path).exists():
        return
    with open(path, "rb") as file:
        yield from filter(None, map(_record, file))


def keep_until(path, step):
    """Cuts a file of JSON lines behind `step` (None: nowhere), and lines that are none; all or nothing.

    Returns how many lines went.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    partial, cut = path.with_name(f".{path.name}.partial"), 0
    with open(path, "rb") as old, open(partial, "wb") as new:
        for line in old:
            record = _record(line)
            if record is None or (step is not None and not record.get("step", 0) <= step):
                cut += 1
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if cut:
        os.replace(partial, path)
    else:
        partial.unlink()
    return cut


def _record(line):
    """The object of a whole line, else None."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def plain(values):
    """{name: what JSON can hold}: numpy numbers as Python's, NaN and infinities as null.

    `loss_hex` goes with `loss`, exact and "nan" where that is null.  Of `time_loss`, bins without a
    row in `time_count` are null.
    """
    out = {}
    for name, value in values.items():
        out[name] = _plain(value if name not in COUNTS else np.asarray(value).astype(int))
        if name == "loss":
            out["loss_hex"] = float(np.float32(value)).hex()
    if "time_loss" in out and "time_count" in out:
        pairs = zip(out["time_loss"], out["time_count"])
        out["time_loss"] = [loss if count else None for loss, count in pairs]
    return out


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy's and JAX's
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _scalars(record, prefix=""):
    """(name, number) of all numbers in a record, those of lists and dicts as name/0 or name/key."""
    for name, value in record.items():
        if isinstance(value, (list, tuple)):
            value = {f"{i:02d}": v for i, v in zip(itertools.count(), value)}
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name not in ("step", "time"):
            yield prefix + name, value


def summary(values, clocks):
    """One line for people."""
    fields = (
        ("loss", values.get("loss"), "{:.4f}"),
        ("grad", values.get("grad_norm"), "{:.3f}"),
        ("lr", values.get("lr"), "{:.2e}"),
        ("images/s", clocks.get("images_per_second"), "{:.1f}"),
        ("MFU", clocks.get("mfu"), "{:.1%}"),
        ("data wait", clocks.get("data_wait"), "{:.0%}"),
        ("goodput", clocks.get("goodput"), "{:.0%}"),
        ("skipped", values.get("skipped") or None, "{}"),
        ("bad", sum((clocks.get("bad") or {}).values()) or None, "{}"),
    )
    return "  ".join(f"{name} {form.format(value)}" for name, value, form in fields if value is not None)
