"""The prompts of GenEval-Shapes, as lines of GenEval's metadata with the prompt beside them.

    {"tag": "position", "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1,
     "position": ["above", 0]}], "prompt": "a circle above a square"}
"""

import functools
import hashlib
import itertools
import json

import numpy as np

from sana_jax.data import shapes_scene as world
from sana_jax.data.shapes_captions import phrasings
from sana_jax.errors import require_choice, require_positive

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's
SPLITS = {  # what a split asks for: its categories
    "seen": TAGS,  # combinations that training scenes have
    "held_out": ("counting", "colors", "position", "color_attr"),  # none that they have; a shape alone is always seen
    "phrased": TAGS,  # "seen" in sentences that no caption is made of
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("", "a picture of ")
SEED = 20241014  # of the order of the prompts


def prompts(split, per_category):
    """`per_category` lines for each category of a split, the categories taking turns.

    Always the same ones: those of a smaller number are the first of a larger, and all distinct prompts of
    a category come before the first is repeated.

    Raises InputError: an unknown split, or no positive number.
    """
    tags = SPLITS[require_choice("split", split, tuple(SPLITS))]
    require_positive("images_per_category", per_category)
    return [line for turn in zip(*(_category(tag, split, per_category) for tag in tags)) for line in turn]


def _category(tag, split, count):
    rng = np.random.default_rng([SEED, TAGS.index(tag)])
    asked = _pool(tag, split == "held_out")
    if split == "phrased":
        order = np.resize(rng.permutation(len(asked)), count)
        said = [phrasings(*asked[i], rng) for i in order]
    else:
        order, openings = np.divmod(np.resize(rng.permutation(len(asked) * len(OPENINGS)), count), len(OPENINGS))
        said = [OPENINGS[k] + sentence(asked[i]) for i, k in zip(order, openings)]
    return [line(tag, asked[i], prompt) for i, prompt in zip(order, said)]


def line(tag, asked, prompt):
    """One line of metadata.

    Args:
      asked: (things, relation); a thing is (shape, colour or None, size or None, count), and the first
        stands in the relation to the second, or the relation is None.
    """
    things, relation = asked
    include = [
        {"class": shape, "count": count} | ({"color": colour} if colour else {}) for shape, colour, _, count in things
    ]
    if relation:
        include = [include[1], include[0] | {"position": [relation, 0]}]
    found = {"tag": tag, "include": include}
    if tag == "counting":
        found["exclude"] = [{"class": item["class"], "count": item["count"] + 1} for item in include]
    return found | {"prompt": prompt}


def asked_for(metadata):
    """(things, relation) of a line, the way back from `line`."""
    things = [(item["class"], item.get("color"), None, item["count"]) for item in metadata["include"]]
    for item in metadata["include"]:
        if "position" in item:
            return (things[1], things[0]), item["position"][0]
    return tuple(things), None


def meaning(metadata):
    """What a line asks for, however it is said: "a star above a ring" is "a ring below a star".  Hashable."""
    things, relation = asked_for(metadata)
    if relation in ("right of", "below"):
        things, relation = things[::-1], world.OPPOSITE[relation]
    return (things, relation) if relation else (frozenset(things), None)


def fingerprint(split, per_category=400):
    """sha256 of the first lines of a split: whether they are still those of an earlier run."""
    text = json.dumps(prompts(split, per_category), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sentence(asked):
    """The plain prompt: "a red circle above a blue square", "a star and a ring", "three hearts"."""
    things, relation = asked
    return f" {relation or 'and'} ".join(_words(*thing) for thing in things)


def _words(shape, colour, _, count):
    name = f"{colour} {shape}" if colour else shape
    if count > 1:
        return f"{NUMBERS[count]} {name}{'es' if name.endswith(('s', 'x')) else 's'}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _one(shape, colour=None, count=1):
    return shape, colour, None, count


PAIRS = tuple(itertools.permutations(world.SHAPES, 2))
COLOURED = tuple(itertools.permutations(world.COLOURS, 2))


def _single(held_out):
    return [((_one(shape),), None) for shape in world.SHAPES]


def _two(held_out):
    return [((_one(a), _one(b)), None) for a, b in PAIRS]


def _counting(held_out):
    return [
        ((_one(shape, count=n),), None)
        for shape in world.SHAPES
        for n in NUMBERS
        if world.held_out_count(n, shape) == held_out
    ]


def _colors(held_out):
    return [
        ((_one(shape, colour),), None)
        for shape in world.SHAPES
        for colour in world.COLOURS
        if world.held_out_pair(colour, shape) == held_out
    ]


def _position(held_out):
    """Shapes alone, as in GenEval, and as many with colours; only these can be held out."""
    plain = [((_one(a), _one(b)), relation) for a, b in PAIRS for relation in world.RELATIONS]
    coloured = [
        ((_one(a, one), _one(b, other)), relation)
        for a, b in PAIRS
        for one, other in COLOURED
        if not world.held_out_pair(one, a) and not world.held_out_pair(other, b)
        for relation in world.RELATIONS
        if world.held_out_triple(one, other, relation) == held_out
    ]
    rng = np.random.default_rng(SEED)
    some = [coloured[i] for i in rng.permutation(len(coloured))[: len(plain)]]
    return some if held_out else plain + some


def _color_attr(held_out):
    return [
        ((_one(a, one), _one(b, other)), None)
        for a, b in PAIRS
        for one, other in COLOURED
        if (world.held_out_pair(one, a) or world.held_out_pair(other, b)) == held_out
    ]


POOLS = dict(zip(TAGS, (_single, _two, _counting, _colors, _position, _color_attr)))


@functools.cache
def _pool(tag, held_out):
    return POOLS[tag](held_out)
