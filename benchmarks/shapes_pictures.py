"""The picture of README.md: the first prompt of each category of GenEval-Shapes with seeds 0 to 3, none chosen.

    python -m benchmarks.shapes_pictures --output docs [--model DIR]

Writes docs/shapes.png, a row for each category; + is what the prompt says, - is not.  Each is what
`sample.py PROMPT --seed N` paints, but for rounding.
"""

import pathlib
import sys

from benchmarks import environment
from benchmarks.shapes_runs import command
from sana_jax.evals.shapes import painters
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.prompts import prompts
from sana_jax.evals.shapes.verdict import judge
from sana_jax.images import contact_sheet, save_png
from sana_jax.resolution import PATCH

SEEDS = range(4)


def run(argv=None, load=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", help="pipeline folder; the bundled model if left out")
    parser.add_argument("--side", type=int, default=160, help="pixels of a picture on the sheet (160)")
    args = parser.parse_args(argv)
    pipeline, lines = (load or painters.load)(args.model), prompts("seen", 1)
    height = width = PATCH * pipeline.sana[0].sample_size
    options = {"height": height, "width": width} | ({"steps": 2} if args.smoke else {})
    columns = [painters.sampled(pipeline, seed, **options)(lines, [0] * len(lines)) for seed in SEEDS]
    cells = [
        (column[i], f"{'+' if judge(detect(column[i]), line).correct else '-'} {line['prompt']}")
        for i, line in enumerate(lines)
        for column in columns
    ]
    title = f"Seeds {SEEDS[0]} to {SEEDS[-1]}: + is what the prompt says, - is not"
    sheet = contact_sheet(cells, len(SEEDS), title, args.side)
    save_png(pathlib.Path(args.output) / "shapes.png", sheet, {})
    return 0


main = command("shapes_pictures", run)

if __name__ == "__main__":
    sys.exit(main())
