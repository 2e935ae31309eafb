"""How many steps are enough: Flow-DPM-Solver and Euler on the same noise, for docs/solver.md.

    python -m benchmarks.shapes_solver --output DIR [--model DIR] [--images-per-category 60]
        [--images-per-promise 200]

The reference is Flow-DPM-Solver with 200 steps.  For every sampler and number of steps: the score of
GenEval-Shapes, its paired difference to the reference, and how far the latents are from the reference's.
The differences to Euler's 100 steps that are promised are of more pictures of each category, the first of
which are those of the table.  Writes DIR/shapes_solver.json, the table of docs/solver.md and docs/solver.svg; goes on where it was.
"""

import pathlib
import sys

from benchmarks import environment, plots
from benchmarks.shapes_runs import arguments, command, docs_of, heading, interval, markdown, open_runs, write_between
from sana_jax.errors import require_positive

DPM, EULER = "flow-dpm-solver", "flow-euler"
STEPS = (4, 8, 10, 14, 20, 28, 50)
REFERENCE = 200
EXACT = (EULER, 100)
PROMISED = {(DPM, 20): 0.02, (DPM, 14): 0.03}  # |difference to EXACT|, all of its interval
NAMES = {DPM: "Flow-DPM-Solver", EULER: "Euler"}


def ways(smoke):
    """(sampler, steps), the reference first."""
    if smoke:
        return [(DPM, 4), (EULER, 3), (DPM, 2), (EULER, 2)]
    return [(DPM, REFERENCE), EXACT, *((s, n) for n in STEPS for s in (DPM, EULER))]


def promises(smoke):
    """{way: bound} and the way that they are compared to."""
    return ({(DPM, 2): 1.0}, (EULER, 3)) if smoke else (PROMISED, EXACT)


def run(argv=None, load=None):
    parser = arguments(__doc__)
    parser.add_argument("--images-per-promise", type=int, default=200, help="of each category, for what is promised")
    args = parser.parse_args(argv)
    require_positive("images_per_promise", args.images_per_promise)
    runs, rows, painted = open_runs(args, load), [], {}
    path = pathlib.Path(args.output) / "shapes_solver.json"
    order = ways(args.smoke)
    for sampler, steps in order:
        painted[sampler, steps] = one = runs.paint(sampler=sampler, steps=steps)
        reference = painted[order[0]]
        rows.append(
            {"sampler": sampler, "steps": steps, "score": runs.score(one)._asdict()}
            | {"difference": runs.difference(one, reference)._asdict(), "latent_error": runs.error(one, reference)}
        )
        environment.write_result(path, rows, settings=runs.settings, images=len(runs.lines))
    many = open_runs(args, lambda model: runs.pipeline, max(args.images_per_promise, args.images_per_category))
    bounds, exact = promises(args.smoke)
    compared = {way: many.paint(sampler=way[0], steps=way[1]) for way in (exact, *bounds)}
    kept = []
    for way, bound in bounds.items():
        found = many.difference(compared[way], compared[exact])
        kept.append(
            {"sampler": way[0], "steps": way[1], "bound": bound, "images": len(many.lines), **found._asdict()}
            | {"kept": max(abs(found.low), abs(found.high)) <= bound}
        )
    environment.write_result(path, rows, settings=runs.settings, images=len(runs.lines), promises=kept, exact=exact)
    if docs := docs_of(args):
        write(docs, runs, painted, kept, exact)
    return int(not all(promise["kept"] for promise in kept))


def write(docs, runs, painted, promised, exact):
    """The table and the plot, from the `Painted` of each (sampler, steps), the reference first, and what was promised."""
    reference, *others = painted
    by_steps = sorted(painted, key=lambda way: (way[1], way[0]))
    lines = [
        [
            NAMES[sampler], steps, interval(runs.score(painted[sampler, steps])),
            interval(runs.difference(painted[sampler, steps], painted[reference])),
            f"{runs.error(painted[sampler, steps], painted[reference]):.4f}",
        ]
        for sampler, steps in by_steps
    ]  # fmt: skip
    table = markdown(["sampler", "steps", "score", "difference to the reference", "latent error"], lines)
    kept = [
        f"{NAMES[p['sampler']]}, {p['steps']} steps, less {NAMES[exact[0]]}, {exact[1]} steps, {p['images']} pictures: "
        f"{p['score']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}], {'inside' if p['kept'] else 'NOT inside'} +-{p['bound']}"
        for p in promised
    ]
    told = f"{heading(runs)} The reference is {NAMES[reference[0]]} with {reference[1]} steps."
    write_between(docs / "solver.md", "shapes_solver", "\n\n".join([told, "![score and latent error by steps](solver.svg)", table, *kept]))

    def series(value):
        return tuple(
            plots.Series(NAMES[s], tuple(value(n, painted[s, n]) for t, n in sorted(others) if t == s)) for s in NAMES
        )

    scores = series(lambda n, one: (n, *runs.score(one)))
    errors = series(lambda n, one: (n, max(runs.error(one, painted[reference]), 1e-6)))
    panels = [
        plots.Panel("Score of GenEval-Shapes", "steps", "score", scores, log="x"),
        plots.Panel("Distance of latents to the reference", "steps", "relative rms", errors, log="xy"),
    ]
    (docs / "solver.svg").write_text(plots.svg(panels), encoding="utf-8")


main = command("shapes_solver", run)

if __name__ == "__main__":
    sys.exit(main())
