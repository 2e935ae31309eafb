"""The GPU kernels against everything else: right, and how fast, in one run.

    python -m benchmarks.kernels --output DIR [--seconds 470] [--tune] [--model 1.6B|0.6B|DC-AE] [--images N]

For each operation of a model in bfloat16, a transformer's at 512 to 32768 tokens of a guided pair, the DC-AE's at
those of its stages for one image of 512 and of 1024 px: PyTorch eager and compiled, XLA with the library's
operations (plain), the XLA fast path, the kernels in Pallas and in Triton, and, for attention, the published
Triton algorithm (upstream); forward, forward and backward together (both), and the difference of the two
(backward).  Times are of one call, of 4 to 48 in one program or one CUDA graph, each on another of several sets of
random arguments, more than caches hold; `warm` takes one set again and again, as within a block.  What lies between
two kernels of a program counts, where it is not hidden.  The floor moves each argument and result once, as fast as
this machine copies.

Errors are against float64, of the very programs that are timed.  The exit status is 1 if an implementation of
ours is wrong or fails.  What did not fit into --seconds is said to be not run.

--tune first looks for better tiles, where there are none yet for this card, and writes DIR/tiles/<operation>.json:
tiles and rows of `auto`, of what is right and wins, to be copied over pallas_kernels/<operation>/tiles.json before
the next model is measured, which shares the tiles.  What there is is written after each operation and size.

Without a GPU, or with --smoke: the errors alone, at small sizes and with the kernels interpreted.
"""

import argparse
import concurrent.futures
import importlib.util
import pathlib

from benchmarks import environment, kernels_measure, kernels_timing, kernels_tune
from benchmarks.kernels_cases import MODELS, OPS, OURS, TOY, Case, cases, tuned

IMPLEMENTATIONS = ("xla", "pallas", "jax_triton", "plain", "upstream", "eager", "compiled")
SHARES = {"tune": 0.35, "jax": 0.65, "eager": 0.2, "compiled": 0.4}  # each a limit; the whole is one too
SLOW = 30  # seconds; XLA may try out library convolutions for longer than all else takes
TRITON = ("jax_triton", "triton")
NEEDS = {"jax_triton": TRITON, "upstream": TRITON, "eager": ("torch",), "compiled": ("torch", "triton")}
SHOWN = ("op", "width", "tokens", "dtype", "implementation", "forward_us", "backward_us", "both_us", "forward_error",
         "gradient_error", "right", "note", "error")  # fmt: skip


class Book:
    """Rows of a run, shown as they come."""

    def __init__(self, output, clock):
        self.path, self.clock, self.rows = pathlib.Path(output) / "kernels.json", clock, []
        self.more = {"tuned": []}  # what else is written
        self.compiling = {}  # (operation, implementation): seconds, of the size before

    def kind(self, implementation):
        return implementation if implementation in self.clock.shares else "jax"

    def refusal(self, op, implementation):
        """Why it is not run now: a note, or None."""
        missing = [name for name in NEEDS.get(implementation, ()) if importlib.util.find_spec(name) is None]
        if missing:
            return f"not there: {' and '.join(missing)}"
        if not self.clock.left(self.kind(implementation)):
            return "not run: no time left"
        if (seconds := self.compiling.get((op, implementation), 0)) > SLOW:
            return f"not run: compiling another size took {seconds:.0f} s"
        return None

    def add(self, row, work):
        """Runs work() -> dict, unless that is refused, and keeps the row in any case."""
        if note := self.refusal(row["op"], row["implementation"]):
            row |= {"note": note}
        else:
            with self.clock.spending(self.kind(row["implementation"])):
                row = environment.attempt(row, work)
        self.rows.append(row)
        print("  ".join(f"{name} {row[name]}" for name in SHOWN if name in row), flush=True)

    def write(self):
        """Writes all rows; nvidia-smi is asked for clocks and power, so not after each."""
        environment.write_result(self.path, self.rows, **self.more)

    def failed(self):
        """The rows that make the run fail: ours, run, and not right."""
        ours = (row for row in self.rows if row["implementation"] in OURS and "note" not in row)
        return [row for row in ours if not row.get("right")]


def summary(rows):
    """A line for each operation, pass and size: microseconds, or in a word why there are none."""
    found = {}
    for row in rows:
        for i, which in enumerate(kernels_timing.PASSES if "forward_floor_us" in row else ()):
            line = found.setdefault((list(OPS).index(row["op"]), i, row["width"], row["tokens"]), {})
            line |= {name: row[name] for name in ("op", "width", "tokens")}
            line |= {"pass": which, "floor": row[f"{which}_floor_us"]}
            missing = "failed" if "error" in row else row.get("note", "").split(":")[0]
            line[row["implementation"]] = row.get(f"{which}_us", missing)
            line[f"warm {row['implementation']}"] = row.get(f"{which}_warm_us")
    return [found[key] for key in sorted(found)]


def on_a_gpu(args, timed, book):
    """Checks in float32, tunes, if asked to, and times the cases."""
    import jax

    device, dtype = jax.devices()[0].device_kind, timed[0].dtype

    def save():
        book.write()
        if args.tune:
            folders = dict.fromkeys(case.table.folder for case in timed)
            kernels_tune.write(args.output, folders, [row for row in book.rows if "auto" in row], device, dtype)

    ours = [name for name in args.implementations if name in OURS]
    book.more |= {"copy": (copy := kernels_timing.bandwidth()), "gbs": copy["gbs"]}
    first = {case.op: case for case in reversed(timed)}.values()  # of each operation the most important
    kernels_measure.correctness([case._replace(tokens=512, dtype="float32") for case in first], ours, book)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        if args.tune:
            kernels_measure.tune(tuned(args.model, dtype, args.ops or OPS, args.images), book, pool, save)
        for case in timed:
            kernels_measure.measure(case, args.implementations, book, pool)
            save()


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=470, help="no measurement starts after this long")
    parser.add_argument("--tune", action="store_true", help="look for better tiles; write tiles and rows of auto")
    parser.add_argument("--model", default="1.6B", choices=MODELS, help="whose operations and sizes")
    parser.add_argument("--images", type=int, help="at a time; 2 of a transformer, a guided pair, 1 of the DC-AE")
    parser.add_argument("--ops", type=listed(OPS), help="of those of the model, separated by ;")
    parser.add_argument("--implementations", type=listed(IMPLEMENTATIONS), default=IMPLEMENTATIONS, help="likewise")
    parser.add_argument("--tokens", type=lambda text: [*map(int, text.split(";"))], help="of all images, likewise")
    args = parser.parse_args(argv)
    import jax

    book = Book(args.output, kernels_timing.Clock(args.seconds, SHARES))
    book.more["device"] = jax.devices()[0].device_kind
    environment.LIMIT = 1.0
    if args.smoke or jax.default_backend() != "gpu":
        print("No GPU is used: errors alone, of small sizes and of interpreted kernels.  Times: not measured.")
        small = [Case(op, 200, TOY, dtype) for op in args.ops or OPS for dtype in ("float32", "bfloat16")]
        kernels_measure.correctness(small, ("plain", "xla", "pallas_interpret"), book)
    else:
        timed = cases(args.model, "bfloat16", args.ops or OPS, args.tokens, args.images)
        if missing := [op for op in args.ops or () if op not in {case.op for case in timed}]:
            parser.error(f"--ops {';'.join(missing)}: not in the {args.model}")
        on_a_gpu(args, timed, book)
        lines = summary(book.rows)
        shown = ("op", "pass", "width", "tokens", "floor", *args.implementations)
        print(environment.table(lines, shown), "", "Microseconds of one call; now one set again and again:", sep="\n")
        print(environment.table(lines, (*shown[:5], *(f"warm {name}" for name in args.implementations))))
    book.write()
    for row in book.failed():
        print("WRONG:", {name: row[name] for name in SHOWN if name in row})
    return 1 if book.failed() else 0


def listed(known):
    """A parser of names separated by semicolons."""

    def parse(text):
        names = text.split(";")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
