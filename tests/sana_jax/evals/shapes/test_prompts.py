"""The prompts: GenEval's format, splits that keep their promise, the same ones for ever."""

import hashlib
import json

import pytest

from sana_jax.data import shapes_scene as world
from sana_jax.evals.shapes.prompts import SPLITS, TAGS, asked_for, fingerprint, line, meaning, prompts


@pytest.fixture(scope="module")
def lines():
    return {split: prompts(split, 120) for split in SPLITS}


def test_the_format_is_that_of_geneval():
    asked = (("circle", "red", None, 1), ("square", None, None, 1)), "above"
    made = line("position", asked, "a red circle above a square")
    assert made == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
        ],
        "prompt": "a red circle above a square",
    }
    assert asked_for(made) == asked
    counting = line("counting", ((("star", None, None, 3),), None), "three stars")
    assert counting["exclude"] == [{"class": "star", "count": 4}]


def held_out(line):
    """Whether what a line asks for is kept out of training, by the world's own rules."""
    things, relation = asked_for(line)
    colours = [colour for _, colour, _, _ in things]
    return (
        any(world.held_out_count(count, shape) for shape, _, _, count in things)
        or any(colour and world.held_out_pair(colour, shape) for shape, colour, _, _ in things)
        or bool(relation and all(colours) and world.held_out_triple(*colours, relation))
    )


def test_splits_keep_their_promise(lines):
    assert not any(map(held_out, lines["seen"])) and not any(map(held_out, lines["phrased"]))
    assert all(map(held_out, lines["held_out"]))


def test_categories_ask_for_what_they_are_about(lines):
    for split, some in lines.items():
        assert [one["tag"] for one in some] == list(SPLITS[split]) * 120
        for one in some:
            counts = [item["count"] for item in one["include"]]
            coloured = ["color" in item for item in one["include"]]
            assert (max(counts) > 1) == (one["tag"] == "counting")
            assert len(counts) == 1 + (one["tag"] in ("two_object", "position", "color_attr"))
            assert any("position" in item for item in one["include"]) == (one["tag"] == "position")
            assert all(coloured) if one["tag"] in ("colors", "color_attr") else one["tag"] == "position" or not any(coloured)
    shown = [one for one in lines["seen"] if one["tag"] == "position"]
    assert 40 < sum("color" in one["include"][0] for one in shown) < 80  # GenEval's kind, and as many with colours


def test_a_smaller_run_is_the_beginning_of_a_larger(lines):
    for split in SPLITS:
        assert prompts(split, 7) == lines[split][: 7 * len(SPLITS[split])]


def test_distinct_prompts_come_first(lines):
    several = {"single_object": 16, "counting": 42}
    for tag in TAGS:
        said = [one["prompt"] for one in lines["seen"] if one["tag"] == tag]
        distinct = several.get(tag, len(said))
        assert len(set(said[:distinct])) == min(distinct, len(set(said))) >= min(distinct, 100)


def test_sentences(lines):
    said = {one["prompt"] for one in lines["seen"]}
    for prompt in ("a picture of a circle", "an orange crescent", "two crosses", "four rings"):
        assert prompt in said or f"a picture of {prompt}" in said
    assert not said & {one["prompt"] for one in lines["phrased"]}


def test_they_are_the_same_for_ever(lines):
    """The splits were fixed before the model was trained."""
    assert fingerprint("phrased", 120)[:16] == "252badcc7201a039"
    text = json.dumps({split: lines[split] for split in ("seen", "held_out")}, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "97764c7801bccd3b"


def test_meaning_is_that_of_the_picture():
    circle, square = ("circle", "red", None, 1), ("square", None, None, 1)

    def of(things, relation=None):
        return meaning(line("position", (things, relation), ""))

    assert of((circle, square)) == of((square, circle)) != of((circle,))
    assert of((circle, square), "above") == of((square, circle), "below") != of((circle, square), "below")
    assert of((circle, square), "right of") == of((square, circle), "left of") != of((square, circle))
