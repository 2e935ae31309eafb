"""GenEval's rules on boxes made by hand."""

import pytest

from sana_jax.evals.shapes.verdict import Found, judge, relations


def box(x, y, half=10):
    return x - half, y - half, x + half, y + half


def thing(shape, colour="red", at=(50, 50), fit=0.95):
    return Found(shape, colour, box(*at), 400, fit)


# a at (0, 0), both 20 wide: GenEval takes 0.1 * (20 + 20) = 4 off each coordinate of the offset, then
# divides by its whole length and wants more than 0.5.
@pytest.mark.parametrize(
    "at, expected",
    [
        ((30, 0), {"left of"}),
        ((-30, 0), {"right of"}),
        ((0, 30), {"above"}),
        ((0, -30), {"below"}),
        ((30, 30), {"left of", "above"}),  # 26 / 42.4 = 0.61 both
        ((30, 20), {"left of"}),  # 26 / 36.1 = 0.72 and 16 / 36.1 = 0.44
        ((4, 3), set()),  # nothing is left of the offset
        ((7, 0), set()),  # 3 / 7 = 0.43
        ((9, 0), {"left of"}),  # 5 / 9 = 0.56
    ],
)
def test_relations(at, expected):
    assert relations(box(0, 0), box(*at)) == expected


CIRCLE, SQUARE = thing("circle", "red", (20, 50)), thing("square", "blue", (80, 50))
ABOVE, LEFT = {"position": ["above", 0]}, {"position": ["left of", 0]}


def ask(shape, count=1, **more):
    return {"class": shape, "count": count} | more


@pytest.mark.parametrize(
    "include, found, reason",
    [
        ([ask("circle")], [CIRCLE, SQUARE], ""),
        ([ask("star")], [CIRCLE], "expected star >= 1, found 0"),
        ([ask("circle"), ask("star")], [CIRCLE, SQUARE], "expected star >= 1, found 0"),
        ([ask("circle", color="red"), ask("square", color="blue")], [CIRCLE, SQUARE], ""),
        ([ask("circle", color="blue"), ask("square", color="red")], [CIRCLE, SQUARE], "expected blue circle, found red; expected red square, found blue"),
        ([ask("square"), ask("circle", **LEFT)], [CIRCLE, SQUARE], ""),
        ([ask("square"), ask("circle", **ABOVE)], [CIRCLE, SQUARE], "expected circle above target"),
        ([ask("square", color="pink"), ask("circle", **LEFT)], [CIRCLE, SQUARE], "expected pink square, found blue; no target for circle to be left of"),
        ([ask("circle", 2)], [CIRCLE], "expected circle >= 2, found 1"),
        ([ask("circle", 2, color="red")], [CIRCLE, thing("circle", "pink")], "expected red circle, found pink, red"),
        ([ask("circle")], [], "expected circle >= 1, found 0"),
        ([ask("circle")], [thing("")], "expected circle >= 1, found 0"),
    ],
)  # fmt: skip
def test_include(include, found, reason):
    verdict = judge(found, {"include": include})
    assert verdict.reason == reason and verdict.correct == (not reason)


def test_exclude_bounds_a_count():
    asked = {"include": [ask("circle", 2)], "exclude": [ask("circle", 3)]}
    assert judge([CIRCLE] * 2, asked).correct
    assert judge([CIRCLE] * 3, asked).reason == "expected circle < 3, found 3"
    assert judge([CIRCLE] * 3, {"include": asked["include"]}).correct  # as in GenEval, more does no harm


def test_only_the_surest_are_looked_at():
    asked = {"include": [ask("circle", color="red")]}
    assert judge([thing("circle", "white", fit=0.9), CIRCLE], asked).correct
    assert not judge([thing("circle", "white", fit=0.99), CIRCLE], asked).correct


def test_exact_wants_nothing_else():
    asked = {"include": [ask("circle")]}
    assert judge([CIRCLE], asked).exact
    for more in (SQUARE, CIRCLE, thing("")):
        assert judge([CIRCLE, more], asked)[:2] == (True, False)
    assert not judge([SQUARE], asked).exact
