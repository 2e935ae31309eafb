"""What `benchmarks.kernels` does with one case: draws, compiles, checks and times it."""

import concurrent.futures
import functools
import time

from benchmarks import environment, kernels_timing, kernels_tune

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
    base = case.named() | {"auto": case.auto()}
    base |= {f"{name}_floor_us": round(moved / book.more["gbs"] / 1e3, 2) for name, moved in case.traffic().items()}
    base |= kernels_timing.backward(base)
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
            row |= kernels_timing.backward(row)
            shares = {w: row[f"{w}_us"] for w in kernels_timing.PASSES if row.get(f"{w}_us", 0) > 0}
            return row | {f"{w}_share": round(base[f"{w}_floor_us"] / us, 3) for w, us in shares.items()}

        book.add(base | {"implementation": name}, work)


def correctness(cases, implementations, book):
    """A row of errors alone for each implementation of each case."""
    jit = jax.jit if jax.default_backend() == "gpu" else accuracy.quickly_compiled
    for case in cases:
        @functools.cache
        def prepared():
            given = case.draw(0)
            return given, case.truth(given)

        for name in implementations:

            def work():
                given, want = prepared()
                return case.judge(jit(case.passes(case.function(name))["both"])(*given), want)

            book.add(case.named() | {"implementation": name}, work)
    book.write()


def tune(groups, book, pool, save):
    """Makes the best tiles found those that everything after it compiles with; saves after each operation.

    They are sought with the Pallas kernels, which share their tiles with the jax-triton ones, and not where
    the table has some for this card: those are what its rows of `auto` were measured with.

    Args:
      groups: see `kernels_cases.tuned`.  Each gets a part of the time as large as its part of the cases.
      save: () -> None, writes what there is.
    """
    device, clock, due = jax.devices()[0].device_kind, book.clock, 0.0
    each = clock.shares["tune"] * clock.seconds / max(1, sum(map(len, groups.values())))
    for (folder, width), cases in groups.items():
        due += each * len(cases)
        row = {"op": folder, "width": width, "cases": [case.named() for case in cases]}
        if kernels_tune.has_tiles(folder, device, cases[0].dtype, width):
            row |= {"note": "not sought: the table has tiles of this card"}
        else:
            row = environment.attempt(row, lambda: sought(cases, device, book, pool, lambda: clock.spent["tune"] < due))
        book.more["tuned"].append(row)
        print("  ".join(f"{name} {row[name]}" for name in ("op", "width", "tiles", "note", "error") if name in row))
        save()


def sought(cases, device, book, pool, in_time):
    """{"tiles": the best found, "finished", "tried"} for cases that share them."""
    clock, case = book.clock, cases[0]
    start = case.tiles()

    def prepared(case):
        given = draw(case)
        return case, given, case.truth(given[0])

    def install(tiles):
        kernels_tune.install(case.op, device, case.dtype, case.width(), tiles)

    def compiled(case, given):
        copies = kernels_timing.copies(case.traffic()["both"])
        run = kernels_timing.chained(jax.jit(case.passes(case.function("pallas"))["both"]), copies)
        return run.lower(given).compile(), copies

    def tried(tiles):
        """Right and timed in every case; its time is the sum."""
        def work():
            install(tiles)
            runs = list(pool.map(lambda one: compiled(*one[:2]), ready))  # compiled side by side, timed alone
            rows = []
            for (case, given, want), (run, copies) in zip(ready, runs):
                rows.append(case.judge(run(given)[0], want) | kernels_timing.timed(run, copies, given))
            return {"us": round(sum(row["us"] for row in rows), 2), "right": all(row["right"] for row in rows), "of": rows}

        with clock.spending("tune"):
            return environment.attempt({}, work)

    def left():
        return clock.left("tune") and in_time()

    if not left():
        return {"note": "not sought: no time left"}
    with clock.spending("tune"):
        ready = [prepared(case) for case in cases]
    best, rows, finished = kernels_tune.climb(start, tried, left)
    install(best)
    return {"tiles": best, "finished": finished, "tried": rows}
