"""What the processes of one job tell each other, outside of compiled programs.

Every function is a meeting: all processes have to come, in the same order.  Alone, a process meets
nobody and nothing is sent.
"""

import itertools

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sana_jax.errors import InputError

LONGEST = 1024  # bytes of a text
_meetings = itertools.count()  # a name is good for one meeting


def from_first(text):
    """What text() says in process 0, in every process; the others do not call it."""
    said = text() if jax.process_index() == 0 else ""
    if jax.process_count() == 1:
        return said
    row = np.zeros(LONGEST, np.uint8)
    data = np.frombuffer(said.encode()[:LONGEST], np.uint8)
    row[: data.size] = data
    return bytes(multihost_utils.broadcast_one_to_all(row)).rstrip(b"\0").decode(errors="replace")


def the_same(what, digest):
    """`digest`, hexadecimal, if all processes give the same.

    Raises InputError, in every process: `what` differs between them.
    """
    if jax.process_count() > 1:
        mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
        rows = multihost_utils.process_allgather(mine)
        if others := [i for i, row in enumerate(rows) if (row != rows[0]).any()]:
            raise InputError(f"{what} of process {others[0]} are not those of process 0; all must see the same")
    return digest


def together(work, kinds):
    """work(), or in every process the worst error of any: the later of `kinds`, else what was raised.

    Without it a process that fails alone leaves the others in a collective that nobody else enters.
    Args:
      kinds: classes of errors that others may raise in its place; their last is what any other error becomes.
    """
    value, error, code = None, None, 0
    try:
        value = work()
    except Exception as raised:
        error = raised
        code = 1 + next((i for i, kind in enumerate(kinds) if isinstance(raised, kind)), len(kinds) - 1)
    codes = [code] if jax.process_count() == 1 else multihost_utils.process_allgather(np.int32(code)).tolist()
    worst = max(codes)
    if error is not None and code == worst:
        raise error
    if worst:
        raise kinds[worst - 1](f"process {codes.index(worst)} failed, its log says why")
    return value


def meet(name, seconds=7200):
    """Goes on when every process is here; for what takes one of them longer than another.

    Goes through the coordination service, which waits as long as it is told to: the first collective of
    a program gives up after half a minute on CPU, when another process still compiles it.
    """
    if jax.process_count() > 1:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"{name} {next(_meetings)}", timeout_ms=seconds * 1000)
