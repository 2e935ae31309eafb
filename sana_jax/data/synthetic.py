"""Pictures of coloured shapes with captions that say what they show; no files, the same everywhere."""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw

from sana_jax.data.captions import MAIN
from sana_jax.data.records import Record
from sana_jax.errors import require_positive

COLOURS = {
    "red": (208, 40, 48), "green": (40, 152, 72), "blue": (40, 80, 200), "yellow": (240, 208, 48), "black": (24, 24, 24),
    "white": (248, 248, 248), "purple": (128, 56, 160), "orange": (240, 128, 32),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.25, "large": 0.42}  # half a shape's extent, as a part of the shorter side


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """`records` pictures of about size x size pixels.

    aspects: height / width of the pictures, in turn.
    seed: other pictures.
    """

    records: int = 1024
    size: int = 64
    aspects: tuple[float, ...] = (1.0,)
    seed: int = 0

    def open(self):
        """A `SyntheticReader`.  Raises InputError: a number that is none."""
        require_positive("data.source.records", self.records)
        require_positive("data.source.size", self.size)
        for aspect in self.aspects:
            require_positive("data.source.aspects", aspect, float)
        return SyntheticReader(self)


class SyntheticReader:
    """The records of a Synthetic; each is painted when it is asked for."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return self.source.records

    @property
    def sizes(self):
        """Width and height, int32 [n 2]."""
        aspects = self.source.aspects
        table = [_size(self.source.size, aspect) for aspect in aspects]
        return np.array(table, np.int32)[np.arange(len(self)) % len(aspects)]

    def fingerprint(self):
        return hashlib.sha256(repr(self.source).encode()).hexdigest()[:32]

    def key(self, i):
        return f"synthetic-{i}"

    def __getitem__(self, i):
        """The Record, with a PNG and a caption such as "a large red circle on blue"."""
        aspect = self.source.aspects[i % len(self.source.aspects)]
        image, caption = paint(*_size(self.source.size, aspect), np.random.default_rng((self.source.seed, int(i))))
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return Record(self.key(i), file.getvalue(), {MAIN: caption})


def _size(side, aspect):
    return max(8, round(side / aspect**0.5)), max(8, round(side * aspect**0.5))


def paint(width, height, rng):
    """(PIL image, caption) of one shape, somewhere on a ground of another colour."""
    ground, colour = (list(COLOURS)[n] for n in rng.choice(len(COLOURS), 2, replace=False))
    shape, extent = SHAPES[rng.integers(len(SHAPES))], list(SIZES)[rng.integers(len(SIZES))]
    image = Image.new("RGB", (width, height), COLOURS[ground])
    r = SIZES[extent] * min(width, height)
    x, y = (rng.uniform(r, side - r) for side in (width, height))
    draw, box = ImageDraw.Draw(image), (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, COLOURS[colour])
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], COLOURS[colour])
    else:
        draw.ellipse(box, outline=COLOURS[colour], width=max(1, round(r * 0.4)))
    return image, f"a {extent} {colour} {shape} on {ground}"
