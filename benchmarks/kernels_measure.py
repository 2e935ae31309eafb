"""What `benchmarks.kernels` does with one case: draws, compiles, checks and times it."""

import concurrent.futures
import time

from benchmarks import environment, kernels_timing, kernels_tune
from benchmarks.kernels_cases import OPS, Case

import jax

from tests.pallas_kernels import accuracy

TORCH = ("eager", "compiled")


def build(case, implementation, given, book):
    """{pass: (compiled program of many calls, how many)}; tells `book` how long it took."""
    start = time.perf_counter()
    if implementation == "upstream":
        from benchmarks import kernels_upstream

        passes = {"forward": kernels_upstream.forward}
    else:
        passes = case.passes(case.function(implementation))
    found = {}
    for name, fn in passes.items():
        copies = kernels_timing.copies(case.traffic()[name])
        found[name] = kernels_timing.chained(jax.jit(fn), copies).lower(given).compile(), copies
    book.compiling[case.op, implementation] = time.perf_counter() - start
    return found


def draw(case):
    """As many sets as the passes take in turn."""
    first = case.draw(0)
    copies = kernels_timing.copies(case.traffic()["forward"])
    count = kernels_timing.sets(sum(a.nbytes for a in jax.tree.leaves(first)), copies)
    return jax.block_until_ready([first, *(case.draw(i) for i in range(1, count))])


def times(name, time_one, given):
    return {f"{name}_{key}": value for key, value in kernels_timing.cold_and_warm(time_one, given).items()}


def jax_row(case, building, given, want):
    """Times of one implementation and errors of the last of its passes."""
    row, right = {}, []
    for name, (run, copies) in building.result().items():
        row |= case.judge(run(given)[0], want)  # of the first set
        right.append(row["right"])
        row |= times(name, lambda sets: kernels_timing.timed(run, copies, sets), given)
    return row | {"right": all(right)}


def torch_row(case, compiled, given, want):
    from benchmarks import kernels_torch

    row, given = {}, [kernels_torch.tensors(one) for one in given]
    for name, fn in kernels_torch.passes(case, compiled).items():
        if name == "both":
            row |= case.judge(kernels_torch.arrays(fn(*given[0])), want)
        copies = kernels_timing.copies(case.traffic()[name])
        row |= times(name, lambda sets: kernels_timing.torch_timed(fn, copies, sets), given)
    return row


def measure(case, implementations, book, pool):
    """A row for each implementation of one case."""
    base = {"op": case.op, "tokens": case.tokens, "dtype": case.dtype, "auto": case.auto()}
    base |= {f"{name}_floor_us": round(moved / book.more["gbs"] / 1e3, 2) for name, moved in case.traffic().items()}
    implementations = [i for i in implementations if i != "upstream" or case.op == "linear_attention"]

    def prepare():
        given = draw(case)
        return given, case.truth(given[0])

    if run := [i for i in implementations if not book.refusal(case.op, i)]:
        with book.clock.spending("jax"):
            prepared = pool.submit(prepare)
            if prepared.exception() is None:  # which each row says otherwise
                # Compiled side by side, timed alone.
                building = {i: pool.submit(build, case, i, prepared.result()[0], book) for i in run if i not in TORCH}
                concurrent.futures.wait(building.values())
    for name in implementations:

        def work():
            given, want = prepared.result()
            if name in TORCH:
                row = torch_row(case, name == "compiled", given, want)
            else:
                row = jax_row(case, building[name], given, want)
            shares = {w: row[f"{w}_us"] for w in case.traffic() if f"{w}_us" in row}
            return row | {f"{w}_share": round(base[f"{w}_floor_us"] / us, 3) for w, us in shares.items()}

        book.add(base | {"implementation": name}, work)
    book.write()


def correctness(cases, implementations, book):
    """A row of errors alone for each implementation of each case."""
    jit = jax.jit if jax.default_backend() == "gpu" else accuracy.quickly_compiled
    for case in cases:
        base = {"op": case.op, "tokens": case.tokens, "dtype": case.dtype}
        given = case.draw(0)
        want = case.truth(given)
        for name in implementations:
            fn = jit(case.passes(case.function(name))["both"])
            book.add(base | {"implementation": name}, lambda: case.judge(fn(*given), want))
    book.write()


def tune(ops, sizes, tokens, dtype, book):
    """Makes the best tiles found for each operation those that everything after it compiles with.

    They are sought with the Pallas kernels, which share their tiles with the jax-triton ones.
    """
    device = jax.devices()[0].device_kind
    forms = {OPS[op].name: op for op in reversed(ops)}  # of an operation the first form: they share their tiles
    clock, each = book.clock, book.clock.shares["tune"] * book.clock.seconds / len(forms)
    for i, (name, op) in enumerate(forms.items()):
        case = Case(op, tokens, sizes, dtype)
        copies = kernels_timing.copies(case.traffic()["both"])
        with clock.spending("tune"):
            given = draw(case)
            want = case.truth(given[0])

        def tried(tiles):
            def work():
                kernels_tune.install(op, device, dtype, case.width(), tiles)
                run = kernels_timing.chained(jax.jit(case.passes(case.function("pallas"))["both"]), copies)
                return case.judge(run(given)[0], want) | kernels_timing.timed(run, copies, given)

            with clock.spending("tune"):
                return environment.attempt({}, work)

        def left():
            return clock.left("tune") and clock.spent["tune"] < (i + 1) * each

        best, rows, finished = kernels_tune.climb(case.tiles(), tried, left)
        kernels_tune.install(op, device, dtype, case.width(), best)
        book.more["tuned"].append({"op": name, "tiles": best, "finished": finished, "tried": rows})
