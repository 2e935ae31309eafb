"""Whether a model of shapes hears who has which colour, and who is where.

    python -m benchmarks.shapes_binding --output DIR [--model DIR] [--pictures 96]

Pictures of two things of two shapes and colours, one clearly left of, right of, above or below the other.  For each of
some noise levels: `loss`, the training loss with the prompt that says all of it; then how much more it is with a
prompt that is false, in the mean and within 1.96 standard errors:
`across`, `down`: the opposite relation, of pairs side by side and of pairs one above the other;
`colours`: each thing has the other's colour;
`other`: the prompt of another picture.
A model that reads prompts as bags of words has 0 in the first three columns, however small its loss.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.shapes_levels import loss
from benchmarks.shapes_runs import command
from configs.shapes import SCENES
from sana_jax import programs
from sana_jax.data import shapes_scene as world
from sana_jax.errors import require_positive
from sana_jax.evals.shapes import painters
from sana_jax.resolution import PATCH

LEVELS = (0.6, 0.75, 0.85, 0.92, 0.97, 0.99)
COLUMNS = ("level", "loss", "across", "down", "colours", "other")
FREEDOM = world.Freedom(**{**SCENES, "kinds": (("two", 1.0),)})


def asked(count, seed=7):
    """`count` scenes as ((colour, shape), relation, (colour, shape)), each with its Scene."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = world.sample(rng, freedom=FREEDOM)
        a, b = scene.things
        relations = sorted(world.relations(a, b, world.CLEAR))
        if relations and a.colour != b.colour:
            found.append((((a.colour, a.shape), relations[0], (b.colour, b.shape)), scene))
    return found


def sentences(facts):
    """{what it says: the prompts}; all but "loss" are false."""

    def say(a, relation, b):
        return f"a {' '.join(a)} {relation} a {' '.join(b)}"

    true = [say(*fact) for fact in facts]
    return {
        "loss": true,
        "opposite": [say(a, world.OPPOSITE[relation], b) for a, relation, b in facts],
        "colours": [say((b[0], a[1]), relation, (a[0], b[1])) for a, relation, b in facts],
        "other": true[1:] + true[:1],
    }


def run(argv=None, load=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", help="pipeline folder; the bundled model if left out")
    parser.add_argument("--pictures", type=int, default=96, help="rounded up to whole batches")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    require_positive("pictures", args.pictures)
    require_positive("batch_size", args.batch_size)
    batch = args.batch_size
    facts, scenes = zip(*asked(batch if args.smoke else -(-args.pictures // batch) * batch))
    pipeline = (load or painters.load)(args.model)
    sana, params = pipeline.sana
    pictures = painters.painted(scenes, (PATCH * sana.sample_size,) * 2).astype(np.float32) / 127.5 - 1
    losses = {name: {level: [] for level in LEVELS} for name in sentences(facts)}
    for begin in range(0, len(facts), batch):
        some = slice(begin, begin + batch)
        x0 = jnp.asarray(pipeline.encode(pictures[some]))
        noise = programs.initial_latents(3, np.arange(begin, begin + batch), x0.shape[1:])
        for name, prompts in sentences(facts).items():
            text = pipeline.encode_prompt(prompts[some])
            for level, found in losses[name].items():
                found.append(np.asarray(loss(params, x0, noise, jnp.float32(level), *text, sana=sana)))
    down = np.array([relation in ("above", "below") for _, relation, _ in facts])
    rows = [row(level, {name: np.concatenate(of[level]) for name, of in losses.items()}, down) for level in LEVELS]
    settings = {"pictures": len(facts)} | painters.identity(pipeline, "seen")
    environment.write_result(pathlib.Path(args.output) / "shapes_binding.json", rows, settings=settings)
    print(environment.table(rows, COLUMNS))
    return 0


def row(level, losses, down):
    more = {name: of - losses["loss"] for name, of in losses.items()}
    columns = {"across": more["opposite"][~down], "down": more["opposite"][down], "colours": more["colours"], "other": more["other"]}
    found = {"level": level, "loss": round(float(losses["loss"].mean()), 4)}
    return found | {name: f"{x.mean():+.4f} ± {1.96 * x.std() / len(x) ** 0.5:.4f}" for name, x in columns.items()}


main = command("shapes_binding", run)

if __name__ == "__main__":
    sys.exit(main())
