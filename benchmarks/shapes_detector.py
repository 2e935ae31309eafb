"""The detector of GenEval-Shapes against truth: verdicts on pictures that the world itself paints.

    python -m benchmarks.shapes_detector --output DIR [--images-per-category 400] [--smoke]

Each picture is judged by what was asked for, which must hold, and by a near miss of it (another colour,
one more, the opposite relation, another shape), which must not.  Sizes 256 and 512, in the latter things of
twice as many pixels and of as many, and blurred by a Gaussian with noise, about what an autoencoder does.
No model, no GPU; the exit status is 1 if less than 0.995 of the verdicts on a sharp picture are right.
"""

import pathlib
import sys
import time

import numpy as np
from scipy import ndimage

from benchmarks import environment
from sana_jax.data import shapes_scene as world
from sana_jax.evals.shapes import painters
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.prompts import prompts
from sana_jax.evals.shapes.verdict import judge

COLUMNS = ("split", "size", "unit", "blur", "pictures", "right", "exact", "near_misses_refused", "ms")
BOUND = 0.995
BLURS = (0.0, 2.0)  # standard deviation in pixels at 256; with noise of as many 255ths


def near_miss(line, rng):
    """The metadata with one thing about one entry wrong."""
    include = [dict(item) for item in line["include"]]
    item = include[rng.integers(len(include))]
    placed = [i for i in include if "position" in i]
    kinds = ["class", *(["color"] if "color" in item else []), *(["position"] if placed else [])]
    kind = "count" if item["count"] > 1 else kinds[rng.integers(len(kinds))]
    if kind == "count":
        item["count"] += 1
    elif kind == "position":
        relation, target = placed[0]["position"]
        placed[0]["position"] = [world.OPPOSITE[relation], target]
    else:
        names = [*world.COLOURS] if kind == "color" else [*world.SHAPES]
        item[kind] = rng.choice([name for name in names if name not in [i.get(kind) for i in include]])
    return {"include": include}


def row(split, size, unit, blur, per_category, batch=16):
    rng, lines = np.random.default_rng(0), prompts(split, per_category)
    paint, right, exact, refused, spent = painters.truth((size, size), 1, unit), 0, 0, 0, 0.0
    for begin in range(0, len(lines), batch):
        numbers = [min(i, len(lines) - 1) for i in range(begin, begin + batch)]
        pictures = paint([lines[i] for i in numbers], numbers)
        for i, picture in zip(range(begin, len(lines)), pictures):
            if blur:
                soft = ndimage.gaussian_filter(picture.astype(np.float32), (blur * unit / 256, blur * unit / 256, 0))
                picture = np.clip(np.rint(soft + blur * rng.normal(size=soft.shape)), 0, 255).astype(np.uint8)
            began = time.process_time()
            found = detect(picture, unit)
            spent += time.process_time() - began
            verdict = judge(found, lines[i])
            right, exact = right + verdict.correct, exact + verdict.exact
            refused += not judge(found, near_miss(lines[i], rng)).correct
    n = len(lines)
    shares = {"right": right / n, "exact": exact / n, "near_misses_refused": refused / n}
    return {"split": split, "size": size, "unit": unit, "blur": blur, "pictures": n, **shares, "ms": 1e3 * spent / n}


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--images-per-category", type=int, default=400)
    args = parser.parse_args(argv)
    rows, path = [], pathlib.Path(args.output) / "shapes_detector.json"
    for size, unit in ((256, 256), (512, 512), (512, 256)):
        for blur in BLURS:
            for split in ("seen", "held_out"):
                rows.append(row(split, size, unit, blur, 2 if args.smoke else args.images_per_category))
                environment.write_result(path, rows)
    print(environment.table(rows, COLUMNS))
    least = min(min(r["right"], r["near_misses_refused"]) for r in rows if not r["blur"])
    return int(least < BOUND)


if __name__ == "__main__":
    sys.exit(main())
