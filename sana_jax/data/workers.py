"""Batches made in worker processes, with nothing left behind however the training process ends.

Process i of n makes the batches i, i + n, i + 2n, ... and hands each over in an anonymous file, whose
descriptor goes through a socket.  No name exists anywhere, in /dev/shm or elsewhere, so the kernel
frees all of it when the last process is gone, even if every one is killed outright.  (Grain's own
processes leave semaphores and arrays there, outlive a killed parent, and wait for ever for a worker
that exits with status 0.)  When the last array of a batch is gone its file is used again: pages that
are there already save half of the time that a batch of cached features takes.

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
import queue
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import types
import weakref
from multiprocessing import resource_tracker, util

import grain
import numpy as np

from sana_jax.errors import InputError

IGNORED = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0  # seconds for a worker to end by itself
ALIGNMENT = 64  # bytes, so that jax can take an array as it lies
HEADER = 4096  # bytes at the beginning of a file
# glibc gives what a thread frees back to the kernel, which zeroes it for the next picture; this much
# it keeps.  A third of the time of a cached row.
KEPT = {"MALLOC_TOP_PAD_": str(64 << 20)}
# Each of these goes with the number of a file.  A file goes along too when it is new.
MESSAGE = struct.Struct("<cI")
BATCH, ERROR, TAKEN, FREE = b"B", b"E", b"T", b"F"


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
        self._processes, self._sockets, self._memory, self._turn = [], [], {}, 0
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
        kind, number, files = _receive(self._sockets[i])
        if kind == BATCH:
            self._turn += 1
            if files:
                self._memory[i, number] = _map(*files)
                os.close(*files)
            owner = np.frombuffer(self._memory[i, number], np.uint8)
            # All arrays of the batch are views of this one, and whatever uses them keeps it alive.
            weakref.finalize(owner, _tell, self._sockets[i], FREE, number).atexit = False
            _tell(self._sockets[i], TAKEN, number)
            return _arrays(owner)
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
    added = {name: value for name, value in KEPT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(theirs, make, numbers, threads, ahead):
    for notice in IGNORED:
        signal.signal(notice, signal.SIG_IGN)
    allowed, blocks = threading.Semaphore(ahead), Blocks()
    threading.Thread(target=_listen, args=(theirs, allowed, blocks.free), daemon=True).start()
    try:
        batches = in_threads(functools.partial(make, allocate=blocks), numbers, threads, 0)
        while True:
            allowed.acquire()
            block = next(batches)
            _send(theirs, BATCH, block.number, block.file)
    except BaseException:  # SystemExit too
        _send(theirs, ERROR, 0, _file(traceback.format_exc().encode()))
    os._exit(1)


def _listen(theirs, allowed, free):
    while message := _receive(theirs):
        kind, number, _ = message
        if kind == TAKEN:
            allowed.release()
        elif kind == FREE:
            free.put(number)
        else:
            os._exit(0)  # the parent closed its end, or is no more


def _send(theirs, kind, number, file):
    try:
        socket.send_fds(theirs, [MESSAGE.pack(kind, number)], [] if file is None else [file])
    except OSError:
        os._exit(0)  # as above
    if file is not None:
        os.close(file)


def _tell(ours, kind, number):
    with contextlib.suppress(OSError):  # closed, or the worker is gone, as its next turn will tell
        ours.sendall(MESSAGE.pack(kind, number))


def _receive(end):
    """(kind, number, [descriptor]); the kind is b"" when the other end is gone."""
    try:
        message, files, _, _ = socket.recv_fds(end, MESSAGE.size, 1)
    except ConnectionError:
        message = b""
    return (*MESSAGE.unpack(message), files) if message else (b"", 0, [])


def _file(content=b""):
    """Descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("sana_jax")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.pwrite(file, content, 0)
    return file


def _map(file):
    return mmap.mmap(file, os.fstat(file).st_size)


class Block(dict):
    """{name: array of 0} in an anonymous file, so that what is put into them is where it has to be."""

    def __init__(self, memory, number, file):
        super().__init__(_arrays(memory))
        self.number, self.file = number, file  # the descriptor of a new file, or None


class Blocks:
    """blocks(layout) is a Block; files whose numbers come back in `free` are used again."""

    def __init__(self):
        self.free, self._memory, self._lock = queue.SimpleQueue(), [], threading.Lock()

    def __call__(self, layout):
        header, end = _header(layout)
        try:
            number = self.free.get_nowait()
        except queue.Empty:
            with self._lock:
                number = len(self._memory)
                self._memory.append(np.zeros(0, np.uint8))
        memory, file = self._memory[number], None
        if memory.size < end:
            file = _file()
            os.ftruncate(file, end)
            memory = self._memory[number] = np.frombuffer(_map(file), np.uint8)
        else:
            memory[HEADER:end] = 0
        memory[:HEADER] = np.frombuffer(header, np.uint8)
        return Block(memory, number, file)


def _header(layout):
    """(JSON that says where each array is, the end of the last)."""
    places, end = [], HEADER
    for name, (shape, kind) in layout.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + np.dtype(kind).itemsize * math.prod(shape)
        places.append((name, np.dtype(kind).str, shape, start, end))
    return json.dumps(places).encode().ljust(HEADER), end


def _arrays(memory):
    """{name: array}, views of the memory, uint8 [bytes], that begins with their header."""
    places = json.loads(memory[:HEADER].tobytes())
    return {name: memory[start:end].view(kind).reshape(shape) for name, kind, shape, start, end in places}
