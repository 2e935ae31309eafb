"""Checkpoints that are whole or absent, and that are what they were when they were saved.

Orbax writes them, in the background, and makes a step visible by one rename.  Around it stands what it
does not do: a fingerprint of the content inside the same step, checked when it is read; names, types
and shapes compared before anything is cast; removal by rename; and failures told when they happen.

    checkpoints/<step>/{state, meta}     a step
    checkpoints/bad-<step>-<time>/       one that failed its check, set aside
    checkpoints/trash/                   steps on their way out
"""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import re
import shutil
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from sana_jax.errors import InputError, NonFiniteError, require_positive
from sana_jax.training.fingerprint import fingerprint, named_leaves
from sana_jax.training.processes import from_first, meet
from sana_jax.training.reading import DamagedError, listed_steps, listing, one_line, read_step, sha256_of
from sana_jax.training.reading import StructureError as StructureError  # what callers catch and use
from sana_jax.training.reading import read_meta as read_meta
from sana_jax.training.reading import read_params as read_params

TRASH, TEMPORARY, PRIVATE = "trash", ".orbax-checkpoint-tmp", 0o700
SLICE = 16 << 20  # bytes from which devices with the same data write a part each; every cut is a program to compile
SPARE = 1.3  # free space that must be there, in sizes of the state


class SaveError(OSError):
    """A checkpoint that could not be written; the message names the path and the system's reason."""

    def __str__(self):
        return self.strerror  # which names the number, where there is one


class Store:
    """The checkpoints of one run; all processes call the same methods in the same order.

    Args:
      directory: made if absent, readable by its owner only.
      keep: how many of the newest steps stay; those that `keep_every` divides stay as well.
      every: `save` does nothing at steps that it does not divide, unless forced; None saves always.
      stop_on_failure: a save that failed raises SaveError at the next call; else it is only logged.
      log: called with lines for people.
    Raises InputError: the directory cannot be written (tried), or a number is not positive.
    """

    def __init__(self, directory, keep=3, every=None, keep_every=None, stop_on_failure=True, log=print):
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.every = require_positive("checkpoint.keep", keep), require_positive("checkpoint.every", every, none=True)
        self.keep_every = require_positive("checkpoint.keep_every", keep_every, none=True)
        self.stop_on_failure, self._log = stop_on_failure, log
        self._pending, self._newest = None, None  # the step that is being written, and the last saved or restored
        self._unsaved = None  # why the last save failed
        problem = from_first(self._prepare)
        if problem:
            raise InputError(problem)
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
        state = ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)))
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=state, meta=ocp.JsonCheckpointHandler()),
            file_options=ocp.options.FileOptions(path_permission_mode=PRIVATE),
        )
        self._tidier = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._tidying = None

    def _prepare(self):
        """What is wrong with the directory, or ""; sweeps what a killed run left in it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
            probe = self.directory / f"write-test-{os.getpid()}{TEMPORARY}"
            try:
                with open(probe, "wb") as file:
                    file.write(bytes(4096))
                    os.fsync(file.fileno())
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return f"{self.directory}: cannot be written ({error.strerror}, errno {error.errno})"
        for entry in self.directory.iterdir():
            if entry.name == TRASH or TEMPORARY in entry.name:
                shutil.rmtree(entry, ignore_errors=True)
        return ""

    def check_space(self, abstract_state):
        """Raises InputError unless 1.3 times the state fits on the disk; call it before the first step."""
        needed = SPARE * sum(leaf.size * leaf.dtype.itemsize for _, leaf in named_leaves(abstract_state))

        def problem():
            free = shutil.disk_usage(self.directory).free
            if free >= needed:
                return ""
            return f"{self.directory}: has {_size(free)} free, a checkpoint needs {_size(needed)} (1.3 times the state); free some, or choose another folder"

        if found := from_first(problem):
            raise InputError(found)

    def steps(self):
        """The steps that are there, oldest first."""
        return listed_steps(self.directory)

    def latest(self):
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def save(self, step, state, meta=None, force=False):
        """Starts to write `state`, and `meta` (JSON), as `step`; returns whether it did.

        The state may be donated as soon as this returns; the files are written behind it.  An earlier
        save that still runs is waited for.
        Raises:
          NonFiniteError: an array holds NaN or infinity; nothing is written, no older step removed.
          SaveError: an earlier save failed, see `stop_on_failure`.
        """
        step = int(step)
        if not force and self.every and step % self.every:
            return False
        self._settle()
        if step == self._newest:
            return False
        prints, bad = fingerprint(state)
        if bad:
            raise NonFiniteError(f"step {step} is not saved: NaN or infinity in {listing(bad)}")
        record = {"step": step, "fingerprint": prints, "meta": meta or {}}
        record["sha256"] = sha256_of(record)
        self._sweep()
        try:
            self._pending = self._newest = step
            self._writer.save(
                epath.Path(self.directory / str(step)),
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(record)),
            )
        except Exception as error:  # orbax raises ValueError, RuntimeError, OSError ...
            self._failed(error)
            return False
        return True

    def check(self):
        """Tells of a save that failed since the last call, and clears up behind one that did not.

        Costs next to nothing: call it at every step.
        Raises SaveError: a save failed, and `stop_on_failure` is set.
        """
        try:
            self._writer.check_for_errors()
        except Exception as error:
            self._failed(error)
        if self._pending is not None and (self.directory / str(self._pending)).exists():
            self._pending, self._unsaved = None, None
            if jax.process_index() == 0:
                self._tidying = self._tidier.submit(self._tidy)

    def wait(self):
        """Waits until what was saved is on the disk, and what it replaces is gone.

        Raises SaveError: the last save failed.  A run that ends must not seem to be saved, so this does
        not ask for `stop_on_failure`.
        """
        self._settle()
        if self._unsaved:
            raise self._unsaved

    def close(self):
        """Lets a save that still runs end, then lets go of the threads.  Raises as `check`."""
        try:
            self._settle()
        finally:
            self._tidier.shutdown()
            self._writer.close()

    def _settle(self):
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self.check()
        if self._tidying is not None:
            tidying, self._tidying = self._tidying, None
            try:
                tidying.result()
            except OSError as error:  # the new step is safe, the old ones only too many
                self._log(f"WARNING {self.directory}: old checkpoints were not removed ({error})")

    def _failed(self, error):
        step, self._pending, self._newest = self._pending, None, None
        with contextlib.suppress(Exception):  # its thread ends; the error is the one in hand
            self._writer.wait_until_finished()
        self._sweep()  # or the parts of it would keep a full disk full
        number = _errno(error)
        reason = f"{os.strerror(number)}, errno {number}" if number else f"{type(error).__name__}: {one_line(error)}"
        message = f"{self.directory / str(step)}: this checkpoint could not be written ({reason}); the newest is {self.latest()}"
        self._unsaved = SaveError(number, message)
        if self.stop_on_failure:
            raise self._unsaved from error
        self._log(f"WARNING {message}; the run goes on")

    def _sweep(self, tries=50):
        """Removes what a failed save left; its other writers may still be at it for a moment."""
        while jax.process_index() == 0 and tries and (left := list(self.directory.glob(f"*{TEMPORARY}*"))):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            tries -= 1
            time.sleep(0.02)

    def _tidy(self):
        """The newest step is there: makes it last, then removes what is too many.

        Only now, and by rename: killed at any moment, every step that is listed is whole.
        """
        steps = self.steps()
        _sync(self.directory / str(steps[-1]))
        _sync_one(self.directory)
        trash = self.directory / TRASH
        trash.mkdir(exist_ok=True, mode=PRIVATE)
        for step in steps[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                os.rename(self.directory / str(step), trash / f"{step}-{time.time_ns()}")
        shutil.rmtree(trash)

    def restore(self, abstract_state):
        """(step, state, meta) of the newest step that is whole, or None if nothing was ever saved.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings: any mesh, any number of processes.
        Raises:
          StructureError: the step holds other arrays, shapes or types; up to 20 are named.
          DamagedError: steps are there, or were set aside, and none can be used; each is named.
        """
        self._settle()
        told = []
        while newest := from_first(lambda: "".join(map(str, self.steps()[-1:]))):
            step = int(newest)
            try:
                state, meta = read_step(self.directory, step, abstract_state)
            except DamagedError as error:
                aside = f"bad-{step}-{time.time_ns()}"
                told.append(f"{self.directory / newest} cannot be used: {one_line(error)}")
                self._log(f"WARNING {told[-1]}; it is set aside as {aside}")
                if jax.process_index() == 0:
                    os.rename(self.directory / newest, self.directory / aside)
                meet(f"step {step} is set aside")
            else:
                self._newest = step
                return step, state, meta
        told = told or [str(path) for path in sorted(self.directory.glob("bad-*"))]
        if told:
            raise DamagedError(f"no checkpoint can be used: {'; '.join(told)}; to begin anew, remove the folders bad-*")
        return None


def _sync(folder):
    """fsync of every file and folder below; orbax leaves its JSON and its folders to the page cache."""
    for path, _, files in os.walk(folder):
        for name in files:
            _sync_one(os.path.join(path, name))
        _sync_one(path)


def _sync_one(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error):
    """The system's number in an error, in its causes, or in the words of tensorstore; None if there is none."""
    while error is not None:
        if getattr(error, "errno", None):
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        if "No space left" in str(error):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _size(number):
    return f"{number / 1e9:.2f} GB"
