"""SIGTERM and Ctrl-C as a request: save, then leave with exit code 0."""

import os
import signal
import sys
import threading
import traceback

import jax
from jax.experimental import multihost_utils

POLL_SECONDS = 0.1


class Preemption:
    """Turns signals into `requested`.

        with Preemption() as preemption:
            program = preemption.while_waiting(lowered.compile)
            for ...:
                step()
                if preemption.requested():
                    save(); break

    One process: our own handler.  One of many: jax.distributed.initialize has installed the runtime's
    handler for SIGTERM, which tells all processes and agrees on a step; ours would replace it, so SIGINT
    is only turned into SIGTERM.  A second Ctrl-C interrupts as always.
    """

    def __init__(self, log=None):
        self._log = log or (lambda text: print(text, file=sys.stderr, flush=True))
        self._signal, self._before, self._thread = None, {}, None
        self._asked = 0

    def __enter__(self):
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: self._pass_on}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._thread is not None and self._thread.is_alive():
            # A compilation cannot be stopped, and ending the interpreter under it crashes.
            done = isinstance(error, SystemExit) and not error.code
            if not done:
                traceback.print_exception(kind, error, trace)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if done else 1)

    def _note(self, number, _):
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _pass_on(self, *_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def requested(self):
        """Whether to save and stop behind this step; every process calls it once for every step.

        The runtime agrees on a number behind those that it has seen, and waits for exactly that one.  So
        these are calls, which go up by one from 1, in runs that go on and from one stage to the next.
        """
        self._asked += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._signal is not None

    def while_waiting(self, function, before_leaving=lambda: None):
        """function(), during which a request ends the process (SystemExit 0) instead of waiting for its end.

        `function` runs in a thread of its own: no `jax.set_mesh` of the caller reaches it.  `before_leaving`
        saves what would be lost.  One of many processes waits: it may not leave the others alone.
        """
        if jax.process_count() > 1:
            return function()
        outcome = {}

        def run():
            try:
                outcome["value"] = function()
            except BaseException as error:
                outcome["error"] = error

        self._thread = threading.Thread(target=run, name="while_waiting", daemon=True)
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if self._signal is not None and self._thread.is_alive():
                self._log(f"{signal.Signals(self._signal).name}: leaving")
                before_leaving()
                raise SystemExit(0)
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]
