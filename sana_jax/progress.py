"""Steps as they happen, from inside a compiled program.

A program cannot hold a Python function without being compiled for it, so it gets a number, which is
data, and finds the function here when it runs.
"""

import contextlib
import itertools

import jax
import numpy as np

_numbers = itertools.count()
_listeners = {}


@contextlib.contextmanager
def listening(on_step, steps):
    """A number for `announced` that calls on_step(done, steps), or None for None.

    `on_step` is called with 0 to steps - 1 as the evaluations of the network begin, and with `steps`
    when the block ends well; the block has to wait for the program's result.  What `on_step` raises
    cannot stop the program, and is raised again behind it.
    """
    if on_step is None:
        yield None
        return
    number, raised = next(_numbers), []

    def call(step):
        try:
            if not raised:
                on_step(step, steps)
        except BaseException as error:
            raised.append(error)

    _listeners[number] = call
    try:
        yield np.uint32(number)
        jax.effects_barrier()
        call(steps)
    finally:
        del _listeners[number]
    if raised:
        raise raised[0]


def announced(velocity, listener):
    """`velocity`, whose every call at `t` is announced as step `t.step` to the listener of this number."""

    def wrapped(x, t):
        jax.debug.callback(_announce, listener, t.step)
        return velocity(x, t)

    return wrapped


def _announce(listener, step):
    if (call := _listeners.get(int(listener))) is not None:
        call(int(step))
