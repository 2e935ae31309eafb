"""Pictures of the same prompts from the same noise, painted in several ways: what the two below share.

A way of painting is a dictionary of arguments of `Pipeline.generate`.  Its latents and verdicts are kept
batch by batch, so that a script that was interrupted goes on.
"""

import datetime
import os
import pathlib
import re
import sys
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import environment
from sana_jax.errors import InputError, NonFiniteError, require_positive
from sana_jax.evals.shapes import intervals, painters, records
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.prompts import prompts
from sana_jax.evals.shapes.verdict import judge
from sana_jax.resolution import PATCH

MARKS = "<!-- written by benchmarks/{}.py -->", "<!-- end of what is written -->"


class Painted(NamedTuple):
    """All pictures of one way: latents [n h w c], and whether each is correct [n]."""

    latents: np.ndarray
    correct: np.ndarray


class Runs:
    """Where ways of painting are compared: a model, prompts, noise, and a folder for what is done."""

    def __init__(self, pipeline, folder, per_category, height=None, width=None, seed=0, batch=16):
        require_positive("batch_size", batch)
        side = PATCH * pipeline.sana[0].sample_size
        self.pipeline, self.seed, self.batch = pipeline, seed, batch
        self.size = height or side, width or side
        self.lines = prompts("seen", per_category)
        self.tags = [line["tag"] for line in self.lines]
        self.settings = {"seed": seed, "batch": batch, "size": list(self.size)} | painters.identity(pipeline, "seen")
        self.settings |= {"defaults": pipeline.defaults, "flow_shift": pipeline.flow_shift}
        self.folder = records.open_folder(folder, self.settings)

    def paint(self, **way):
        """The `Painted` of a way."""
        name = "_".join(f"{key}-{value}" for key, value in sorted(way.items()))
        parts = []
        for begin in range(0, len(self.lines), self.batch):
            numbers = range(begin, min(begin + self.batch, len(self.lines)))
            path = self.folder / name / f"{begin:05d}.npz"
            kept = _kept(path)
            if kept is None or len(kept.correct) < len(numbers):  # a smaller run ended within this batch
                kept = self._painted(numbers, way)
                path.parent.mkdir(exist_ok=True)
                partial = path.with_name(f"partial-{path.name}")
                np.savez(partial, **kept._asdict())
                os.replace(partial, path)
            parts.append(Painted(*(array[: len(numbers)] for array in kept)))
        painted = Painted(*map(np.concatenate, zip(*parts)))
        print(f"{name}: {painted.correct.mean():.3f}", flush=True)
        return painted

    def _painted(self, numbers, way):
        """The `Painted` of some lines; the batch is filled up, so that one program does for all."""
        filled = [*numbers, *[numbers[0]] * (self.batch - len(numbers))]
        height, width = self.size
        latents = self.pipeline.generate(
            [self.lines[i]["prompt"] for i in filled], seed=self.seed, first_image=filled, height=height,
            width=width, bin_resolution=False, output="latent", **way,
        )  # fmt: skip
        pictures = np.rint(np.asarray(self.pipeline.decode(latents)) * 127.5 + 127.5).astype(np.uint8)
        correct = [judge(detect(picture), self.lines[i]).correct for i, picture in zip(numbers, pictures)]
        return Painted(np.asarray(latents)[: len(numbers)], np.array(correct))

    def score(self, painted):
        """The `Interval` of the overall score."""
        tags = np.array(self.tags)
        by_tag = [painted.correct[tags == tag] for tag in dict.fromkeys(self.tags)]
        return intervals.mean([intervals.wilson(int(some.sum()), len(some)) for some in by_tag])

    def difference(self, painted, reference):
        """The `Interval` of the difference of two scores on the same noise."""
        return intervals.paired_difference(painted.correct, reference.correct, self.tags)

    def error(self, painted, reference):
        """Median over pictures of the rms difference of latents, as a share of the reference's rms."""
        apart = np.sqrt(np.mean((painted.latents - reference.latents) ** 2, axis=(1, 2, 3)))
        return float(np.median(apart / np.sqrt(np.mean(reference.latents**2, axis=(1, 2, 3)))))


def _kept(path):
    """The `Painted` in a file, None without one."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return Painted(arrays["latents"], arrays["correct"])


def arguments(docstring):
    parser = environment.arguments(docstring)
    add = parser.add_argument
    add("--model", help="pipeline folder; the bundled model if left out")
    add("--images-per-category", type=int, default=60)
    add("--height", type=int)
    add("--width", type=int)
    add("--batch-size", type=int, default=16)
    add("--docs", type=pathlib.Path, help="folder of the document and the plot (docs; with --smoke nowhere)")
    return parser


def docs_of(args):
    """The folder to write pages into, or None."""
    return args.docs or (None if args.smoke else pathlib.Path("docs"))


def command(name, run):
    """main(argv, ...) -> exit status of run(argv, ...): bad input and files that fail are one line and 2."""

    def main(argv=None, *others):
        try:
            return run(argv, *others)
        except (InputError, OSError) as error:
            print(f"benchmarks.{name}: error: {error}", file=sys.stderr)
            return 2
        except NonFiniteError as error:
            print(f"benchmarks.{name}: FAILS: {error}", file=sys.stderr)
            return 1

    return main


def open_runs(args, load=None, per_category=None):
    """The `Runs` of these arguments, or of another number of pictures per category."""
    size = {"height": args.height, "width": args.width}
    per_category = 1 if args.smoke else args.images_per_category if per_category is None else per_category
    return Runs((load or painters.load)(args.model), args.output, per_category, batch=args.batch_size, **size)


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def interval(found, digits=3):
    return f"{found.score:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def heading(runs):
    """What the figures are of, a sentence."""
    device = jax.devices()[0]
    return (
        f"Measured {datetime.date.today()} with jax {jax.__version__} on {device.device_kind}: {len(runs.lines)} pictures "
        f"of {runs.size[1]} x {runs.size[0]}, split \"seen\", weights {runs.settings['weights'][:12]}; 95 % intervals."
    )


def write_between(path, script, text):
    """Replaces what stands between the two marks of a document; ValueError where they are not."""
    begin, end = MARKS[0].format(script), MARKS[1]
    old = pathlib.Path(path).read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new, count = pattern.subn(lambda _: f"{begin}\n\n{text}\n\n{end}", old)
    if count != 1:
        raise ValueError(f"{path}: has {count} places between {begin!r} and {end!r}, must have 1")
    pathlib.Path(path).write_text(new, encoding="utf-8")
