"""The choice of captions against probabilities worked out by hand, and against what is drawn."""

import collections
import math

import numpy as np
import pytest

from sana_jax.data.captions import LONGEST, Captions, usable
from sana_jax.data.records import BadRecord, Record
from sana_jax.errors import InputError

RECORD = Record("r", captions={"a": "A", "prompt": "P", "b": "B", "c": "C"}, scores={"a": 30.0, "b": 27.0, "c": 20.0})
NAMES = list(RECORD.captions)


@pytest.mark.parametrize(
    "captions, expected",
    [
        (Captions("first"), [0, 1, 0, 0]),
        (Captions("uniform"), [0.25, 0.25, 0.25, 0.25]),
        (Captions("proportion", proportion=(("a", 3), ("c", 1), ("absent", 4))), [0.75, 0, 0, 0.25]),
        # 27 / 30 = 0.9, and 0.9 ** 10 = 0.3486784401
        (Captions("power"), [1 / 1.3486784401, 0, 0.3486784401 / 1.3486784401, 0]),
        (Captions("power", temperature=1.0), [30 / 57, 0, 27 / 57, 0]),
        (Captions("power", threshold=28.0), [1, 0, 0, 0]),
        (Captions("power", threshold=31.0), [1, 0, 0, 0]),  # none reaches it: the best
        (Captions("power", threshold=0.0, temperature=1.0), [30 / 77, 0, 27 / 77, 20 / 77]),
        (Captions("softmax", temperature=3.0), [1, 0, math.exp(-1), math.exp(-10 / 3)]),
    ],
)
def test_probabilities(captions, expected):
    found = captions.probabilities(NAMES, RECORD.scores)
    np.testing.assert_allclose(found, np.array(expected) / sum(expected), rtol=1e-12)


def test_a_low_temperature_does_not_overflow():
    found = Captions("softmax", temperature=1e-4).probabilities(NAMES, RECORD.scores)
    np.testing.assert_array_equal(found, [1, 0, 0, 0])
    found = Captions("power", temperature=1e-4).probabilities(NAMES, RECORD.scores)
    np.testing.assert_array_equal(found, [1, 0, 0, 0])


@pytest.mark.parametrize("how", ["power", "softmax"])
@pytest.mark.parametrize("names, expected", [(["x", "prompt"], [0, 1]), (["x", "y"], [1, 0])])
def test_without_scores_the_pictures_own_caption_is_taken(how, names, expected):
    np.testing.assert_array_equal(Captions(how).probabilities(names, {"other": 9.0}), expected)


@pytest.mark.parametrize(
    "captions", [Captions(), Captions("power", temperature=1.0), Captions("softmax", temperature=5.0)]
)
def test_draws_follow_the_probabilities(captions):
    count, rng = 4000, np.random.default_rng(0)
    drawn = collections.Counter(captions.choose(RECORD, rng) for _ in range(count))
    assert all(RECORD.captions[name] == text for name, text in drawn)
    for name, share in zip(NAMES, captions.probabilities(NAMES, RECORD.scores)):
        found = drawn[name, RECORD.captions[name]] / count
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / count)
        assert share > 0 or found == 0


def test_a_choice_takes_one_number_whatever_the_rule():
    for captions in (Captions("first"), Captions("uniform"), Captions("power")):
        rng = np.random.default_rng(1)
        captions.choose(RECORD, rng)
        reference = np.random.default_rng(1)
        reference.random()
        assert rng.random() == reference.random()


def test_the_largest_draw_is_a_caption_that_has_a_share():
    class Largest:
        def random(self):
            return math.nextafter(1.0, 0.0)

    assert Captions("power").choose(RECORD, Largest())[0] == "b"


@pytest.mark.parametrize(
    "text, word",
    [
        (b"x", "bytes"),
        (3, "int"),
        (None, "NoneType"),
        (["a"], "list"),
        ("a\0b", "NUL"),
        ("\udcff", "UTF-8"),
        ({"a": "b"}, "dict"),
    ],
)
def test_what_is_no_text_is_a_bad_record(text, word):
    record = RECORD._replace(captions={"prompt": "fine", "x": text})
    with pytest.raises(BadRecord, match=word) as caught:
        Captions("first").choose(record, np.random.default_rng(0))
    assert caught.value.reason == "caption"


def test_blank_captions_are_absent_and_long_ones_cut():
    captions = {"a": "", "b": " \n\t", "c": "  c  ", "d": "x" * (1 << 20), "e": "é" * LONGEST + "\0"}
    found = usable(Record("r", captions=captions))
    assert list(found) == ["c", "d", "e"] and found["c"] == "c" and len(found["d"]) == len(found["e"]) == LONGEST


@pytest.mark.parametrize("captions", [{}, {"prompt": ""}, {"a": " "}])
def test_no_caption_is_a_bad_record(captions):
    with pytest.raises(BadRecord, match="caption"):
        Captions().choose(Record("r", captions=captions), np.random.default_rng(0))


def test_proportion_names_that_no_caption_has():
    with pytest.raises(BadRecord, match="nobody"):
        Captions("proportion", proportion=(("nobody", 1.0),)).choose(RECORD, np.random.default_rng(0))


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(how="powr"), "did you mean 'power'"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(how="proportion"), "proportion"),
        (dict(how="proportion", proportion=(("a", -1.0),)), "proportion"),
        (dict(how="uniform", proportion=(("a", 1.0),)), "proportion"),
    ],
)
def test_bad_fields(fields, word):
    with pytest.raises(InputError, match=word):
        Captions(**fields)
