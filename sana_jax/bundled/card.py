"""MODEL_CARD.md of a pipeline folder that goes into the box: words here, every number from files.

    python -m sana_jax.bundled.card FOLDER --run text=RUN --run flow=RUN ... [--scores GenEval-Shapes=summary.json]
        [--earlier MODEL_CARD.md]

A run is a workdir of train.py: its recipe is in config.json, its log in metrics.jsonl and timing.jsonl.
Where weights go on from others, the card of those tells of the runs before; for new scores of the same
weights it tells of all.
Scores are any JSON object of numbers.  Refuses a folder that is too large for the repository.
Exit status: 0, or 2 with one line that says what is wrong.
"""

import json
import math
import pathlib
import re
import sys

from sana_jax import extras
from sana_jax.checkpoints.read import open_checkpoint, read_json
from sana_jax.cli.parser import Parser
from sana_jax.data.cached import Cached, made_from
from sana_jax.errors import InputError
from sana_jax.hub.fingerprints import files_sha256
from sana_jax.hub.folders import names_in
from sana_jax.training import initialise, metrics

CARD = "MODEL_CARD.md"
LARGEST, LARGEST_FILE = 20_000_000, 16 * 2**20  # bytes of the folder, and of one file, which stays below
PARTS = {"transformer": "Linear-DiT", "vae": "DC-AE", "text_encoder": "Gemma-2"}
ROWS = 8  # of a log
RECIPE = (  # of config.json, as far as a run has them
    "name", "steps", "seed", "data.source", "data.captions", "data.batch", "data.size", "data.buckets", "data.tokens", "optim.rule", "optim.lr", "optim.warmup",
    "optim.decay", "optim.clip", "optim.ema", "objective", "init.weights", "frozen.dc_ae", "frozen.text", "model.dtype",
)  # fmt: skip

ABOUT = """\
# The bundled model: shapes

A small SANA in diffusers' layout, trained by this repository's train.py on pictures that
[sana_jax/data/shapes.py](../../data/shapes.py) paints: circles, squares, triangles, stars, hearts,
rings, crosses and crescents in ten colours, up to four of them, on quiet backgrounds.  No picture and no
text of anybody else is in it.  Licence: Apache-2.0, as the code.  It is what `sample.py` and
`load_pipeline()` use where no model is named; diffusers' `SanaPipeline` reads the folder too.
"""
LIMITS = """\
## Limits

It knows the words that are listed in sana_jax.json, and nothing but shapes; other words are named in a warning, and
what they ask for is not painted.  An empty prompt, or one without a known word, gives any picture of the
kind.  What cannot be (nine circles, one circle on both sides of another) gives the nearest thing that it
has learned.  What its flow saw last is a smaller world than its autoencoder's: things stand upright in three
exact sizes, their centres on a grid of 64 pixels (3 by 3 places at 256 x 256), before plain backgrounds, and it paints that.
How well it paints combinations that training never showed is among the scores.  Things have the same pixels in
pictures of every size.  Where there is room for more of them, as at 512 x 512, a picture may have a thing too many
or, more seldom, lack one, and counts are often wrong.
"""


def write(folder, runs, scores=(), earlier=None):
    """Writes the card into `folder`; returns its path.

    Args:
      runs: {stage: workdir}.
      scores: {title: JSON file}.
      earlier: the card of weights that these runs began with; its runs come first.
    Raises:
      InputError: no pipeline, neither a run nor an earlier card, nothing readable, a stage that the earlier card tells of already, or a
        folder that is too large.
    """
    folder = pathlib.Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: has no model_index.json, is not a pipeline in diffusers layout")
    parts = [ABOUT, "## Parts\n", *_parts(folder), "## Recipe\n"]
    before, runs = _told(earlier) if earlier else {}, dict(runs)
    if not before and not runs:
        raise InputError("run: none given, and no earlier card that tells of one; a card says what its weights are from")
    if both := sorted(before.keys() & runs.keys()):
        raise InputError(f"run={both[0]!r}: {earlier} tells of one; give it another name")
    parts += before.values()
    for stage, run in runs.items():
        parts += [_stage(stage), *_recipe(run), *_log(run)]
    for title, file in dict(scores).items():
        parts += [f"## {title}\n", _table(("what", "value"), facts(read_json(pathlib.Path(file))))]
    parts += [LIMITS, "## Files\n", *_files(folder)]
    path = folder / CARD
    path.write_text("\n".join(parts), encoding="utf-8")
    require_small(folder)
    return path


def require_small(folder):
    """Raises InputError: a folder that is too large to be in the repository, or a file in it."""
    sizes = {name: (pathlib.Path(folder) / name).stat().st_size for name in sorted(names_in(folder))}
    for name, size in sizes.items():
        if size >= LARGEST_FILE:
            raise InputError(f"{folder}: {name} has {size} bytes, must have less than {LARGEST_FILE}; export with --dtype bf16")
    if sum(sizes.values()) > LARGEST:
        raise InputError(f"{folder}: has {sum(sizes.values())} bytes, may have {LARGEST}; export with --dtype bf16")


def facts(value, name=""):
    """(name, text) of every number in a JSON object; {"score", "low", "high"} is one with its interval."""
    if isinstance(value, dict) and {"score", "low", "high"} <= value.keys():
        yield name, f"{value['score']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        value = {key: inner for key, inner in value.items() if key not in ("score", "low", "high")}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from facts(inner, f"{name}, {key}" if name else key)
    else:
        yield name, _shown(value)


def _shown(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _table(titles, rows):
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _parts(folder):
    rows = []
    for part, kind in PARTS.items():
        checkpoint = open_checkpoint(folder / part)
        count = sum(math.prod(shape) for shape, _ in checkpoint.header.values())
        rows.append((part, kind, f"{count / 1e6:.2f} M", ", ".join(sorted(checkpoint.dtypes))))
        checkpoint.close()
    yield _table(("part", "what", "parameters", "stored in"), rows)
    said = extras.read(folder)
    words = said.pop("vocabulary", [])
    listed = [(name, _shown(value) or "none") for name, value in sorted(said.items())]
    yield _table(("sana_jax.json", ""), [*listed, ("vocabulary", f"{len(words)} words")])


def _stage(name):
    return f"### {name}\n"


def _told(card):
    """{stage: text} of the runs in a card."""
    try:
        text = pathlib.Path(card).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"earlier={str(card)!r}: {error}") from None
    stages = re.search(r"^## Recipe\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^### (.+)\n((?:(?!^### ).*\n)*)", stages[1], re.MULTILINE) if stages else []
    if not found:
        raise InputError(f"earlier={str(card)!r}: no card, it tells of no runs")
    return {name: _stage(name) + body.rstrip("\n") + "\n" for name, body in found}


def _recipe(run):
    config, rows = initialise.run_config(run), []
    for name in RECIPE:
        value = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = _called(value)
        if value not in (None, ""):
            rows.append((name, _shown(_local(value))))
    yield _table(("recipe", ""), rows)


def _called(value):
    """A described object in one line; features with the source that they were made from, while they are there."""
    said = {name: _local(inner) for name, inner in value.items() if name != "class"}
    if value.get("class") == Cached.__name__ and pathlib.Path(value["path"]).is_dir() and (source := made_from(value["path"])):
        said["made_from"] = _called(source)
    return f"{value.get('class')}({', '.join(f'{name}={inner}' for name, inner in said.items())})"


def _local(value):
    """A path without its folders: where it was on that machine is no news."""
    return pathlib.PurePath(value).name if isinstance(value, str) and value.startswith("/") else value


def _log(run):
    """Lines of the log at equal distances, and what they took."""
    lines = list(metrics.read(pathlib.Path(run) / "metrics.jsonl"))
    if not lines:
        raise InputError(f"{run}: has no metrics.jsonl to tell of")
    chosen = [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)] if len(lines) > ROWS else lines
    names = [name for name, value in lines[-1].items() if isinstance(value, (int, float)) and name not in metrics.COUNTS]
    yield _table(names, [[_shown(line.get(name)) for name in names] for line in chosen])
    clocks = list(metrics.read(pathlib.Path(run) / "timing.jsonl"))
    if clocks:
        seconds = clocks[-1]["productive_seconds"]
        yield f"{seconds:.0f} s of steps, {clocks[-1]['images_per_second']:.0f} rows per second at the end.\n"


def _files(folder):
    names = sorted(names_in(folder) - {CARD})
    digests = files_sha256(folder, names)
    yield _table(("file", "bytes", "sha256"), [(n, (folder / n).stat().st_size, digests[n]) for n in names])


def _pair(text):
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise InputError(f"{text!r}: must be NAME=PATH")
    return name, path


def main(argv=None):
    parser = Parser(prog="python -m sana_jax.bundled.card", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--run", action="append", default=[], metavar="STAGE=RUN", help="a workdir of train.py")
    parser.add_argument("--scores", action="append", default=[], metavar="TITLE=FILE", help="a JSON object of numbers")
    parser.add_argument("--earlier", metavar="CARD", help="the card of the weights that these runs began with: its runs come first")
    args = parser.parse_args(argv)
    try:
        print(write(args.folder, map(_pair, args.run), map(_pair, args.scores), args.earlier))
    except InputError as error:
        print(f"sana_jax.bundled.card: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
