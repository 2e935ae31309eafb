"""Where the time of a run goes, from the clocks of one process."""

import collections
import contextlib
import time


class Clocks:
    """Seconds of the training loop, between one logged step and the next.

        clocks = Clocks(metrics.began, metrics.productive, peak=...)
        with clocks.apart("data"):
            batch = next(loader)
        ...
        clocks.step(images, flops)
        if step % every == 0:
            metrics.log(step, values, clocks.line())

    What is not `apart` is the step's own.  The host runs one step ahead of the device and then waits
    for it, so over several steps its clock is the device's.
    """

    def __init__(self, began=None, productive=0.0, peak=None, clock=time.monotonic, now=time.time):
        """Args:
        began: Unix time of the run's first start, its earlier processes included.
        productive: seconds of its steps before this process.
        peak: FLOP/s of all devices together, or None where it is not known.
        """
        self._clock, self._now = clock, now
        self._began = now() if began is None else began
        self._productive, self._peak = productive, peak
        self._since = clock()
        self._clear()

    def _clear(self):
        self._apart = collections.Counter()
        self._steps = self._images = 0
        self._flops = 0.0

    @contextlib.contextmanager
    def apart(self, name):
        """Seconds of this block are `name`'s; of a block inside another, the inner one's only."""
        before, start = self._apart.total(), self._clock()
        try:
            yield
        finally:
            inner = self._apart.total() - before
            self._apart[name] += self._clock() - start - inner

    def step(self, images, flops=None):
        """A step was started: rows of its global batch, and its floating-point operations or None."""
        self._steps += 1
        self._images += images
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def line(self, bad=None):
        """The clocks since the last line, as a dict; begins anew.

        images_per_second, seconds_per_step: of the whole time.
        mfu: operations of the model / (seconds * peak), or None.
        data_wait: share of the time in which the loop waited for a batch.
        apart: seconds in blocks, by name.
        productive_seconds: of steps, since the run began; steps that were lost and done again count once.
        goodput: these / wall_seconds, which go on while the run is down.
        bad: `bad`, records that were unusable, by reason.
        """
        now, since = self._clock(), self._since
        seconds = max(now - since, 1e-9)
        self._productive += max(seconds - self._apart.total(), 0.0)
        wall = max(self._now() - self._began, 1e-9)
        known = self._peak and self._flops is not None
        line = {
            "time": self._now(),
            "images_per_second": self._images / seconds,
            "seconds_per_step": seconds / self._steps if self._steps else None,
            "mfu": self._flops / seconds / self._peak if known else None,
            "data_wait": self._apart["data"] / seconds,
            "apart": dict(self._apart),
            "wall_seconds": wall,
            "productive_seconds": self._productive,
            "goodput": min(self._productive / wall, 1.0),
            "bad": dict(bad or {}),
        }
        self._since = now
        self._clear()
        return line
