"""One job in a run folder: a lock that dies with its process, whatever ends it."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket


from sana_jax.errors import InputError
from sana_jax.training.processes import from_first

NAME = "LOCK"


@contextlib.contextmanager
def locked(directory):
    """Holds `directory` (made if absent, private) for this job; process 0 locks for all of its processes.

    The lock is flock's: the kernel drops it when the holder is gone, kill -9 included, so none is ever stale.
    Raises InputError, in every process: another job holds it (its pid and host are named), or the folder
    cannot be made or written.
    """
    with contextlib.ExitStack() as held:

        def problem():
            try:
                held.enter_context(_lock(pathlib.Path(directory)))
            except InputError as error:
                return str(error)
            return ""

        if found := from_first(problem):
            raise InputError(found)
        yield


def _lock(directory):
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = open(directory / NAME, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"workdir={str(directory)!r}: cannot be written ({error.strerror}, errno {error.errno})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(1000)
        file.close()
        raise InputError(f"workdir={str(directory)!r}: another job holds it ({_words(holder)}); stop that one first, or choose another folder") from error
    file.seek(0)
    file.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file


def _words(holder):
    try:
        found = json.loads(holder)
        return f"pid {found['pid']} on host {found['host']}"
    except (ValueError, KeyError, TypeError):  # taken a moment ago, its name not yet written
        return "it does not say which"
