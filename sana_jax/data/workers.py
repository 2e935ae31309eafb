"""Batches made in worker processes, with nothing left behind however the training process ends.

Process i of n makes the batches i, i + n, i + 2n, ... and hands each over in an anonymous file, whose
descriptor goes through a socket.  No name exists anywhere, in /dev/shm or elsewhere, so the kernel
frees all of it when the last process is gone, even if every one is killed outright.  (Grain's own
processes leave semaphores and arrays there, outlive a killed parent, and wait for ever for a worker
that exits with status 0.)

A closed socket is the only signal there is.  A worker whose parent is gone ends itself at once,
whatever it is doing; a parent whose worker is gone says which and how.  A preemption notice (SIGTERM)
or Ctrl-C goes to every process of the group; workers ignore both, else the trainer could not go on to
save, and it is the trainer that closes them.
"""

import contextlib
import functools
import json
import math
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from multiprocessing import resource_tracker, util

import grain
import numpy as np

from sana_jax.errors import InputError

IGNORED = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0  # seconds for a worker to end by itself
ALIGNMENT = 64  # bytes, so that jax can take an array as it lies
BATCH, ERROR, TAKEN = b"B", b"E", b"T"


class WorkerDied(RuntimeError):
    """A worker process is gone.  No sample is lost: a new run goes on from the last checkpoint."""


def in_threads(make, numbers, threads, ahead):
    """Iterator over make(number), in order, made in `threads` threads up to `ahead` in advance."""
    data = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(make)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))))


class Workers:
    """Iterator over the batches of the range `numbers`, made in `count` processes.

    Args:
      make: make(number, allocate=f) is f({name: (shape, dtype)}), filled in.
        It can be pickled with all that it holds, and comes from modules that can be imported: the
        main module is not there in a worker.
      threads: in each process.
      ahead: finished batches that wait, of all processes together.
    Raises:
      InputError: something cannot be pickled.
    """

    def __init__(self, make, numbers, count, threads, ahead):
        self._processes, self._sockets, self._turn = [], [], 0
        # Before Python would join the workers at its exit, in case nobody has closed this.
        self._finalizer = util.Finalize(self, _end, (self._processes, self._sockets), exitpriority=10)
        with _starting():
            for i in range(count):
                self._start(make, numbers[i::count], threads, max(1, ahead // count))

    def _start(self, *arguments):
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, *arguments), daemon=True)
        try:
            process.start()
        except Exception as error:  # whatever cannot be pickled says so in its own way
            self.close()
            if isinstance(error, (OSError, RuntimeError)):
                raise
            raise InputError(
                f"data workers: {error}; readers, tokenizers and captions must come from a module that can be "
                "imported, not from the main script (data.workers=0 takes any)"
            ) from error
        finally:
            theirs.close()
        self._processes.append(process)

    def __iter__(self):
        return self

    def __next__(self):
        i = self._turn % len(self._sockets)
        kind, files = _receive(self._sockets[i])
        if kind == BATCH:
            self._turn += 1
            with contextlib.suppress(OSError):  # it died since; its next turn will tell
                self._sockets[i].sendall(TAKEN)
            batch = _arrays(*files)
            os.close(*files)
            return batch
        if kind == ERROR:
            with open(*files, "rb") as file:
                raise RuntimeError(f"a data worker failed\n{file.read().decode()}")
        process = self._processes[i]
        process.join(PATIENCE)
        raise WorkerDied(
            f"data worker {i + 1} of {len(self._processes)} (process {process.pid}) {_fate(process.exitcode)}; "
            "no sample is lost, the run can go on from its last checkpoint"
        )

    @property
    def pids(self):
        return [process.pid for process in self._processes]

    def close(self):
        """Ends all workers; returns when they are gone."""
        self._finalizer()


def _end(processes, sockets):
    for ours in sockets:
        ours.close()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():  # stuck within a call that lets no other thread run
            process.kill()
            process.join()


def _fate(code):
    if code is None:
        return "closed its socket"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextlib.contextmanager
def _starting():
    """While workers are started.

    Signals wait meanwhile, and a child inherits that, so none dies of one before it can ignore it.
    The main module is hidden: a worker would import the training script before its first picture.
    """
    resource_tracker.ensure_running()  # first: its start would let signals in
    main, mask = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(theirs, make, numbers, threads, ahead):
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    allowed = threading.Semaphore(ahead)
    threading.Thread(target=_listen, args=(theirs, allowed), daemon=True).start()
    try:
        batches = in_threads(functools.partial(make, allocate=Block), numbers, threads, 0)
        while True:
            allowed.acquire()
            _send(theirs, BATCH, next(batches).file)
    except BaseException:  # SystemExit too
        _send(theirs, ERROR, _file(traceback.format_exc().encode()))
    os._exit(1)


def _listen(theirs, allowed):
    with contextlib.suppress(ConnectionError):
        while theirs.recv(1):
            allowed.release()
    os._exit(0)  # the parent closed its end, or is no more


def _send(theirs, kind, file):
    try:
        socket.send_fds(theirs, [kind], [file])
    except OSError:  # as above
        os._exit(0)
    os.close(file)


def _receive(ours):
    """(kind, [descriptor]); (b"", []) when the other end is gone."""
    try:
        kind, files, _, _ = socket.recv_fds(ours, 1, 1)
    except ConnectionError:
        return b"", []
    return kind, files


def _file(content=b""):
    """Descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("sana_jax")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    if content:
        os.pwrite(file, content, 0)
    return file


class Block(dict):
    """{name: array of 0} in an anonymous file, so that what is put into them is where it has to be.

    The file begins with the length of a JSON header, 8 bytes, and the header, the layout.
    """

    def __init__(self, layout):
        header = json.dumps([(name, np.dtype(kind).str, shape) for name, (shape, kind) in layout.items()]).encode()
        self.file = _file(len(header).to_bytes(8, "little") + header)
        super().__init__(_arrays(self.file))


def _arrays(file):
    """{name: array} of a Block's file; the memory is freed with the last of the arrays."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    places, end = [], 8 + length
    for name, kind, shape in json.loads(os.pread(file, length, 8)):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + np.dtype(kind).itemsize * math.prod(shape)
        places.append((name, kind, shape, start))
    os.truncate(file, end)
    memory = mmap.mmap(file, end)
    return {
        name: np.frombuffer(memory, kind, math.prod(shape), start).reshape(shape) for name, kind, shape, start in places
    }
