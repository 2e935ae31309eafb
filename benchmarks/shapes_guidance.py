"""What guidance and flow shift do, on the same noise, for docs/guidance.md.

    python -m benchmarks.shapes_guidance --output DIR [--model DIR] [--images-per-category 60]

The score of GenEval-Shapes at guidance scales 1 to 8 and at flow shifts 1 to 6, each with what the model
does else, and the paired difference to the model's own value.
Writes DIR/shapes_guidance.json, the tables of docs/guidance.md and docs/guidance.svg; goes on where it was.
"""

import pathlib
import sys

from benchmarks import environment, plots
from benchmarks.shapes_runs import arguments, command, docs_of, heading, interval, markdown, open_runs, write_between

SWEEPS = {
    "guidance_scale": (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "flow_shift": (1.0, 2.0, 3.0, 4.0, 6.0),
}
TITLES = {"guidance_scale": "Guidance scale", "flow_shift": "Flow shift"}


def run(argv=None, load=None):
    args = arguments(__doc__).parse_args(argv)
    runs = open_runs(args, load)
    own = {"guidance_scale": runs.pipeline.defaults["guidance_scale"], "flow_shift": runs.pipeline.flow_shift}
    steps = 2 if args.smoke else runs.pipeline.defaults["steps"]
    path, rows, tables, panels = pathlib.Path(args.output) / "shapes_guidance.json", [], [], []
    reference = runs.paint(steps=steps, **own)
    for name, values in SWEEPS.items():
        scores, lines = [], []
        for value in sorted({*(values[:2] if args.smoke else values), own[name]}):
            one = runs.paint(steps=steps, **own | {name: value})
            score, difference = runs.score(one), runs.difference(one, reference)
            rows.append({"name": name, "value": value, "score": score._asdict(), "difference": difference._asdict()})
            environment.write_result(path, rows, settings=runs.settings, images=len(runs.lines), own=own, steps=steps)
            lines.append([f"{value:g}{' (the model)' * (value == own[name])}", interval(score), interval(difference)])
            scores.append((value, *score))
        tables.append(markdown([TITLES[name].lower(), "score", "difference to the model's own"], lines))
        panels.append(plots.Panel(TITLES[name], TITLES[name].lower(), "score", (plots.Series("", tuple(scores)),)))
    if docs := docs_of(args):
        told = f"{heading(runs)} {steps} steps of Flow-DPM-Solver; the other of the two as the model has it."
        page = "\n\n".join([told, "![score by guidance scale and by flow shift](guidance.svg)", *tables])
        write_between(docs / "guidance.md", "shapes_guidance", page)
        (docs / "guidance.svg").write_text(plots.svg(panels), encoding="utf-8")
    return 0


main = command("shapes_guidance", run)

if __name__ == "__main__":
    sys.exit(main())
