"""The words of captions of shapes, and the sentences they stand in; tables only.

First comes the plain word, behind it what else a person may say.  In a sentence {a} and {b} are
things, {first} and {second} their bare names, {rel} is the place of {a} seen from {b}, {is} agrees with
the first thing.
"""

import re

from sana_jax.data.shapes_scene import BACKGROUNDS

SHAPE_WORDS = {  # (singular, plural), ...
    "circle": (("circle", "circles"), ("disc", "discs"), ("disk", "disks"), ("round shape", "round shapes")),
    "square": (("square", "squares"), ("box", "boxes"), ("block", "blocks")),
    "triangle": (("triangle", "triangles"), ("three-sided shape", "three-sided shapes")),
    "star": (("star", "stars"), ("star shape", "star shapes")),
    "heart": (("heart", "hearts"), ("love heart", "love hearts"), ("heart shape", "heart shapes")),
    "ring": (("ring", "rings"), ("hoop", "hoops"), ("donut", "donuts")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs"), ("plus", "pluses")),
    "crescent": (("crescent", "crescents"), ("moon", "moons"), ("crescent moon", "crescent moons"), ("half moon", "half moons")),
}  # fmt: skip
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "lemon yellow"),
    "green": ("green", "emerald"),
    "blue": ("blue", "deep blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "brown": ("brown", "chocolate brown"),
    "black": ("black", "jet black"),
    "white": ("white", "snow white"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}
HALVES = {  # where {a} and {b} are if each has a half of the picture to itself
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
NUMBERS = {1: ("a", "one", "a single"), 2: ("two", "2", "a pair of"), 3: ("three", "3", "a group of three"), 4: ("four", "4", "a group of four")}  # fmt: skip
TONES = {tone: (tone, "grey") if tone == "gray" else (tone,) for tone in BACKGROUNDS}
GROUNDS = {  # of a texture; {ground} is the name of its tone
    "plain": ("{ground} background", "plain {ground} background"),
    "gradient": ("{ground} background with a gradient", "{ground} gradient background"),
    "stripes": ("{ground} background with stripes", "striped {ground} background"),
    "dots": ("{ground} background with dots", "dotted {ground} background"),
}

# ---- sentences of things -------------------------------------------------------------------------
VERBS = {False: ("is", "an"), True: ("are",)}  # {is} of one and of many; "an" is the other "a"
COLOURED_AFTER = ("{thing} in {colour}", "{thing} that {is} {colour}", "{colour} coloured {thing}")
RELATED = (  # these stand behind an opening, as those of JOINED do
    "{a} {rel} {b}", "{a} {rel} {b}", "{a} {rel} {b}", "{a} {rel} {b}", "{a} that is {rel} {b}", "{a} which is {rel} {b}",
    "{a} placed {rel} {b}", "{b} and {a} {rel} it", "{b}, and {rel} it {a}", "{a} and {b}, with the {first} {rel} the {second}",
)  # fmt: skip
STATED = (  # these are sentences of their own
    "{a} is {rel} {b}", "{rel} {b} is {a}", "{rel} {b} there is {a}", "there is {a} and it is {rel} {b}",
)  # fmt: skip
IN_HALVES = "{a} {here} and {b} {there}"
STATED_IN_HALVES = ("{here} {a} and {there} {b}", "{here} is {a}, {there} is {b}")
JOINED = ("{a} and {b}", "{a} and {b}", "{a} and {b}", "{a} and also {b}", "{a} with {b}", "{a} as well as {b}", "{a}, {b}")  # fmt: skip
BESIDE = ("{a} next to {b}", "{a} beside {b}", "{a} and {b} side by side")  # said of left and right
TERSE_JOINED = ("{a}, {b}", "{a}, {b}", "{a} and {b}", "{a} + {b}", "{a} {b}")

# ---- what goes before and behind --------------------------------------------------------------------
OPENINGS = (
    "", "", "", "", "", "a picture of ", "a picture of ", "a photo of ", "a photo of ", "an image of ", "a drawing of ", "a painting of ",
    "there {is} ", "here {is} ", "draw ", "draw me ", "paint ", "please paint ", "please draw ", "the picture shows ", "the image has ",
    "this is a picture of ", "we see ", "you can see ", "a scene with ", "a picture with ", "make a picture of ", "create an image of ", "i want ",
    "let the picture show ",
)  # fmt: skip
FANCY_OPENINGS = (
    *OPENINGS, "a simple picture of ", "a nice drawing of ", "a clean image with ", "a flat illustration of ", "a colorful picture of ",
    "a poster with ", "an icon of ", "can you draw ", "could you please paint ", "generate ", "picture: ", "in the picture there {is} ",
    "just ", "only ", "a cute little picture of ", "a beautiful photo of ", "a computer graphic of ", "a sketch of ", "we need an image of ",
)  # fmt: skip
STATEMENT_OPENINGS = ("", "", "", "", "in the picture ", "in this image, ", "make it so that ", "paint a scene where ", "we see that ")
CLOSINGS = ("", "", "", "", "", ".", ".", ", please", ", nothing else", "!")
FANCY_CLOSINGS = (
    *CLOSINGS, ", simple shapes", ", flat colors", ", thank you", " in the picture", ", and nothing more", ", clean and simple",
    ", drawn by a computer",
)  # fmt: skip
ON_GROUND = (" on a {ground}", " on a {ground}", " against a {ground}", ", {ground}", " in front of a {ground}")

# ---- what a rich caption says again, behind a semicolon ----------------------------------------------
AGAIN_ONE = {  # of a group, by what was said of it
    "colour": ("the {noun} {is} {colour}", "the colour of the {noun} is {colour}"),
    "size": ("the {noun} {is} {size}",),
}
AGAIN_THING = ("the {colour} thing is the {noun}", "{colour} is the {noun}")  # of one that no other has the colour of
AGAIN_MANY = ("the number of {noun} is {count}", "there are {count} {noun}")
AGAIN_ALL = ("there are {count} of them", "all {count} of them are {noun}")  # where there is nothing else
AGAIN_TWO = {  # of two things, by what was said of both
    "relation": ("the {a} is {rel} the {b}", "{rel} the {b} is the {a}", "the {b} has the {a} {rel} it"),
    "colours": ("the {a} is {ca} and the {b} is {cb}", "the {a} is {ca}, the {b} {cb}"),
    "all": (
        "the {ca} thing is {rel} the {cb} thing", "the {ca} {a} is {rel} the {cb} {b}", "{ca} is {rel} {cb}",
        "the {a} is {ca} and {rel} the {b}",
    ),
}  # fmt: skip

# ---- syllables of words that nobody has heard of -------------------------------------------------------
ONSETS = ("b", "br", "c", "ch", "d", "f", "fl", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "sh", "st", "t", "th", "v", "w")
RIMES = ("a", "an", "ar", "e", "ea", "el", "ent", "i", "in", "ing", "o", "oo", "ow", "u", "us")

TABLES = (
    SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, RELATION_WORDS, HALVES, NUMBERS, TONES, GROUNDS, VERBS, COLOURED_AFTER, RELATED, STATED, IN_HALVES,
    STATED_IN_HALVES, JOINED, BESIDE, TERSE_JOINED, OPENINGS, FANCY_OPENINGS, STATEMENT_OPENINGS, CLOSINGS, FANCY_CLOSINGS, ON_GROUND,
    AGAIN_ONE, AGAIN_THING, AGAIN_MANY, AGAIN_ALL, AGAIN_TWO,
)  # fmt: skip


def words(text):
    """The words and the marks of a text: "a ring, red." -> ["a", "ring", ",", "red", "."]."""
    return re.findall(r"[^\W_]+|[^\w\s]", text)


def _strings(table):
    if isinstance(table, str):
        yield table
    else:
        for inner in table.values() if isinstance(table, dict) else table:
            yield from _strings(inner)


WORDS = frozenset(
    word for text in _strings(TABLES) for word in words(re.sub(r"{\w+}", " ", text)) if word[0].isalnum()
)

# ---- how no caption says it: to ask whether a model has learned more than its sentences ----------------
PHRASED = (
    "show me {things}", "can you make {things}", "i need to see {things}", "give me {things}", "imagine {things}",
    "could we see {things} here", "a clean picture and in it {things}", "you need to paint this: {things}", "{things}, that is all i want",
    "so {things} it is", "let there be {things}", "my wish for today: {things}",
)  # fmt: skip
PHRASED_RELATED = (
    "draw {b} first, then {a} {rel} it", "the place of {a} is {rel} {b}", "you see {b} and i see {a} {rel} it",
    "{a} can be found {rel} {b}", "take {b} and put {a} {rel} it",
)  # fmt: skip
PHRASED_TWO = (
    "{a} together with {b}", "both {a} and {b}", "one picture of two things, {a} and {b}", "{a} has {b} for company",
)  # fmt: skip
