"""The world of the bundled model: at most four coloured things on a faintly textured background.

Lengths are in units of the picture's shorter side (of another length where a source says so, see
`Shapes.grow`), x to the right and y down.  All that a scene can
have is in the tables; which combinations no training scene has is in three rules.
"""

import math
from typing import NamedTuple

from sana_jax.errors import InputError, require_choice, require_range

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent")
# GenEval's ten colours, sRGB.  The CIE Lab distance of any two is at least 39, and that to any background
# or of two backgrounds at least 31; a texture goes a few units to either side of its background.
COLOURS = {
    "red": (215, 25, 40), "orange": (250, 125, 10), "yellow": (250, 220, 30), "green": (20, 140, 50),
    "blue": (20, 75, 225), "purple": (130, 30, 140), "pink": (255, 130, 190), "brown": (110, 62, 28),
    "black": (18, 18, 18), "white": (252, 252, 252),
}  # fmt: skip
BACKGROUNDS = {
    "gray": (126, 126, 128), "beige": (204, 178, 132), "pale blue": (136, 180, 226), "pale green": (146, 202, 148),
}  # fmt: skip
TEXTURES = ("plain", "gradient", "stripes", "dots")
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.205}  # radius of the smallest circle around a thing
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_THINGS = 4
GAP = 0.04  # at least, between things of one colour
OVERLAP = 0.1  # at most, of the smaller radius, of others
CLEAR = 0.65  # of a relation that is asked for, where GenEval's rule says 0.5
# Shares of the kinds of scene, see `_specs`: one thing; two of different shapes; several alike; two
# alike and another.
KINDS = {"one": 0.3, "two": 0.4, "alike": 0.25, "mixed": 0.05}  # where nothing else is said
RELATED = 0.8  # of "two" are placed in a clear relation, the others anywhere
TRIES = 200  # for what is drawn of a scene that is asked for; for each of them, so many places:
PLACES, SCATTERED = 10, 20  # of a thing, and of all things together

_COLOUR = {name: place for place, name in enumerate(COLOURS)}
_SHAPE = {name: place for place, name in enumerate(SHAPES)}


class Thing(NamedTuple):
    """x, y, radius: of the smallest circle around it.  angle: radians, clockwise."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


class Scene(NamedTuple):
    """things: the later ones lie on top.  phase: 4 numbers in [0, 1), where and how wide the texture is."""

    things: tuple
    background: str
    texture: str
    width: float
    height: float
    phase: tuple


class Freedom(NamedTuple):
    """How much scenes differ; the fields of `Shapes` that are called the same say what they mean."""

    turn: float = 0.4
    jitter: float = 0.07
    grid: float | None = None
    apart: float | None = None
    textures: tuple = TEXTURES
    kinds: tuple = tuple(KINDS.items())


WHOLE = Freedom()


def relations(a, b, clear=0.5):
    """Where the thing `a` is, seen from `b`: a set of RELATIONS, by GenEval's rule.

    The offset of the centres, each coordinate nearer by 0.1 of both extents, is measured in the
    distance of the centres; what is beyond `clear` counts (https://arxiv.org/abs/2310.11513).
    """
    dx, dy, slack = a.x - b.x, a.y - b.y, 0.2 * (a.radius + b.radius)
    least = slack + clear * math.hypot(dx, dy)
    holds = (dx < -least, dx > least, dy < -least, dy > least)
    return {name for name, true in zip(RELATIONS, holds) if true}


# ---- what no training scene has ---------------------------------------------------------------------


def held_out_pair(colour, shape):
    """Whether no training scene has a thing of this colour and shape."""
    return (_COLOUR[colour] + 3 * _SHAPE[shape]) % 10 == 0


def held_out_triple(colour_a, colour_b, relation):
    """Whether no training scene has things of these colours, of two shapes, in this relation: a "above" b."""
    if relation in ("right of", "below"):
        colour_a, colour_b, relation = colour_b, colour_a, OPPOSITE[relation]
    axis = ("left of", "above").index(relation)
    return (_COLOUR[colour_a] + 2 * _COLOUR[colour_b] + 4 * axis) % 9 == 0


def held_out_count(n, shape):
    """Whether no training scene has n of this shape."""
    return n >= 2 and (3 * n + _SHAPE[shape]) % 8 == 0


def is_held_out(scene):
    """Whether any of the three rules keeps the scene out of training."""
    things = scene.things
    return (
        any(held_out_pair(thing.colour, thing.shape) for thing in things)
        or any(held_out_count(n, shape) for shape, n in counts(things).items())
        or any(
            held_out_triple(a.colour, b.colour, relation)
            for i, a in enumerate(things)
            for b in things[:i]
            if a.shape != b.shape
            for relation in relations(a, b)
        )
    )


def counts(things):
    """{shape: how many}, in their order."""
    found = {}
    for thing in things:
        found[thing.shape] = found.get(thing.shape, 0) + 1
    return found


# ---- drawing a scene --------------------------------------------------------------------------------


def sample(rng, width=1.0, height=1.0, held_out=False, freedom=WHOLE):
    """A random Scene: one that is held out, or one that is not.

    Args:
      rng: np.random.Generator; what is drawn from it depends on nothing else.
    """
    kind = _kind(rng.random(), freedom.kinds)
    while True:
        specs, related = _specs(rng, kind)
        scene = compose(rng, specs, width, height, related, freedom)
        if is_held_out(scene) == held_out:
            return scene


def _specs(rng, kind):
    """(things, relations) as `compose` takes them, of a kind of scene."""
    first = _below(rng, len(SHAPES))
    second = (first + 1 + _below(rng, len(SHAPES) - 1)) % len(SHAPES)
    if kind == "one":
        return [(SHAPES[first], None, None, 1)], ()
    if kind == "alike":
        return [(SHAPES[first], None, None, 2 + _below(rng, MAX_THINGS - 1))], ()
    some = 2 if kind == "mixed" else 1
    related = ((0, RELATIONS[_below(rng, 4)], 1),) if kind == "two" and rng.random() < RELATED else ()
    return [(SHAPES[first], None, None, some), (SHAPES[second], None, None, 1)], related


def compose(rng, things, width=1.0, height=1.0, related=(), freedom=WHOLE):
    """A Scene of given things at random places; held out or not is not looked at.

    Args:
      things: (shape, colour or None, size or None, count) each; None is drawn, the same for all of them.
      related: (i, relation, j) each: every one of things[i] is clearly so, seen from every one of things[j].
      width, height: of the picture, in the unit of all lengths.
    Raises:
      InputError: a name that is none, too many things, or no room for them.
    """
    require_range("things", sum(count for *_, count in things), 0, MAX_THINGS)
    for shape, colour, size, count in things:
        require_range("count", count, 1, MAX_THINGS)
        require_choice("shape", shape, SHAPES)
        require_choice("colour", colour or "red", COLOURS)
        require_choice("size", size or "small", SIZES)
    wanted = {}  # {(group, group): relations}
    for i, relation, j in related:
        require_choice("relation", relation, RELATIONS)
        for place in (i, j):
            require_range("related", place, 0, len(things) - 1)
        wanted.setdefault((i, j), set()).add(relation)
        wanted.setdefault((j, i), set()).add(OPPOSITE[relation])
    background, texture = _of(rng, BACKGROUNDS), _of(rng, freedom.textures)
    for _ in range(TRIES):
        made = []  # (group, shape, colour, size) of each thing
        for group, (shape, colour, size, count) in enumerate(things):
            made += [(group, shape, colour or _of(rng, COLOURS), size or _of(rng, SIZES))] * count
        placed = _placed(rng, made, width, height, wanted, freedom)
        if placed is not None:
            return Scene(tuple(placed), background, texture, width, height, tuple(rng.random(4).tolist()))
    raise InputError(f"things={things!r}, related={related!r}: find no room in {width:g} x {height:g}")


def _placed(rng, made, width, height, wanted, freedom):
    """Things at places of their own, or None: none were found."""
    random = rng.random
    for _ in range(SCATTERED):
        placed = []
        for group, shape, colour, size in made:
            radius = SIZES[size] * (1 + freedom.jitter * (2 * random() - 1))
            for _ in range(PLACES):
                x, y = (_place(random(), radius, side, freedom.grid) for side in (width, height))
                thing = Thing(shape, colour, size, x, y, radius, freedom.turn * (2 * random() - 1))
                pairs = ((other, wanted.get((group, its))) for other, (its, *_) in zip(placed, made))
                if all(_fits(thing, other, asked, freedom.apart) for other, asked in pairs):
                    placed.append(thing)
                    break
            else:
                break
        else:
            return placed
    return None


def _place(draw, radius, side, grid):
    """Where a thing lies wholly in the picture, for a draw from [0, 1)."""
    if grid is None:
        return radius + (side - 2 * radius) * draw
    first, last = math.ceil(radius / grid), math.floor((side - radius) / grid)
    return grid * (first + int((last - first + 1) * draw))


def _fits(a, b, wanted, apart):
    gap = GAP if a.colour == b.colour else -OVERLAP * min(a.radius, b.radius)
    if apart is not None:
        gap = max(gap, apart)
    if math.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius + gap:
        return False
    return not wanted or wanted <= relations(a, b, CLEAR)


def _below(rng, n):
    return int(n * rng.random())


def _of(rng, table):
    return list(table)[_below(rng, len(table))]


def _kind(draw, kinds):
    for kind, share in kinds:
        if not share:
            continue  # the last of the others takes what rounding leaves
        drawn, draw = kind, draw - share
        if draw < 0:
            break
    return drawn
