"""Whether a model of shapes hears who has which colour, and who is where.

    python -m benchmarks.shapes_binding --output DIR [--model DIR] [--pictures 96]

Pictures of two things of two shapes and colours, one clearly left of, right of, above or below the other.  For each of
some noise levels: `loss`, the training loss with the prompt that says all of it; then how much more it is with a
prompt that is false, the average over pictures and its 95 % interval:
`across`, `down`: the opposite relation, of pairs side by side and of pairs one above the other;
`colours`: each thing has the other's colour;
`other`: the prompt of another picture.
False prompts too say nothing that is held out from training.  A model that reads prompts as bags of words has 0 in
`across`, `down` and `colours`, however small its loss.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.shapes_levels import loss
from benchmarks.shapes_runs import command
from sana_jax import programs
from sana_jax.data import shapes_scene as world
from sana_jax.errors import require_range
from sana_jax.evals.shapes import intervals, painters
from sana_jax.evals.shapes.prompts import sentence
from sana_jax.resolution import PATCH

LEVELS = (0.6, 0.75, 0.85, 0.92, 0.97, 0.99)
MORE = ("across", "down", "colours", "other")
COLUMNS = ("level", "loss", *MORE)
FREEDOM = world.Freedom(turn=0.0, jitter=0.0, grid=0.25, apart=0.06, textures=("plain",), kinds=(("two", 1.0),))
SCENES, NOISE = 7, 3  # seeds


def asked(count):
    """`count` of (scene, relation), of its first thing to its second."""
    rng = np.random.default_rng(SCENES)
    found = []
    while len(found) < count:
        scene = world.sample(rng, freedom=FREEDOM)
        a, b = scene.things
        relations = sorted(world.relations(a, b, world.CLEAR))
        if relations and a.colour != b.colour and not _held_out(a, b, relations[0]):
            found.append((scene, relations[0]))
    return found


def _held_out(a, b, relation):
    """Whether one of the false prompts asks for what no training scene has."""
    return (
        world.held_out_triple(a.colour, b.colour, world.OPPOSITE[relation])
        or world.held_out_triple(b.colour, a.colour, relation)
        or world.held_out_pair(b.colour, a.shape)
        or world.held_out_pair(a.colour, b.shape)
    )


def sentences(facts):
    """{"true", "opposite", "colours", "other": prompts} of (scene, relation)s; only the first are true."""
    said = {"true": [], "opposite": [], "colours": []}
    for (things, *_), relation in facts:
        a, b = ((thing.shape, thing.colour, None, 1) for thing in things)
        said["true"].append(sentence(((a, b), relation)))
        said["opposite"].append(sentence(((a, b), world.OPPOSITE[relation])))
        said["colours"].append(sentence((((a[0], b[1], *a[2:]), (b[0], a[1], *b[2:])), relation)))
    return said | {"other": said["true"][1:] + said["true"][:1]}


def run(argv=None, load=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", help="pipeline folder; the bundled model if left out")
    parser.add_argument("--pictures", type=int, default=96, help="at least 32; rounded up to whole batches")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    require_range("pictures", args.pictures, 32, 10**6)
    require_range("batch_size", args.batch_size, 1, 1024)
    batch = args.batch_size
    facts = asked(-(-args.pictures // batch) * batch)
    pipeline = (load or painters.load)(args.model)
    sana, params = pipeline.sana
    scenes = [scene for scene, _ in facts]
    pictures = painters.painted(scenes, (PATCH * sana.sample_size,) * 2).astype(np.float32) / 127.5 - 1
    said = sentences(facts)
    losses = {name: {level: [] for level in LEVELS} for name in said}
    for begin in range(0, len(facts), batch):
        some = slice(begin, begin + batch)
        x0 = jnp.asarray(pipeline.encode(pictures[some]))
        noise = programs.initial_latents(NOISE, np.arange(begin, begin + batch), x0.shape[1:])
        for name, prompts in said.items():
            text = pipeline.encode_prompt(prompts[some])
            for level, found in losses[name].items():
                found.append(np.asarray(loss(params, x0, noise, jnp.float32(level), *text, sana=sana)))
    down = np.array([relation in ("above", "below") for _, relation in facts])
    rows = [row(level, {name: np.concatenate(of[level]) for name, of in losses.items()}, down) for level in LEVELS]
    settings = {"pictures": len(facts), "seeds": [SCENES, NOISE], "scenes": FREEDOM._asdict(), "weights": painters.weights(pipeline)}
    environment.write_result(pathlib.Path(args.output) / "shapes_binding.json", rows, settings=settings)
    print(environment.table([found | {name: _text(found[name]) for name in MORE} for found in rows], COLUMNS))
    return 0


def row(level, losses, down):
    """One row of the table: losses {prompts: [n]}, down [n], whether a picture's things are one above the other."""
    more = {name: of - losses["true"] for name, of in losses.items()}
    columns = (more["opposite"][~down], more["opposite"][down], more["colours"], more["other"])
    found = {"level": level, "loss": round(float(losses["true"].mean()), 4)}
    return found | {name: intervals.average(column)._asdict() for name, column in zip(MORE, columns)}


def _text(interval):
    return "{score:+.4f} [{low:+.4f}, {high:+.4f}]".format(**interval)


main = command("shapes_binding", run)

if __name__ == "__main__":
    sys.exit(main())
