"""A run that hangs says where, and ends."""

import contextlib
import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 5


class Watchdog:
    """Prints the stacks of all threads when no `beat` came for `seconds`, and exits after twice that.

        with Watchdog(600) as watchdog:
            for ...:
                step()
                watchdog.beat()

    Counts from the beginning.  A thread of Python keeps watch; should that one be stopped too,
    because something holds the interpreter's lock, faulthandler's own thread prints and exits (code 1)
    after three times `seconds`.  None or 0 seconds: no watch.
    """

    def __init__(self, seconds, out=None):
        self.seconds, self._out = seconds, out or sys.stderr
        self._last, self._told, self._done = None, False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self.seconds:
            self.beat()
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        if self.seconds:
            self._thread.join()

    def beat(self):
        """Says that the run is alive."""
        self._last, self._told = time.monotonic(), False

    @contextlib.contextmanager
    def paused(self):
        """Does not count what is slow and known to end, such as a compilation."""
        self._last = None
        try:
            yield
        finally:
            self.beat()

    def _watch(self):
        try:
            while not self._done.wait(min(self.seconds / 10, 1.0)):
                self._arm()
                last = self._last
                quiet = 0.0 if last is None else time.monotonic() - last
                if quiet > self.seconds and not self._told:
                    self._told = True
                    self._say(f"nothing happened for {quiet:.0f} s; all threads:")
                    faulthandler.dump_traceback(self._out, all_threads=True)
                if quiet > 2 * self.seconds:
                    self._say(f"nothing happened for {quiet:.0f} s: giving up, exit code {EXIT_CODE}")
                    os._exit(EXIT_CODE)  # what hangs would keep a polite exit waiting
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self):
        faulthandler.dump_traceback_later(3 * self.seconds, exit=True, file=self._out)

    def _say(self, text):
        print(f"watchdog: {text}", file=self._out, flush=True)
