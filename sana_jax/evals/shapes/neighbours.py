"""Whether pictures are remembered: how near the nearest training scene is, in pixels and in latents.

Distances say something only beside others: the same is measured for fresh scenes, which are not among
those of training, through the same autoencoder.  A model that repeats training scenes is much nearer to one
than they.  In a world with few scenes (a coarse grid, plain backgrounds) fresh ones are near to some too.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from sana_jax import overrides
from sana_jax.data.shapes import Shapes
from sana_jax.errors import InputError
from sana_jax.evals.shapes import painters

FRESH_SEED = 2**40
SIDE = 32  # cells along the shorter side that pixels are averaged in


def seen(run_dir, count):
    """(The last `count` scenes that a run of train.py was shown, fewer where it saw fewer, latest last; their Shapes.)

    Raises InputError: no folder of a run, or one that was not trained on a source of shapes or on features of one.
    """
    from sana_jax.data import buckets
    from sana_jax.data.cached import Cached, made_from, read_meta
    from sana_jax.data.schedule import Schedule  # of grain, which sampling does without
    from sana_jax.training import initialise, reading

    config = initialise.run_config(run_dir)
    data = config.get("data") or {}
    source = dict(data.get("source") or {})
    if source.get("class") == Cached.__name__:  # row i is row i of what it was made from
        path, source = source["path"], dict(made_from(source["path"]))
        meta = read_meta(path)
        if other := [name for name in ("size", "buckets") if meta.get(name, data.get(name)) != data.get(name)]:
            raise InputError(f"run={str(run_dir)!r}: has other data.{', data.'.join(other)} than its features in {path}, so its order is not known here")
        if not source:
            raise InputError(f"{path}: cache.json does not say what it was made from; the command that made it, given again, adds it")
    if source.pop("class", None) != Shapes.__name__:
        raise InputError(f"run={str(run_dir)!r}: is not of Shapes, whose scenes are known here")
    source, problems = overrides.override(Shapes(), source)
    if problems:
        raise InputError("\n  ".join([f"{pathlib.Path(run_dir)}: data.source", *problems]))
    reader, batch = source.open(), data["batch"]
    choice = overrides.convert("data.buckets", data.get("buckets", False), bool | tuple)
    _, members, counts = buckets.divide(reader, data["size"], choice)
    schedule, end = Schedule(counts, batch, config["seed"]), reading.read_meta(run_dir)[1]["samples"]
    samples, rows = range(max(0, end - count), end), {}
    for number in range(samples.start // batch, -(-end // batch)):
        bucket, found = schedule.rows(number)
        rows[number] = found if members is None else members[bucket][found]
    return [reader.scene(int(rows[i // batch][i % batch])) for i in samples], source


def nearest(pipeline, pictures, scenes, source):
    """Distances to the nearest of some scenes, of pictures and of as many fresh scenes.

    Args:
      pictures: uint8 [n H W 3], painted by the model.
      scenes, source: of training, one scene or more, as `seen` has them; fresh ones are like them.  All are painted
        in the size of `pictures`: of a run of several sizes those of another aspect as large as fits.
    Returns:
      {"pixels", "latents": {"sampled", "fresh": [n] rms distance to the nearest}}, of pixels in [0, 1].
    """
    n, *size, _ = pictures.shape
    room = source.scales if source.grow else (max(1.0, min(size) / source.size),)
    reader = dataclasses.replace(source, seed=FRESH_SEED, aspects=(size[0] / size[1],), scales=room).open()
    known = set(map(_look, scenes))
    others = (scene for scene in map(reader.scene, itertools.count()) if _look(scene) not in known)
    fresh = painters.through(pipeline, painters.painted(list(itertools.islice(others, n)), size))
    asked = {"sampled": pictures, "fresh": fresh}
    asked = {name: _features(pipeline, some) for name, some in asked.items()}
    least = {name: [np.full(n, np.inf, np.float32) for _ in found] for name, found in asked.items()}
    for begin in range(0, len(scenes), n):
        some = [scenes[i % len(scenes)] for i in range(begin, begin + n)]  # n at a time, one program
        trained = _features(pipeline, painters.painted(some, size))
        for name, found in asked.items():
            least[name] = [
                np.minimum(so_far, _distances(mine, theirs).min(axis=1))
                for so_far, mine, theirs in zip(least[name], found, trained)
            ]
    return {
        kind: {name: least[name][k].tolist() for name in asked} for k, kind in enumerate(("pixels", "latents"))
    }


def summary(found):
    """Medians and smallest of `nearest`, and the ratio of the medians: near 0 is remembered, 1 is not."""
    return {
        kind: {
            "sampled_median": float(np.median(of["sampled"])),
            "fresh_median": float(np.median(of["fresh"])),
            "sampled_least": min(of["sampled"]),
            "fresh_least": min(of["fresh"]),
            "ratio": float(np.median(of["sampled"]) / np.median(of["fresh"])),
        }
        for kind, of in found.items()
    }


def _look(scene):
    """Of a scene what can be seen, as a key."""
    return scene._replace(things=tuple(sorted(scene.things)), phase=() if scene.texture == "plain" else scene.phase)


def _features(pipeline, pictures):
    """([n p], [n l]): mean colours of cells, and latents."""
    cell = min(pictures.shape[1:3]) // SIDE
    n, height, width, _ = pictures.shape
    cells = pictures[:, : height // cell * cell, : width // cell * cell].astype(np.float32) / 255
    cells = cells.reshape(n, height // cell, cell, width // cell, cell, 3).mean(axis=(2, 4))
    latents = pipeline.encode(pictures.astype(np.float32) / 127.5 - 1)
    return cells.reshape(n, -1), np.asarray(latents).reshape(n, -1)


def _distances(a, b):
    """[n p], [m p] -> [n m], root of the mean squared difference."""
    squared = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])
