"""Scores with their intervals, and the grid of pictures."""

from sana_jax.errors import InputError
from sana_jax.evals.shapes import intervals
from sana_jax.images import contact_sheet

ACROSS = 8  # pictures of a category in the grid


def scores(rows):
    """{"overall", "exact": interval, "images", "categories": {tag: interval, images, distinct prompts}} of rows.

    "exact" is the score of the stricter question whether nothing else is in the picture.
    Raises InputError: no rows.
    """
    if not rows:
        raise InputError("rows=[]: there is no picture to score")
    tags = list(dict.fromkeys(row["tag"] for row in rows))
    by_tag = {tag: [row for row in rows if row["tag"] == tag] for tag in tags}

    def parts(name):
        return [intervals.wilson(sum(row[name] for row in some), len(some)) for some in by_tag.values()]

    categories = {
        tag: part._asdict() | {"images": len(some), "prompts": len({row["prompt"] for row in some})}
        for (tag, some), part in zip(by_tag.items(), parts("correct"))
    }
    return {
        "overall": intervals.mean(parts("correct"))._asdict(),
        "exact": intervals.mean(parts("exact"))._asdict(),
        "images": len(rows),
        "categories": categories,
    }


def interval(found):
    """The `Interval` in a dictionary of `scores`."""
    return intervals.Interval(found["score"], found["low"], found["high"])


def text(name, found):
    """Lines for people: each category, and all of them."""
    yield f"{name}, {found['images']} pictures"
    for tag, part in found["categories"].items():
        yield f"  {tag:14} {interval(part)}  {part['prompts']} prompts"
    yield f"  {'all':14} {interval(found['overall'])}, nothing else there {interval(found['exact'])}"


def grid(rows, picture, side=192):
    """The first pictures of each category, uint8 [H W 3], a row each, none chosen.

    Args:
      picture: index -> uint8 [h w 3], or None where it is lost.
    """
    tags = dict.fromkeys(row["tag"] for row in rows)
    some = [row for tag in tags for row in [row for row in rows if row["tag"] == tag][:ACROSS]]
    cells = [(picture(row["index"]), f"{'+' if row['correct'] else '-'} {row['prompt']}") for row in some]
    return contact_sheet(cells, len(cells) // len(tags), "GenEval-Shapes: + is what the prompt says, - is not", side)
