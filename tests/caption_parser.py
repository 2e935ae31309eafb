"""Reads captions of shapes and checks them against their scene; knows the words, not how sentences are made."""

import re
from typing import NamedTuple

from sana_jax.data.shapes_scene import BACKGROUNDS, relations
from sana_jax.data.shapes_words import COLOUR_WORDS, HALVES, NUMBERS, RELATION_WORDS, SHAPE_WORDS, SIZE_WORDS, WORDS, words

TEXTURES = {"gradient": "gradient", "striped": "stripes", "stripes": "stripes", "dotted": "dots", "dots": "dots", "plain": "plain"}


class Found(NamedTuple):
    """things: (number, size, colour, shape) each, None where not said; related: (i, relation, j)."""

    things: list
    related: tuple | None
    again: int  # things that are said a second time
    ground: bool


def _phrases():
    """{phrase: symbol}, "half moons" -> "S:crescent"; the longest come first."""
    found = {}
    for shape, forms in SHAPE_WORDS.items():
        found |= {word: f"S:{shape}" for pair in forms for word in pair}
    for sign, table in (("C", COLOUR_WORDS), ("Z", SIZE_WORDS), ("R", RELATION_WORDS), ("N", NUMBERS)):
        found |= {word: f"{sign}:{name}" for name, forms in table.items() for word in forms}
    found |= {here: f"H:{name}" for name, (here, _) in HALVES.items()}
    found["an"] = "N:1"
    found = {" ".join(words(phrase)): symbol.replace(" ", "-") for phrase, symbol in found.items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


PHRASES = _phrases()
SYMBOL = re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, PHRASES)) + r")(?!\S)")
THING = re.compile(
    r"(?<!the )(?<!\S)(?:N:(\d) )?(?:Z:(\S+) )?(?:C:(\S+) )?(?:coloured )?S:(\S+)(?: (?:in|that is|that are) C:(\S+))?"
)
GROUND = re.compile(
    r"(?:on a|against a|in front of a|,)( plain| striped| dotted)? (" + "|".join([*BACKGROUNDS, "grey"]) + r")( gradient)? background"
    r"(?: with (a gradient|stripes|dots))?"
)
PLACES = (  # (pattern, whether the second that is named is seen from the first)
    (r"T(\d)(?: that is| which is| is| placed| can)? R:(\S+) T(\d)", False),
    (r"T(\d) and it is R:(\S+) T(\d)", False),
    (r"R:(\S+) T(\d) (?:is|there is) T(\d)", True),
    (r"and R:(\S+) it T(\d)", None),
    (r"T(\d) R:(\S+) it", None),
    (r"T(\d) and T(\d) , with the S:(\S+) R:(\S+) the S:(\S+)", None),
    (r"T(\d) H:(\S+) and T(\d) H:\S+", False),
    (r"H:(\S+) (?:is )?T(\d) (?:and|,) H:\S+ (?:is )?T\d", "half"),
)
AGAIN = (  # of things that were named before
    r"the colour of the S:(?P<a>\S+) is C:(?P<ca>\S+)",
    r"the S:(?P<a>\S+) is C:(?P<ca>\S+) and the S:(?P<b>\S+) is C:(?P<cb>\S+)",
    r"the S:(?P<a>\S+) is C:(?P<ca>\S+) , the S:(?P<b>\S+) C:(?P<cb>\S+)",
    r"the S:(?P<a>\S+) is C:(?P<ca>\S+) and R:(?P<rel>\S+) the S:(?P<b>\S+)",
    r"the C:(?P<ca>\S+) S:(?P<a>\S+) is R:(?P<rel>\S+) the C:(?P<cb>\S+) S:(?P<b>\S+)",
    r"the C:(?P<ca>\S+) thing is R:(?P<rel>\S+) the C:(?P<cb>\S+) thing",
    r"C:(?P<ca>\S+) is R:(?P<rel>\S+) C:(?P<cb>\S+)",
    r"the S:(?P<a>\S+) is R:(?P<rel>\S+) the S:(?P<b>\S+)",
    r"R:(?P<rel>\S+) the S:(?P<b>\S+) is the S:(?P<a>\S+)",
    r"the S:(?P<b>\S+) has the S:(?P<a>\S+) R:(?P<rel>\S+) it",
    r"the S:(?P<a>\S+) (?:is|are) C:(?P<ca>\S+)",
    r"the C:(?P<ca>\S+) thing is the S:(?P<a>\S+)",
    r"C:(?P<ca>\S+) is the S:(?P<a>\S+)",
    r"the S:(?P<a>\S+) (?:is|are) Z:(?P<za>\S+)",
    r"the number of S:(?P<a>\S+) is N:(?P<n>\d)",
    r"there are N:(?P<n>\d) S:(?P<a>\S+)",
    r"there are N:(?P<n>\d) of them",
    r"all N:(?P<n>\d) of them are S:(?P<a>\S+)",
)


def parse(text, scene=None):
    """Found of a text.  AssertionError: it is false of the scene, or says something of a kind not known here."""
    main, *again = " ".join(word for word in words(text) if word in WORDS or not word.isalnum()).split(" ; ")
    ground = GROUND.search(main)
    if ground and scene:
        assert ground[2].replace("grey", "gray") == scene.background, text
        said = {TEXTURES[word.split()[-1]] for word in (ground[1], ground[3], ground[4]) if word}
        assert said <= {scene.texture}, text
    main = GROUND.sub("", main)
    assert "background" not in main, text
    main, things = _symbols(main), []

    def take(found):
        number, size, colour, shape, late = found.groups()
        things.append((int(number or 1), size, colour or late, shape))
        return f"T{len(things) - 1}"

    main = THING.sub(take, main)
    related = _place(main, things)
    assert (related is None) == (not re.search("[RH]:", main)), (text, main)
    _check_again(_symbols(" ; ".join(again)), scene, text)
    if scene:
        _check(things, related, scene, text)
    return Found(things, related, len(again), bool(ground))


def _symbols(text):
    return SYMBOL.sub(lambda found: PHRASES[found[0]], text)


def _place(main, things):
    for pattern, order in PLACES:
        if not (found := re.search(pattern, main)):
            continue
        groups = found.groups()
        if "with the" in pattern:
            i = next(k for k, thing in enumerate(things) if thing[3] == groups[2])
            return i, groups[3].replace("-", " "), 1 - i
        if order is None:  # "it" is the thing that was named first
            return 1, next(g for g in groups if not g.isdigit()).replace("-", " "), 0
        if order == "half":
            return int(groups[1]), groups[0].replace("-", " "), 1 - int(groups[1])
        name = next(g for g in groups if not g.isdigit()).replace("-", " ")
        first, second = (int(g) for g in groups if g.isdigit())
        return (second, name, first) if order else (first, name, second)
    return None


def _check(things, related, scene, text):
    shapes = [thing.shape for thing in scene.things]
    for shape in shapes:
        assert sum(thing[0] for thing in things if thing[3] == shape) == shapes.count(shape), (text, scene)
    assert len(shapes) == sum(thing[0] for thing in things), (text, scene)
    for number, size, colour, shape in things:
        fitting = [t for t in scene.things if t.shape == shape and colour in (None, t.colour) and size in (None, t.size)]
        assert len(fitting) >= number, (text, scene)
    if related:
        i, name, j = related
        assert name in relations(*(_only(scene, shape=things[k][3]) for k in (i, j))), (text, scene)
    elif "side by side" in text or "beside" in text or "next to" in text:
        assert relations(*scene.things) & {"left of", "right of"}, (text, scene)


def _only(scene, **wanted):
    found = [t for t in scene.things if all(getattr(t, name) == value for name, value in wanted.items())]
    assert found, (wanted, scene)
    return found[0]


def _check_again(part, scene, text):
    for pattern in AGAIN:
        for found in re.finditer(rf"(?<!\S){pattern}(?!\S)", part):
            said = {name: value.replace("-", " ") for name, value in found.groupdict().items()}
            if scene:
                _check_said(said, scene, text)
        part = re.sub(rf"(?<!\S){pattern}(?!\S)", "", part)
    assert not set(part.split()) - {";", ",", "and", "."}, (text, part)


def _check_said(said, scene, text):
    things = []
    for name in ("a", "b"):
        wanted = {"shape": said.get(name), "colour": said.get(f"c{name}"), "size": said.get(f"z{name}")}
        wanted = {key: value for key, value in wanted.items() if value}
        if wanted:
            things.append(_only(scene, **wanted))
            alike = [t for t in scene.things if all(getattr(t, key) == value for key, value in wanted.items())]
            assert len({t.shape for t in alike}) == 1, ("which one?", text)
            same = [t for t in scene.things if t.shape == things[-1].shape]
            assert "size" not in wanted or len({t.size for t in same}) == 1, text
    if "rel" in said:
        assert said["rel"] in relations(*things), (text, scene)
    if "n" in said:
        count = sum(t.shape == said.get("a", t.shape) for t in scene.things)
        assert count == int(said["n"]), text
