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
import json
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
    """Iterator over make(number) of the range `numbers`, made in `count` processes.

    Args:
      make: number -> {name: array}; it and all that it holds can be pickled, and come from modules
        that can be imported: the main module is not there in a worker.
      threads: in each process.
      ahead: finished batches that wait, of all processes together.
    """

    def __init__(self, make, numbers, count, threads, ahead):
        self._processes, self._sockets, self._turn = [], [], 0
        # Before Python would join the workers at its exit, in case nobody has closed this.
        self._finalizer = util.Finalize(self, _end, (self._processes, self._sockets), exitpriority=10)
        context = multiprocessing.get_context("spawn")
        with _starting():
            for i in range(count):
                ours, theirs = socket.socketpair()
                share = numbers[i::count]
                process = context.Process(
                    target=_work, args=(theirs, make, share, threads, max(1, ahead // count)), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._sockets.append(ours)

    def __iter__(self):
        return self

    def __next__(self):
        i = self._turn % len(self._sockets)
        kind, files = _receive(self._sockets[i])
        if kind == BATCH:
            self._turn += 1
            with contextlib.suppress(OSError):  # it died since; its next turn will tell
                self._sockets[i].sendall(TAKEN)
            return _unpack(*files)
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
        batches = in_threads(make, numbers, threads, 0)
        while True:
            allowed.acquire()
            _send(theirs, BATCH, _pack(next(batches)))
    except BaseException:  # SystemExit too: grain's way would be to leave without a word
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


def _pack(batch):
    """Descriptor of a file with the arrays: length of a JSON header, the header, aligned arrays."""
    header = json.dumps([(name, array.dtype.str, array.shape) for name, array in batch.items()]).encode()
    offsets, end = _offsets(8 + len(header), [array.nbytes for array in batch.values()])
    file = _file()
    os.ftruncate(file, end)
    memory = mmap.mmap(file, end)
    memory[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
    for array, offset in zip(batch.values(), offsets):
        np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)[...] = array
    return file


def _unpack(file):
    """{name: array} of `_pack`, in place; the memory is freed with the last of the arrays."""
    memory = mmap.mmap(file, os.fstat(file).st_size)
    os.close(file)
    length = int.from_bytes(memory[:8], "little")
    header = [(name, np.dtype(kind), shape) for name, kind, shape in json.loads(memory[8 : 8 + length])]
    sizes = [int(np.prod(shape)) for _, _, shape in header]
    offsets, _ = _offsets(8 + length, [kind.itemsize * size for (_, kind, _), size in zip(header, sizes)])
    return {
        name: np.frombuffer(memory, kind, size, offset).reshape(shape)
        for (name, kind, shape), size, offset in zip(header, sizes, offsets)
    }


def _offsets(start, sizes):
    """(where each of the arrays begins, the end of the last)."""
    offsets = []
    for size in sizes:
        offsets.append(-(-start // ALIGNMENT) * ALIGNMENT)
        start = offsets[-1] + size
    return offsets, start
