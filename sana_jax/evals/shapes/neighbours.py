"""Whether pictures are remembered: how near the nearest training scene is, in pixels and in latents.

Distances say something only beside others: the same is measured for scenes that nobody has painted
before, through the same autoencoder.  A model that repeats training scenes is much nearer to one than they.
"""

import numpy as np

from sana_jax.data.shapes import Shapes
from sana_jax.evals.shapes import painters

TRAINING_SEED, FRESH_SEED = 0, 2**40  # the first is that of the committed experiments' source
SIDE = 32  # cells along the shorter side that pixels are averaged in


def nearest(pipeline, pictures, count, seed=TRAINING_SEED):
    """Distances to the nearest of `count` training scenes, of pictures and of as many fresh scenes.

    Args:
      pictures: uint8 [n H W 3], painted by the model.
      count: scenes of the training source, its first ones; rounded up to a multiple of n.
      seed: of that source.
    Returns:
      {"pixels", "latents": {"sampled", "fresh": [n] rms distance to the nearest}}, of pixels in [0, 1].
    """
    size = pictures.shape[1:3]
    fresh = _scenes(len(pictures), size, FRESH_SEED)
    fresh = painters.through(pipeline, painters.painted(fresh, size))
    asked = {"sampled": pictures, "fresh": fresh}
    asked = {name: _features(pipeline, some) for name, some in asked.items()}
    least = {name: [np.full(len(pictures), np.inf, np.float32) for _ in found] for name, found in asked.items()}
    for begin in range(0, count, len(pictures)):
        scenes = _scenes(len(pictures), size, seed, begin)
        known = _features(pipeline, painters.painted(scenes, size))
        for name, found in asked.items():
            least[name] = [
                np.minimum(so_far, _distances(mine, theirs).min(axis=1))
                for so_far, mine, theirs in zip(least[name], found, known)
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


def _scenes(count, size, seed, begin=0):
    reader = Shapes(seed=seed, aspects=(size[0] / size[1],)).open()
    return [reader.scene(begin + i) for i in range(count)]


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
