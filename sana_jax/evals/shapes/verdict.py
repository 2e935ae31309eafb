"""GenEval's rules: whether the things found in a picture are those that its prompt asks for.

The rules of https://arxiv.org/abs/2310.11513: of each class asked for, the `count` surest things are
looked at; all must have the colour and stand in the relation to every thing of the group that the
relation names.  Other things in the picture do no harm, unless "exclude" names them.
"""

from typing import NamedTuple

import numpy as np

SHRINK = 0.1  # of both extents, taken off the offset of the centres
CLEAR = 0.5  # share of the offset that a relation needs along its axis


class Found(NamedTuple):
    """One thing in a picture; lengths in pixels, x to the right and y down.

    Attributes:
      shape: one of `shapes_scene.SHAPES`, or "" where the outline is none of them.
      colour: one of `shapes_scene.COLOURS`.
      box: (left, top, right, bottom).
      area: pixels.
      fit: how well the outline fits its class, an intersection over union.
    """

    shape: str
    colour: str
    box: tuple
    area: int
    fit: float


class Verdict(NamedTuple):
    """`correct` by GenEval's rules; `exact` if also nothing else is there; `reason` if not correct."""

    correct: bool
    exact: bool
    reason: str


def relations(box_a, box_b):
    """Where a is, seen from b: a set of "left of", "right of", "above", "below", empty if unclear."""
    low_a, high_a, low_b, high_b = (np.asarray(b, float) for b in (box_a[:2], box_a[2:], box_b[:2], box_b[2:]))
    offset = (low_a + high_a - low_b - high_b) / 2
    extent = high_a - low_a + high_b - low_b
    cut = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * extent, 0)
    if not cut.any():
        return set()
    dx, dy = cut / np.linalg.norm(offset)
    named = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, share in named.items() if share > CLEAR}


def judge(found, metadata):
    """The `Verdict` on a list of `Found` by one line of GenEval's metadata.

    Args:
      metadata: {"include": [{"class", "count", and "color", "position": [relation, index of the group]
        where they are asked for}], "exclude": [{"class", "count"}]}.
    """
    by_class, groups, reasons = {}, [], []
    for thing in sorted(found, key=lambda thing: -thing.fit):
        by_class.setdefault(thing.shape, []).append(thing)
    for asked in metadata["include"]:
        group = by_class.get(asked["class"], [])[: asked["count"]]
        reason = _problem(asked, group, groups)
        reasons += [reason] if reason else []
        groups.append(None if reason else group)
    for barred in metadata.get("exclude", ()):
        if (count := len(by_class.get(barred["class"], []))) >= barred["count"]:
            reasons.append(f"expected {barred['class']} < {barred['count']}, found {count}")
    exact = not reasons and len(found) == sum(asked["count"] for asked in metadata["include"])
    return Verdict(not reasons, exact, "; ".join(reasons))


def _problem(asked, group, groups):
    """What is wrong with the things found for one entry of "include", or ""."""
    name = asked["class"]
    if len(group) < asked["count"]:
        return f"expected {name} >= {asked['count']}, found {len(group)}"
    if "color" in asked and any(thing.colour != asked["color"] for thing in group):
        return f"expected {asked['color']} {name}, found {', '.join(sorted(thing.colour for thing in group))}"
    if "position" in asked:
        relation, target = asked["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}"
        if any(relation not in relations(one.box, other.box) for one in group for other in groups[target]):
            return f"expected {name} {relation} target"
    return ""
