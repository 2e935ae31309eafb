"""Captions of shapes: true, of every kind that GenEval asks about, in known words, and never as the held-out phrasings."""

import collections
import re
import time

import numpy as np
import pytest

from sana_jax.data.captions import Captions
from sana_jax.data.records import Record
from sana_jax.data.shapes_captions import LONGEST, STYLES, WORDS, captions, phrasings, words
from sana_jax.data.shapes_scene import COLOURS, RELATIONS, SHAPES, Scene, Thing, relations, sample
from sana_jax.data.shapes_words import ONSETS, RIMES
from sana_jax.data.vocabulary import learn
from tests.caption_parser import parse

COUNT = 900
STRAY = re.compile(rf"(?:(?:{'|'.join(ONSETS)})(?:{'|'.join(RIMES)})){{2,3}}")


def generator(i):
    return np.random.Generator(np.random.Philox(key=(7, i)))


@pytest.fixture(scope="module")
def told():
    """[(scene, texts, scores)]; every fourth scene is one that no training has."""
    made = []
    for i in range(COUNT):
        rng = generator(i)
        scene = sample(rng, width=1.5 if i % 3 else 1.0, held_out=i % 4 == 0)
        made.append((scene, *captions(scene, rng)))
    return made


@pytest.fixture(scope="module")
def texts(told):
    return [text for _, texts, _ in told for text in texts.values()]


@pytest.fixture(scope="module")
def found(told):
    """[(captioner, scene, what a parser finds)]; parsing checks every caption against its scene."""
    return [(name, scene, parse(text, scene)) for scene, texts, _ in told for name, text in texts.items()]


# ---- truth ----------------------------------------------------------------------------------------------


def test_every_thing_is_named_and_nothing_false_said(found):
    assert len(found) == 4 * COUNT and set(STYLES) == {name for name, _, _ in found}
    assert sum(said.again for *_, said in found) > COUNT / 2  # what is said again was checked as well


SCENE = Scene(
    (Thing("circle", "red", "small", 0.3, 0.2, 0.11, 0.0), Thing("square", "blue", "large", 0.4, 0.75, 0.2, 0.0)),
    "gray", "stripes", 1.0, 1.0, (0.0,) * 4,
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a blue circle above a red square", "a red circle below a blue square", "a circle left of a square", "two red circles and a square",
        "a red circle", "a small square and a circle", "a red circle and a blue square on a beige background",
        "a red circle and a square on a dotted gray background", "a blue square and a red circle below it",
        "a red circle above a blue square; the circle is blue", "a red circle and a square; the square is above the circle",
        "a circle and a square; blue is above red", "over a circle is a square", "a disc and a love heart", "a circle next to a square",
    ],
)  # fmt: skip
def test_the_parser_knows_what_is_false(text):
    parse("a red circle above a big blue square on a striped gray background; blue is below red", SCENE)
    with pytest.raises(AssertionError):
        parse(text, SCENE)


# ---- what is said how often -----------------------------------------------------------------------------


def test_shares(found):
    coloured = [all(thing[2] for thing in said.things) for *_, said in found]
    bare = [not any(thing[2] for thing in said.things) for *_, said in found]
    assert 0.68 < np.mean(coloured) < 0.78 and 0.18 < np.mean(bare) < 0.32
    clear = [said for _, scene, said in found if len(scene.things) == 2 == len(said.things) and relations(*scene.things)]
    assert 0.55 < np.mean([said.related is not None for said in clear]) < 0.7
    assert {said.related[1] for said in clear if said.related} == set(RELATIONS)
    assert 0.2 < np.mean([said.ground for *_, said in found]) < 0.4
    assert 0.15 < np.mean([any(thing[1] for thing in said.things) for *_, said in found]) < 0.4


def test_all_that_geneval_asks_is_there(found):
    kinds = collections.Counter()
    for *_, said in found:
        colours = bool(said.things[0][2]), len(said.things), said.things[0][0] > 1, said.related is not None
        kinds[colours] += 1
    asked = {  # (coloured, groups, several, related)
        "single_object": (False, 1, False, False), "colors": (True, 1, False, False), "counting": (False, 1, True, False),
        "two_object": (False, 2, False, False), "color_attr": (True, 2, False, False), "position": (False, 2, False, True),
    }  # fmt: skip
    assert all(kinds[kind] > 0.015 * len(found) for kind in asked.values()), kinds
    assert kinds[True, 2, False, True] > 0.05 * len(found)


def test_scores_fall_with_what_is_left_out(told, found):
    bare, full, every = [], [], [score for *_, scores in told for score in scores.values()]
    assert min(every) >= 15 and max(every) <= 35
    for (_, _, scores), *rows in zip(told, *[iter(found)] * 4):
        for name, _, said in rows:
            (full if all(thing[2] for thing in said.things) else bare).append(scores[name])
    assert np.mean(full) - np.mean(bare) > 2
    best = Captions("power", threshold=25, temperature=0.1)
    record = next(Record("", None, texts, scores) for _, texts, scores in told if max(scores.values()) - min(scores.values()) > 4)
    shares = best.probabilities(list(record.captions), record.scores)
    assert shares.max() > 2 * shares.min() and list(record.captions)[shares.argmax()] == max(record.scores, key=record.scores.get)


# ---- words ----------------------------------------------------------------------------------------------


def test_words_are_known_and_known_words_are_used(texts):
    counts = collections.Counter(word for text in texts for word in words(text) if word.isalnum())
    stray = [word for word in counts if word not in WORDS]
    assert all(STRAY.fullmatch(word) and counts[word] <= 2 for word in stray), stray
    assert 0.03 < len(stray) / len(texts) < 0.08
    assert WORDS <= set(counts), WORDS - set(counts)
    assert {word for colour in COLOURS for word in colour.split()} | set(SHAPES) <= WORDS
    assert all(text == text.lower() == text.strip() and "  " not in text and "{" not in text for text in texts)


def test_length(texts):
    assert LONGEST - 8 < max(len(words(text)) for text in texts) <= 48
    assert min(len(words(text)) for text in texts) == 1  # "ring"


def test_words_become_tokens(texts):
    tokenizer = learn(texts, 1024)
    split = [word for word in WORDS if len(tokenizer.encode(f"a {word}, a")) != 5]
    assert set(split) <= {"sided", "sized"}, split  # which only follow a hyphen
    assert np.mean([len(tokenizer.encode(text)) - 1 for text in texts]) < 1.1 * np.mean([len(words(text)) for text in texts])


def test_determinism_and_speed():
    scenes = [sample(generator(i)) for i in range(60)]
    assert [captions(s, generator(i)) for i, s in enumerate(scenes)] == [captions(s, generator(i)) for i, s in enumerate(scenes)]
    assert captions(scenes[0], generator(1)) != captions(scenes[0], generator(0))
    rng, times = generator(0), []
    for _ in range(5):
        began = time.process_time()
        for scene in scenes:
            captions(scene, rng)
        times.append((time.process_time() - began) / len(scenes))
    assert min(times) < 4e-4, times  # 60 us on an idle core


# ---- how no caption says it -------------------------------------------------------------------------------


ASKED = [
    ([("star", "green", None, 2)], None), ([("circle", None, None, 1)], None), ([("cross", None, None, 4)], None),
    ([("circle", "red", None, 1), ("square", "blue", None, 1)], "above"), ([("ring", None, "large", 1), ("heart", None, None, 1)], "left of"),
    ([("heart", "orange", None, 1), ("crescent", "black", None, 1)], None),
]  # fmt: skip


def frames(text):
    """Three neighbours each of a text in which things are alike: ("<", "show", "me"), ("show", "me", "thing"), ..."""
    kinds = {shape for shape in SHAPES} | {f"{shape}s" for shape in SHAPES} | {"crosses"}
    alike = dict.fromkeys(kinds, "thing") | dict.fromkeys([*COLOURS, "small", "medium", "large"], "")
    alike |= dict.fromkeys(("a", "an", "one", "two", "2", "three", "3", "four", "4"), "")
    kept = ["<", *(kept for word in words(text) if (kept := alike.get(word, word))), ">"]
    return set(zip(kept, kept[1:], kept[2:]))


def test_phrasings_are_no_captions(texts):
    known = set().union(*map(frames, texts))
    forms, rng = set(), generator(0)
    for things, relation in ASKED:
        for _ in range(60):
            text = phrasings(things, relation, rng)
            new = frames(text) - known
            assert new, text
            forms |= {frame for frame in new if "<" in frame or ">" in frame}
            said = parse(text)
            assert collections.Counter((s, c, n) for n, _, c, s in said.things) == collections.Counter((s, c, n) for s, c, _, n in things)
            if relation:
                i, name, j = said.related
                assert name == relation and [said.things[i][3], said.things[j][3]] == [thing[0] for thing in things], text
            else:
                assert said.related is None, text
    assert len(forms) >= 10, forms
    assert not frames("a picture of a red circle above a blue square") - known
