"""Captioned scenes without end: what the bundled model is trained on.  No files, the same everywhere.

A record holds its scene as a few numbers and its captions; pixels are painted on the device, a batch
at once.  Record i depends on i and the fields of its source alone.
"""

import dataclasses
import hashlib
import math

import jax.numpy as jnp
import numpy as np

from sana_jax.data import shapes_render, shapes_scene
from sana_jax.data.records import Record
from sana_jax.data.shapes_captions import captions
from sana_jax.errors import InputError, require_choice, require_positive, require_range

VERSION = 1  # of what a seed gives
TABLED = 2**24  # records of which the sizes may be asked for at once


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Pictures of about size x size pixels, times `scales`.

    records: how many there are; by default more than a run can see.
    aspects: height / width of the pictures, in turn.
    scales: of their sides, one for every turn of `aspects`, in turn: (1.0, 2.0) is `size` and twice that.
    grow: things do so with the picture, lengths are shares of its shorter side.  Else lengths are shares of `size`, which
      the shorter side has, times its scale: things, their grid and distances are as many pixels in all pictures, and a
      larger one has more room.
    seed: other pictures.
    held_out: only scenes with what no other has, see `shapes_scene.is_held_out`; else none of them.

    What makes the world smaller, for a model that is; lengths as `grow` says:
    turn: of a thing at most, radians to either side.
    jitter: of a thing's radius, to either side of that of its size.
    grid: things lie at multiples of it; None is anywhere.
    apart: between any two things at least, on top of GAP and OVERLAP; None lets those of different colours touch.
    textures: of backgrounds, some of TEXTURES.
    kinds: (kind, share) each, as in KINDS; shares are 1 together.
    """

    records: int = 2**31 - 1
    size: int = 256
    aspects: tuple[float, ...] = (1.0,)
    seed: int = 0
    held_out: bool = False
    turn: float = shapes_scene.WHOLE.turn
    jitter: float = shapes_scene.WHOLE.jitter
    grid: float | None = shapes_scene.WHOLE.grid
    apart: float | None = shapes_scene.WHOLE.apart
    textures: tuple[str, ...] = shapes_scene.WHOLE.textures
    kinds: tuple[tuple[str, float], ...] = shapes_scene.WHOLE.kinds
    scales: tuple[float, ...] = (1.0,)
    grow: bool = True

    def open(self):
        """A `ShapesReader`.  Raises InputError: a field that has another value than it may."""
        require_range("data.source.records", self.records, 1, 2**31 - 1)
        require_positive("data.source.size", self.size)
        require_range("data.source.seed", self.seed, 0, 2**64 - 1)
        require_choice("data.source.held_out", self.held_out, (False, True))
        _require_tuple("data.source.aspects", self.aspects)
        for aspect in self.aspects:
            require_range("data.source.aspects", aspect, 1 / 8, 8, float)
        _require_tuple("data.source.scales", self.scales)
        for scale in self.scales:
            require_range("data.source.scales", scale, 1 / 16, 16, float)
        require_choice("data.source.grow", self.grow, (False, True))
        if not self.grow and min(self.scales) < 1:
            raise InputError(
                f"data.source.scales={self.scales!r}: must be at least 1 with data.source.grow=False, things that do not "
                "shrink need the room"
            )
        require_range("data.source.turn", self.turn, 0, math.pi, float)
        if self.apart is not None:  # with more, four medium things find hardly any room
            require_range("data.source.apart", self.apart, 0, 0.1, float)
        require_range("data.source.jitter", self.jitter, 0, 0.15, float)  # with more a small thing may be larger than a medium one
        if self.grid is not None:  # a wider one leaves four things too few places
            require_range("data.source.grid", self.grid, 1 / 1024, 1 / 4, float)
        _require_tuple("data.source.textures", self.textures)
        for texture in self.textures:
            require_choice("data.source.textures", texture, shapes_scene.TEXTURES)
        self._require_kinds()
        return ShapesReader(self)

    @property
    def freedom(self):
        """The shapes_scene.Freedom of its fields."""
        return shapes_scene.Freedom(**{name: getattr(self, name) for name in shapes_scene.Freedom._fields})

    def _require_kinds(self):
        _require_tuple("data.source.kinds", self.kinds)
        for pair in self.kinds:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InputError(f"data.source.kinds={self.kinds!r}: must be pairs of a kind and its share")
            require_choice("data.source.kinds", pair[0], tuple(shapes_scene.KINDS))
            require_range("data.source.kinds", pair[1], 0, 1, float)
        total = sum(share for _, share in self.kinds)
        if abs(total - 1) > 1e-6:
            raise InputError(f"data.source.kinds={self.kinds!r}: shares must be 1 together, they are {total}")


def _require_tuple(name, value):
    if not isinstance(value, tuple) or not value:
        raise InputError(f"{name}={value!r}: must be a tuple of one or more")


class ShapesReader:
    """The records of a Shapes."""

    def __init__(self, source):
        self.source, self._freedom = source, source.freedom

    def __len__(self):
        return self.source.records

    @property
    def sizes(self):
        """Width and height, int32 [n 2].  Raises InputError: more records than a table should have."""
        if len(self) > TABLED:
            raise InputError(
                f"data.source.records={len(self)}: at most {TABLED} where a list of all sizes is wanted, as "
                "data.buckets and features do"
            )
        sides = [self.source.size * scale for scale in self.source.scales]
        extents = [_extent(aspect, self.source.grow) for aspect in self.source.aspects]
        table = [(side * width, side * height) for side in sides for width, height in extents]
        return np.maximum(1, np.rint(table)).astype(np.int32)[np.arange(len(self)) % len(table)]

    def fingerprint(self):
        # What came later is left out where it changes nothing: runs begun before it go on.
        said = [
            f"{field.name}={getattr(self.source, field.name)!r}"
            for field in dataclasses.fields(self.source)
            if field.name not in (*shapes_scene.Freedom._fields, "scales", "grow") or getattr(self.source, field.name) != field.default
        ]
        return hashlib.sha256(f"({VERSION}, Shapes({', '.join(said)}))".encode()).hexdigest()[:32]

    def key(self, i):
        return f"shapes-{i}"

    def scene(self, i, rng=None):
        """The Scene of record i."""
        turn, place = divmod(i, len(self.source.aspects))
        width, height = _extent(self.source.aspects[place])
        unit = min(width, height)
        if not self.source.grow:
            unit /= self.source.scales[turn % len(self.source.scales)]
        return shapes_scene.sample(rng or self._rng(i), width / unit, height / unit, self.source.held_out, self._freedom)

    def __getitem__(self, i):
        """The Record, with "scene" float32 [P] in place of a picture."""
        rng = self._rng(i)
        scene = self.scene(i, rng)
        texts, scores = captions(scene, rng)
        return Record(self.key(i), None, texts, scores, {"scene": shapes_render.pack(scene)})

    def paint(self, scenes, height, width):
        """Scenes of records [b P] -> uint8 [b height width 3]; to be jitted."""
        return jnp.round(255 * shapes_render.paint(scenes, height, width)).astype(jnp.uint8)

    def _rng(self, i):
        return np.random.Generator(np.random.Philox(key=np.array([self.source.seed, i], np.uint64)))


def _extent(aspect, of_area=True):
    """(width, height) of a picture of area 1, or of one whose shorter side is 1."""
    width, height = aspect**-0.5, aspect**0.5
    unit = 1 if of_area else min(width, height)
    return width / unit, height / unit
