"""Times of short kernels: many calls in one program, over more data than caches hold, and the copy to compare with."""

import contextlib
import time

from benchmarks import environment
from benchmarks.profile_step import chained, timed

import jax
import jax.numpy as jnp

COLD = 1 << 30  # bytes of all arguments that are taken in turn: several times the largest cache
MOVED = 320 << 20  # bytes that one program is to move at least
COPIES = (4, 48)
PASSES = ("forward", "backward", "both")


class Clock:
    """Seconds for the whole, and a share of them for each kind of work.

    Shares may add up to more than 1: each is a limit, and the whole is one too.
    """

    def __init__(self, seconds, shares, now=time.perf_counter):
        self.now, self.seconds, self.shares = now, seconds, shares
        self.start, self.spent = now(), dict.fromkeys(shares, 0.0)

    def left(self, kind):
        """Whether more work of this kind may start."""
        return self.now() - self.start < self.seconds and self.spent[kind] < self.shares[kind] * self.seconds

    @contextlib.contextmanager
    def spending(self, kind):
        start = self.now()
        try:
            yield
        finally:
            self.spent[kind] += self.now() - start


def copies(moved):
    """How many calls one program makes, of a function that moves so many bytes."""
    return min(max(COPIES[0], -(-MOVED // moved)), COPIES[1])


def sets(argument_bytes, copies):
    """How many sets of arguments are taken in turn."""
    return min(max(2, -(-COLD // argument_bytes)), copies)


def bandwidth():
    """{"gbs", ...}: bytes read and written in a second by copies of 1 GiB."""
    given = [(jax.random.normal(jax.random.key(i), (1 << 29,), jnp.bfloat16),) for i in range(2)]
    row = timed(chained(lambda x: -x, 4), 4, given)
    return row | {"gbs": 2 * given[0][0].nbytes / row["us"] / 1e3}


def cold_and_warm(time_one, given):
    """{"us", "warm_us", ...}: over all sets in turn, and over the first alone, which then lies in the cache.

    time_one: function of the sets that gives {"us", "p10", "p90", "repeats"} of one call.
    """
    row, warm = time_one(given), time_one([given[0]] * len(given))
    return {name: row[name] for name in ("us", "p10", "p90", "repeats")} | {"warm_us": warm["us"]}


def backward(row):
    """Of a row with numbers of "forward" and "both": those of "backward", what the second takes more than the first.

    Not timed alone: its inputs are what a forward pass keeps, which only a program of both has.
    """
    kinds = [kind for kind in ("us", "warm_us", "floor_us") if {f"forward_{kind}", f"both_{kind}"} <= set(row)]
    return {f"backward_{kind}": round(row[f"both_{kind}"] - row[f"forward_{kind}"], 2) for kind in kinds}


def torch_timed(fn, copies, given):
    """As `profile_step.timed`, of a PyTorch function of a set: one CUDA graph of all calls, where there is CUDA."""
    import torch

    def run():
        return [fn(*given[i % len(given)]) for i in range(copies)]

    if not torch.cuda.is_available():
        return per_call(environment.measure(run, wait=lambda _: None), copies)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is captured must have run before, on a stream of its own
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        kept = run()  # as long as results are kept, no call writes where another did
    row = environment.measure(graph.replay, wait=lambda _: torch.cuda.synchronize())
    del kept, graph
    torch.cuda.empty_cache()  # jax wants memory too
    return per_call(row, copies)


def per_call(row, copies):
    """Milliseconds of a program as microseconds of one of its calls."""
    times = {name: round(1e3 * row[key] / copies, 2) for name, key in (("us", "ms"), ("p10", "p10"), ("p90", "p90"))}
    return times | {"repeats": row["repeats"]}
