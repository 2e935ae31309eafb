"""At which noise levels a model of shapes goes wrong.

    python -m benchmarks.shapes_levels --output DIR [--model DIR] [--images-per-category 60]

For each of some noise levels of the sampler's own grid:
`score`: of GenEval-Shapes where sampling begins there, from the truth with that much noise.  A perfect
model scores 1 at all of them (the truth turns things by up to 23 degrees, so one that learned from upright ones is at
home only in the upper rows); what a row loses against the row above was lost between their levels.  In
the last one sampling begins all but without the truth.
`loss`, `other`, `none`: the training loss at that level with the prompt, with another picture's prompt and
with the empty one: how much the text says there.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.shapes_runs import command
from sana_jax import flow, programs
from sana_jax.errors import require_positive
from sana_jax.evals.shapes import intervals, painters
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.prompts import prompts
from sana_jax.evals.shapes.verdict import judge
from sana_jax.resolution import PATCH
from sana_jax.sampling import flow_dpm_solver

COLUMNS = ("level", "steps", "score", "loss", "other", "none")
LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


def rest(schedule, first):
    """The rows of a Flow-DPM-Solver's schedule from `first` on, for a run that begins there: its first step
    knows no earlier data."""
    rows = flow_dpm_solver.Schedule(*(array[first:].copy() for array in schedule))
    rows.c[0] = rows.c[1:2, 1] = 0
    return rows


@functools.partial(jax.jit, static_argnames="sana")
def loss(params, x0, noise, sigma, states, mask, *, sana):
    """[b], the mean square error of the velocity at the noise level sigma, as `objectives.Flow` has it."""
    x = flow.interpolate(x0, noise, jnp.full(len(x0), sigma))
    velocity = programs.apply(sana, params, x, jnp.full(len(x0), flow.LEVELS * sigma), states, mask)
    return jnp.mean((velocity.astype(jnp.float32) - flow.target(x0, noise)) ** 2, axis=(1, 2, 3))


def batches(pipeline, lines, size, seed, count):
    """(lines, x0, noise, the conditions of guided sampling) of `count` prompts at a time; a rest is filled up."""
    negative = pipeline.encode_prompt([""], chi="none")
    for begin in range(0, len(lines), count):
        numbers = [*range(begin, min(begin + count, len(lines)))]
        filled = numbers + numbers[:1] * (count - len(numbers))
        some = [lines[i] for i in filled]
        pictures = painters.truth(size, seed)(some, filled)
        x0 = pipeline.encode(pictures.astype(np.float32) / 127.5 - 1)
        noise = programs.initial_latents(seed, np.array(filled), x0.shape[1:])
        states, mask = pipeline.encode_prompt([line["prompt"] for line in some])
        empty = (jnp.broadcast_to(array, (count, *array.shape[1:])) for array in negative)
        yield some[: len(numbers)], x0, noise, (states, mask, *empty)


def run(argv=None, load=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", help="pipeline folder; the bundled model if left out")
    parser.add_argument("--images-per-category", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    require_positive("batch_size", args.batch_size)
    lines = prompts("seen", args.images_per_category)
    pipeline = (load or painters.load)(args.model)
    (sana, params), own = pipeline.sana, pipeline.defaults
    size = (PATCH * sana.sample_size,) * 2
    whole = flow_dpm_solver.schedule(2 if args.smoke else own["steps"], pipeline.flow_shift)
    firsts = sorted({int(np.argmin(abs(whole.sigma - level))) for level in LEVELS}, reverse=True)
    schedules = {first: rest(whole, first) for first in firsts}
    correct, losses = {first: [] for first in firsts}, {first: [] for first in firsts}
    interval = np.array([0, 1], np.float32)
    for some, x0, noise, conditions in batches(pipeline, lines, size, 0, args.batch_size):
        states, mask, empty, empty_mask = conditions
        texts = (states, mask), (jnp.roll(states, -1, 0), jnp.roll(mask, -1, 0)), (empty, empty_mask)
        for first, schedule in schedules.items():
            sigma = schedule.sigma[0]
            start = flow.interpolate(x0, noise, jnp.full(len(x0), sigma))
            latents = programs.denoise_program(
                params, conditions, start, schedule, np.float32(own["guidance_scale"]), interval,
                sana=sana, sampler="flow-dpm-solver", guided=True, limited=False,
            )  # fmt: skip
            pictures = np.rint(np.asarray(pipeline.decode(latents)) * 127.5 + 127.5).astype(np.uint8)
            correct[first] += [judge(detect(picture), line).correct for picture, line in zip(pictures, some)]
            of_texts = [loss(params, x0, noise, sigma, *text, sana=sana)[: len(some)] for text in texts]
            losses[first].append(np.stack(of_texts))
    rows = []
    for first in firsts:
        score = intervals.wilson(sum(correct[first]), len(lines))
        level, steps = round(float(whole.sigma[first]), 3), len(whole.sigma) - first
        means = np.concatenate(losses[first], axis=1).mean(axis=1).round(4).tolist()
        rows.append(dict(zip(COLUMNS, (level, steps, str(score), *means))))
    settings = {"images": len(lines), "flow_shift": pipeline.flow_shift} | own | painters.identity(pipeline, "seen")
    environment.write_result(pathlib.Path(args.output) / "shapes_levels.json", rows, settings=settings)
    print(environment.table(rows, COLUMNS))
    return 0


main = command("shapes_levels", run)

if __name__ == "__main__":
    sys.exit(main())
