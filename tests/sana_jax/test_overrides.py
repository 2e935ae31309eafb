"""Values by annotation, from text or not."""

import dataclasses
import json
from typing import Literal

import jax.numpy as jnp
import pytest

from sana_jax import overrides
from sana_jax.errors import InputError
from sana_jax.models.sana import Sana


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    how: Literal["a", "bee"] = "a"

    def __post_init__(self):
        if self.rate > 1:
            raise InputError(f"rate={self.rate}: must be at most 1")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    model: Sana = Sana(width=64)
    count: int = 1
    flag: bool = False
    text: str = ""
    limit: float | None = None
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[str, float], ...] = ()
    sizes: tuple = ()


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("count", "10_000", 10_000),
        ("count", "-3", -3),
        ("flag", "true", True),
        ("flag", "False", False),
        ("text", "3", "3"),
        ("text", "", ""),
        ("limit", "none", None),
        ("limit", "null", None),
        ("limit", "2", 2.0),
        ("limit", "1e-3", 0.001),
        ("names", "('a', 'b')", ("a", "b")),
        ("names", "['a']", ("a",)),
        ("names", "()", ()),
        ("pairs", "(('a', 1), ('b', .5))", (("a", 1.0), ("b", 0.5))),
        ("sizes", "(1, [2, None])", (1, (2, None))),
        ("inner.rate", "1", 1.0),
        ("inner.how", "bee", "bee"),
        ("model.depth", "3", 3),
        ("model.position_scale", "2", 2.0),
        ("model.dtype", "bf16", jnp.bfloat16),
    ],
)
def test_text_is_read_by_the_annotation(name, text, expected):
    new, problems = overrides.override(Outer(), {name: text})
    assert problems == []
    for part in name.split("."):
        new = getattr(new, part)
    assert new == expected and type(new) is type(expected)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("count", "1.5", "an integer"),
        ("count", True, "an integer"),
        ("count", 2.0, "an integer"),
        ("count", "none", "an integer"),
        ("flag", "yes", "true or false"),
        ("flag", 1, "true or false"),
        ("limit", "nan", "a finite number or none"),
        ("limit", "inf", "a finite number or none"),
        ("limit", float("nan"), "a finite number or none"),
        ("text", 3, "a text"),
        ("names", "a", "a tuple of a text"),
        ("names", "('a', 1)", "a tuple of a text"),
        ("names", "(" * 10_000, "a tuple of a text"),
        ("pairs", "(('a',),)", "a tuple of"),
        ("inner", "3", "must be Inner(...)"),
        ("inner.how", "be", "did you mean 'bee'"),
        ("inner.rate", "3", "at most 1"),
        ("inner.rat", "1", "did you mean 'rate'"),
        ("inner.rate.x", "1", "inner.rate=0.5 has no fields"),
        ("model.name", "x", "Sana has no field 'name'"),
        ("model.parent", "x", "Sana has no field 'parent'"),
        ("model.dtype", "bf17", "did you mean 'bf16'"),
        ("nothing", "1", "Outer has no field 'nothing'; Outer has inner, model"),
    ],
)
def test_what_does_not_fit_is_named(name, value, words):
    new, problems = overrides.override(Outer(), {name: value})
    assert new == Outer()
    assert len(problems) == 1 and words in problems[0]


def test_all_problems_are_found_and_the_rest_is_set():
    new, problems = overrides.override(Outer(), {"count": "x", "text": "kept", "flag": "x"})
    assert new == Outer(text="kept")
    assert [p.partition("=")[0] for p in problems] == ["count", "flag"]


def test_settle_makes_values_as_annotated():
    loose = Outer(names=["a"], limit=1, model=Sana(width=64, dtype="bf16"), inner=Inner(rate=1))
    new, problems = overrides.settle(loose)
    assert problems == []
    assert new.names == ("a",) and type(new.limit) is float and new.model.dtype is jnp.bfloat16
    assert type(new.inner.rate) is float
    assert hash(new) == hash(dataclasses.replace(new))


def test_settle_looks_at_every_level():
    wrong = Outer(count="1", inner=Inner(how="c"), model=Sana(depth=2.5))
    _, problems = overrides.settle(wrong)
    assert [p.partition("=")[0] for p in problems] == ["inner.how", "model.depth", "count"]


def test_arguments():
    values, problems = overrides.split(["a.b=1", "--c=x=y", "d=", "e", "-f=1", "a.b=2", "=3"])
    assert values == {"a.b": "1", "c": "x=y", "d": ""}
    assert len(problems) == 4 and "given twice" in problems[2]


def test_description_is_json_and_comes_back():
    outer = Outer(names=("a",), pairs=(("b", 1.0),), model=Sana(width=64, dtype=jnp.bfloat16))
    described = json.loads(json.dumps(overrides.describe(outer)))
    assert described["model"]["dtype"] == "bfloat16" and described["model"]["class"] == "Sana"
    fields = {k: v for k, v in described["model"].items() if k != "class"}
    model, problems = overrides.override(Sana(), fields)
    assert problems == [] and model == outer.model
