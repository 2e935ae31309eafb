"""What people and captioning models would say of a scene of shapes: four captions of each, all true.

    terse      "2 green stars"
    plain      "a picture of a red circle above a blue square"
    synonyms   "please draw a violet donut that is underneath a big heart, thank you"
    rich       "a small red ring left of a large blue square on a gray background; blue is right of red"

Every caption names every thing by its shape; colours, sizes, relations and the background are left
out at random, and the score says how much was.  A rich one says things again, in words that only who
kept colours, shapes and places together can foresee: a language model learns it from them.
"""

import random
from typing import NamedTuple

from sana_jax.data.shapes_scene import OPPOSITE, relations
from sana_jax.data.shapes_words import (
    AGAIN_ALL, AGAIN_MANY, AGAIN_ONE, AGAIN_THING, AGAIN_TWO, BESIDE, CLOSINGS, COLOUR_WORDS, COLOURED_AFTER, FANCY_CLOSINGS, FANCY_OPENINGS, GROUNDS, HALVES,
    IN_HALVES, JOINED, NUMBERS, ON_GROUND, ONSETS, OPENINGS, PHRASED, PHRASED_RELATED, PHRASED_TWO, RELATED, RELATION_WORDS, RIMES, SHAPE_WORDS,
    SIZE_WORDS, STATED, STATED_IN_HALVES, STATEMENT_OPENINGS, TERSE_JOINED, TONES, WORDS, words,
)  # fmt: skip

__all__ = ["STYLES", "WORDS", "captions", "phrasings", "words"]


class Style(NamedTuple):
    """How a captioner talks: chances, but for the tables and `articles`."""

    colour: float  # that colours are said
    relation: float  # that a clear relation is
    size: float
    ground: float  # the background
    texture: float  # of a background that is said
    synonym: float  # another word than the plain one, each time
    order: float  # another sentence than "a above b" or "a and b"
    again: float  # something is said again
    stray: float  # words that mean nothing
    openings: tuple
    closings: tuple
    articles: bool


STYLES = {
    "terse": Style(0.75, 0.5, 0.1, 0.1, 0.0, 0.1, 0.1, 0.0, 0.01, ("",), ("",), False),
    "plain": Style(0.75, 0.6, 0.15, 0.15, 0.2, 0.0, 0.25, 0.0, 0.02, OPENINGS, CLOSINGS, True),
    "synonyms": Style(0.75, 0.6, 0.3, 0.3, 0.4, 0.5, 0.6, 0.1, 0.08, FANCY_OPENINGS, FANCY_CLOSINGS, True),
    "rich": Style(0.75, 0.7, 0.5, 0.6, 0.6, 0.15, 0.4, 0.9, 0.04, OPENINGS, ("", "", "."), True),
}
LONGEST = 44  # words and marks of a caption; stray words come on top


class Group(NamedTuple):
    """Things that are said as one; None where colour or size is not said."""

    shape: str
    colour: str | None
    size: str | None
    count: int


class Named(NamedTuple):
    """A group in words."""

    text: str  # "two red rings"
    noun: str  # "rings"
    colour: str | None
    size: str | None
    group: Group


def captions(scene, rng):
    """({captioner: text}, {captioner: score}) of a Scene.

    Scores are like those of CLIP, 15 to 35: the more is left out, the lower.
    Args:
      rng: np.random.Generator, of which one number is taken.
    """
    draw = random.Random(int(rng.integers(2**62))).random  # ten times as fast as numpy's, one by one
    made = {name: _caption(scene, style, draw) for name, style in STYLES.items()}
    return {name: text for name, (text, _) in made.items()}, {name: score for name, (_, score) in made.items()}


def _caption(scene, style, draw):
    groups, missing = _chosen(scene, style, draw)
    named = [_name(group, style, draw) for group in groups]
    clear, said = None, None
    if len(scene.things) == 2 == len(groups):
        a, b = (next(t for t in scene.things if _of(group, t)) for group in groups)
        found = relations(a, b)
        if clear := found and _pick(draw, sorted(found)):
            said = clear if draw() < style.relation else None
            missing += 2 * (said is None)
    if said:
        text = _related(scene, (a, b), named, said, style, draw)
    else:
        text = _opened(_joined(named, clear, style, draw), named, style, draw)
    ground = draw() < style.ground
    if ground:
        text += _ground(scene, style, draw)
    text += _pick(draw, style.closings)
    if draw() < style.again:
        text = _longer(text, _again(named, said, draw), draw)
    if draw() < style.stray:
        text, missing = _with_stray(text, draw), missing + 4
    missing += 0.5 * (not ground)
    return text, round(33 - missing + 3 * (draw() - 0.5), 2)


# ---- what is said ---------------------------------------------------------------------------------------


def _chosen(scene, style, draw):
    """([Group], how much is missing), the groups in random order."""
    coloured, sized = draw() < style.colour, draw() < style.size
    found = {}
    for thing in scene.things:
        found.setdefault((thing.shape, thing.colour if coloured else None), []).append(thing)
    groups = [
        Group(shape, colour, things[0].size if sized and len({t.size for t in things}) == 1 else None, len(things))
        for (shape, colour), things in found.items()
    ]
    if draw() < 0.5:
        groups.reverse()
    if len(groups) == 2 and coloured and groups[0].shape != groups[1].shape and draw() < 0.1:
        which = draw() < 0.5  # of two things one has its colour said
        groups[which] = groups[which]._replace(colour=None)
    missing = sum(3 * (group.colour is None) + 0.5 * (group.size is None) for group in groups) / len(groups)
    return groups, missing


def _of(group, thing):
    return group.shape == thing.shape and group.colour in (None, thing.colour)


# ---- the words for it -----------------------------------------------------------------------------------


def _pick(draw, options):
    return options[int(draw() * len(options))]


def _word(draw, options, synonym):
    """The first of the options, or, by chance, any."""
    return _pick(draw, options) if draw() < synonym else options[0]


def _name(group, style, draw):
    many = group.count > 1
    noun = _word(draw, SHAPE_WORDS[group.shape], style.synonym)[many]
    colour = group.colour and _word(draw, COLOUR_WORDS[group.colour], style.synonym)
    size = group.size and _word(draw, SIZE_WORDS[group.size], style.synonym)
    text = noun
    if colour and draw() < 0.2 * style.order:
        text = _pick(draw, COLOURED_AFTER).format(thing=text, colour=colour, **{"is": _verb(many)})
    elif colour:
        text = f"{colour} {text}"
    if size:
        text = f"{size} {text}"
    if many or style.articles:
        number = _word(draw, NUMBERS[group.count], 0.4 if many else 0.1)
        text = f"an {text}" if number == "a" and text[0] in "aeiou" else f"{number} {text}"
    return Named(text, noun, colour, size, group)


def _verb(many):
    return "are" if many else "is"


def _opened(text, named, style, draw):
    return _pick(draw, style.openings).format(**{"is": _verb(named[0].group.count > 1)}) + text


def _joined(named, clear, style, draw):
    """Things side by side in a sentence, their places not said."""
    if len(named) != 2:
        *first, last = (group.text for group in named)
        return f"{', '.join(first)} and {last}" if first else last
    if clear in ("left of", "right of") and style.articles and draw() < 0.2 * style.order:
        form = _pick(draw, BESIDE)
    elif style.articles:
        form = _word(draw, JOINED, style.order)
    else:
        form = _pick(draw, TERSE_JOINED)
    return form.format(a=named[0].text, b=named[1].text)


def _related(scene, things, named, relation, style, draw):
    """Two things and where one is of the other."""
    a, b = named
    rel = _word(draw, RELATION_WORDS[relation], max(0.5, style.synonym))
    here, there = HALVES[relation]
    fields = dict(a=a.text, b=b.text, rel=rel, first=a.noun, second=b.noun, here=here, there=there)
    if not style.articles or draw() >= style.order:
        return _opened(RELATED[0].format(**fields), named, style, draw)
    if draw() < 0.3:
        forms = STATED_IN_HALVES if draw() < 0.3 and _in_halves(scene, things, relation) else STATED
        return _pick(draw, STATEMENT_OPENINGS) + _pick(draw, forms).format(**fields)
    form = IN_HALVES if draw() < 0.15 and _in_halves(scene, things, relation) else _pick(draw, RELATED)
    return _opened(form.format(**fields), named, style, draw)


def _in_halves(scene, things, relation):
    """Whether each of two things is in its half of the picture, not only on its side of the other."""
    across = relation in ("left of", "right of")
    middle = (scene.width if across else scene.height) / 2
    low, high = sorted(t.x if across else t.y for t in things)
    return low < middle < high


def _ground(scene, style, draw):
    tone = _word(draw, TONES[scene.background], style.synonym)
    if not style.articles:
        return f", {tone} background"
    texture = GROUNDS[scene.texture][1 * (draw() < 0.5)] if draw() < style.texture else "{ground} background"
    return _pick(draw, ON_GROUND).format(ground=texture.format(ground=tone))


def _again(named, relation, draw):
    """One to four things that were said already, in other words; none where nothing was."""
    told, alone, apart = [], len(named) == 1, _apart(named)
    for _, noun, colour, size, group in named:
        many = group.count > 1
        fields = dict(noun=noun, colour=colour, size=size, count=NUMBERS[group.count][0])
        fields["is"] = _verb(many)
        told += [(forms, fields) for what, forms in AGAIN_ONE.items() if fields[what]]
        if many:
            told += [(AGAIN_MANY, fields), (AGAIN_ALL, fields)][: 1 + alone]
        elif colour and (alone or apart):
            told.append((AGAIN_THING, fields))
    if len(named) == 2 and relation:
        told += [(AGAIN_TWO["relation"], _pair(*named, relation, draw))] * 3
    if apart and named[0].group.count == named[1].group.count == 1:
        told += [(AGAIN_TWO["all" if relation else "colours"], _pair(*named, relation, draw))] * 3
    return [_pick(draw, forms).format(**fields) for forms, fields in _some(told, draw)]


def _apart(named):
    """Whether of two groups either is known by its colour."""
    colours = {thing.group.colour for thing in named}
    return len(named) == len(colours) == 2 and None not in colours


def _pair(a, b, relation, draw):
    """Fields of AGAIN_TWO; the other way round as often as not."""
    if draw() < 0.5:
        a, b, relation = b, a, OPPOSITE.get(relation)
    rel = relation and _word(draw, RELATION_WORDS[relation], 0.3)
    return dict(a=a.noun, b=b.noun, ca=a.colour, cb=b.colour, rel=rel)


def _some(told, draw):
    """One to four different ones of a list, none of an empty one."""
    drawn = [_pick(draw, told) for _ in range(1 + int(4 * draw()))] if told else []
    return [one for place, one in enumerate(drawn) if all(one is not other for other in drawn[:place])]


def _longer(text, parts, draw):
    """A caption with as many of the parts behind it as it may hold."""
    between = _pick(draw, (", and ", "; ", ", "))
    for place, part in enumerate(parts):
        longer = text + between + part if place else text.rstrip(".!") + "; " + part
        if len(words(longer)) > LONGEST:
            break
        text = longer
    return text


def _with_stray(text, draw):
    """The text with a word or two, anywhere, that nobody has heard of."""
    said = text.split(" ")
    for _ in range(1 + (draw() < 0.4)):
        stray = said[0]
        while stray in said or stray in WORDS:
            stray = "".join(_pick(draw, ONSETS) + _pick(draw, RIMES) for _ in range(2 + (draw() < 0.3)))
        said.insert(int(draw() * (len(said) + 1)), stray)
    return " ".join(said)


# ---- how no caption says it -------------------------------------------------------------------------------


def phrasings(things, relation, rng):
    """A sentence that asks for things in a way that no caption of `captions` has.

    Args:
      things: (shape, colour or None, size or None, count) each, as `shapes_scene.compose` takes them.
      relation: where the first is, seen from the second, or None.
      rng: np.random.Generator.
    """
    draw = random.Random(int(rng.integers(2**62))).random
    named = [_name(Group(*thing), PHRASED_STYLE, draw) for thing in things]
    forms = PHRASED
    if len(named) == 2 and draw() < 0.5:
        forms = PHRASED_RELATED if relation else PHRASED_TWO
    fields = dict(zip("ab", (group.text for group in named)))
    if relation:
        fields["rel"] = RELATION_WORDS[relation][0]
    joined = RELATED[0].format(**fields) if relation else _joined(named, None, PHRASED_STYLE, draw)
    return _pick(draw, forms).format(things=joined, **fields)


PHRASED_STYLE = STYLES["plain"]._replace(order=0.0)
