"""GenEval-Shapes: how often a model of shapes paints what the prompt says, in six categories.

    python -m sana_jax.evals.shapes [--model DIR] --images-per-category 400 --output OUT [--controls]

Writes images.jsonl (prompt, what was found, verdict), the pictures, grid.png and summary.json; an
interrupted run goes on where it was.  The last line is the score with its 95 % interval.
Exit status: 0, 1 below --minimum or not finite, 2 bad input or a file that fails, 130 interrupted.
"""

import sys

import numpy as np

from sana_jax.checkpoints.write import write_json
from sana_jax.cli.parser import Parser
from sana_jax.errors import InputError, NonFiniteError, require_positive, require_range
from sana_jax.evals.shapes import neighbours, painters, records, report
from sana_jax.evals.shapes.detector import SMALLEST
from sana_jax.evals.shapes.prompts import SPLITS, meaning, prompts
from sana_jax.evals.shapes.verdict import Found
from sana_jax.images import read_picture, save_png
from sana_jax.pipeline import check_request
from sana_jax.resolution import PATCH

OPTIONS = ("steps", "guidance_scale", "sampler", "flow_shift", "height", "width")


def parse(argv):
    words = __doc__.split("\n\n")
    parser = Parser(prog="python -m sana_jax.evals.shapes", description=words[0], epilog=words[2], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="pipeline folder in diffusers layout; the bundled model if left out")
    add("--images-per-category", type=int, required=True, metavar="N")
    add("--output", required=True, metavar="OUT", help="folder of the run; one that was interrupted goes on")
    add("--split", default="seen", help=f"{', '.join(SPLITS)} (seen)")
    add("--steps", type=int)
    add("--guidance-scale", type=float)
    add("--sampler")
    add("--flow-shift", type=float)
    add("--height", type=int, help="pixels; the model's if left out, as is what is not said of the others")
    add("--width", type=int)
    add("--unit", type=int, metavar="PIXELS", help="the side of a picture whose things have their pixels at every size; "
        "the shorter side if left out: things grow with the picture")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=16, help="pictures painted at once (16)")
    add("--minimum", type=float, help="exit with status 1 if the score is below")
    add("--controls", action="store_true", help="also score truth, reconstructions, no text and shuffled prompts")
    add("--run", help="folder of the run that trained the model: --controls look for scenes remembered from it")
    add("--neighbours", type=int, default=2048, metavar="N", help="its latest scenes, as many as are looked at (2048)")
    return parser.parse_args(argv)


def main(argv=None, load=None):
    args = parse(argv)
    try:
        score = run(args, load or painters.load)
    except (InputError, OSError) as error:
        print(f"sana_jax.evals.shapes: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"sana_jax.evals.shapes: FAILS: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sana_jax.evals.shapes: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if args.minimum is not None and score < args.minimum else 0


def run(args, load):
    """The evaluation of these arguments; returns the score.  Raises InputError."""
    check(args)
    lines = prompts(args.split, args.images_per_category)
    others = other_prompts(lines) if args.controls else []
    seen = neighbours.seen(args.run, args.neighbours) if args.run else None
    pipeline = load(args.model)
    options = sampling(args, pipeline)
    size = options["height"], options["width"]
    if args.unit is not None:
        require_range("unit", args.unit, SMALLEST, min(size))
    settings = {name: getattr(args, name) for name in ("split", "seed", "batch_size", "unit")} | options
    settings |= painters.identity(pipeline, args.split)
    folder = records.open_folder(args.output, settings)

    def scored(name, paint, keep=None):
        return records.evaluate(paint, lines, folder / f"{name}.jsonl", args.batch_size, keep, say, args.unit)

    def path(index):
        return folder / "images" / f"{index:05d}.png"

    def picture(index):
        return read_picture(path(index))[0] if path(index).exists() else None

    def keep(index, pixels):
        save_png(path(index), pixels, {"prompt": lines[index]["prompt"]})

    rows = scored("images", painters.sampled(pipeline, args.seed, **options), keep)
    save_png(folder / "grid.png", report.grid(rows, picture), {})
    found = {"settings": settings, **report.scores(rows), "controls": {}}
    found["prompts_with_unknown_words"] = painters.unknown(pipeline, lines)
    if args.controls:
        for name, paint in {
            "truth": painters.truth(size, args.seed, args.unit),
            "reconstruction": painters.reconstructed(pipeline, size, args.seed, args.unit),
            "no_text": painters.without_text(pipeline, args.seed, **options),
        }.items():
            found["controls"][name] = report.scores(scored(name, paint))
        found["controls"]["shuffled"] = report.scores(shuffled(rows, others))
    if seen:
        some = [pixels for index in range(min(len(rows), 64)) if (pixels := picture(index)) is not None]
        if not some:
            raise InputError(f"output={args.output!r}: its pictures are gone, which --run compares; take another folder")
        found["training_scenes"] = len(seen[0])
        found["controls"]["neighbours"] = neighbours.summary(neighbours.nearest(pipeline, np.stack(some), *seen))
    write_json(folder / "summary.json", found)
    print("\n".join(told(found)), flush=True)
    return found["overall"]["score"]


def sampling(args, pipeline):
    """{argument of `Pipeline.generate`: value}, the model's own where a flag is left out."""
    side = PATCH * pipeline.sana[0].sample_size
    own = pipeline.defaults | {"flow_shift": pipeline.flow_shift, "height": side, "width": side}
    return {name: own.get(name) if getattr(args, name) is None else getattr(args, name) for name in OPTIONS}


def check(args):
    """Raises InputError for a flag that is wrong whatever the model."""
    require_positive("images_per_category", args.images_per_category)
    require_positive("batch_size", args.batch_size)
    require_positive("neighbours", args.neighbours)
    check_request(seed=args.seed, **{name: getattr(args, name) for name in OPTIONS})
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and (value < SMALLEST or value % PATCH):
            raise InputError(f"{name}={value}: must be a multiple of {PATCH}, {SMALLEST} or more")
    if args.run is not None and not args.controls:
        raise InputError(f"run={args.run!r}: is for --controls, which are not asked for")
    if args.minimum is not None:
        require_range("minimum", args.minimum, 0, 1, float)


def other_prompts(lines):
    """For each line the next of its category that asks for something else.  Raises InputError: there is none."""
    found = []
    for place, line in enumerate(lines):
        turned = lines[place:] + lines[:place]
        other = next((o for o in turned if o["tag"] == line["tag"] and meaning(o) != meaning(line)), None)
        if other is None:
            raise InputError(
                f"images_per_category={len(lines) // len({one['tag'] for one in lines})}: too few for --controls, "
                f"which shuffle the prompts of a category: all of {line['tag']} ask for the same"
            )
        found.append(other)
    return found


def shuffled(rows, others):
    """The same pictures judged by another prompt of their category: what they score without listening."""
    return [
        records.row_of(row["index"], other, [Found(**thing) for thing in row["found"]]) for row, other in zip(rows, others)
    ]


def told(found):
    """The lines that are printed, the score last."""
    for name, control in found["controls"].items():
        if name != "neighbours":
            yield from report.text(f"control {name}", control)
    for kind, of in found["controls"].get("neighbours", {}).items():
        yield (
            f"nearest of {found['training_scenes']} training scenes in {kind}: median {of['sampled_median']:.4f}, "
            f"of fresh scenes {of['fresh_median']:.4f}, ratio {of['ratio']:.2f}"
        )
    if found["controls"] and "neighbours" not in found["controls"]:
        yield "no control of remembered scenes: --run says which run trained the model"
    yield from report.text(f"split {found['settings']['split']}", found)
    if count := found["prompts_with_unknown_words"]:
        yield f"{count} of {found['images']} prompts have words that the model was not trained with"
    yield f"overall {report.interval(found['overall'])}"


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
