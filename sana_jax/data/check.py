"""What would be trained on, and what is wrong with it.

    python -m sana_jax.data.check DIR|CONFIG [field=value ...]

Reads every record of a folder (pictures, tars, shards or features) or of an experiment's data as
training would, pictures decoded and captions chosen, and prints counts, sizes of batches, captions,
and every kind of problem with examples.  Of scenes, which go on without end, the first 10000 are read.
Exit status: 0 nothing is wrong, 1 something is, 2 bad input.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import sys

import numpy as np
import tqdm

from sana_jax.data import assemble, buckets, images
from sana_jax.data.captions import Captions, usable
from sana_jax.data.loader import INPUTS
from sana_jax.data.records import BadRecord
from sana_jax.data.schedule import Schedule
from sana_jax.data.sources import guess
from sana_jax.errors import InputError

EXAMPLES = 3  # of each problem
WINDOW = 4096  # records on their way at a time
SCENES = 10_000  # of a source that makes up its records


@dataclasses.dataclass
class Findings:
    """counts: of records by what they have.  captions, scores: of each captioner.  shapes: good records
    by (height, width).  bad: {reason: [count, examples]}.  notes: of the source as a whole,
    and why training would not begin.  more: records that were not looked at."""

    records: int = 0
    more: int = 0
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    captions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lengths: dict = dataclasses.field(default_factory=dict)
    scores: dict = dataclasses.field(default_factory=dict)
    shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bad: dict = dataclasses.field(default_factory=dict)
    notes: list = dataclasses.field(default_factory=list)

    @property
    def wrong(self):
        return bool(self.bad or self.notes)


def check(
    reader, *, size=512, aspect=True, captions=Captions(), tokens=300, inputs=INPUTS, texts=True, pixels=True, threads=None
):
    """Looks at every record of a reader, at the first 10000 where it paints them; returns `Findings`.

    Args:
      size, aspect, tokens: as `Data.size`, `Data.buckets` and `Data.tokens`.
      inputs: what the objective can use, as in the loader.
      captions: a record must have one that this can choose, where `texts`.
      pixels: decode pictures, instead of reading their headers only.
    """
    found, shapes = Findings(records=len(reader)), buckets.shapes(size, aspect)
    if hasattr(reader, "paint"):
        found.records = min(found.records, SCENES)
    places = buckets.assign(reader.sizes, size, aspect) if len(shapes) > 1 else np.zeros(found.records, int)

    look = _Look(shapes, captions, tokens, inputs, texts, pixels)
    try:
        look.contents = look.contents_of(reader, lambda row: shapes[places[row]])
    except InputError as error:  # then each record by what it has itself
        found.notes.append(f"training would not begin: {error}")

    def look_at(row):
        record = assemble.read_one(reader, row)
        return record if isinstance(record, BadRecord) else look(record, int(places[row]))

    threads = threads or min(32, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        progress = tqdm.tqdm(total=found.records, unit=" records", disable=None, leave=False)
        for start in range(0, found.records, WINDOW):
            rows = range(start, min(start + WINDOW, found.records))
            for row, seen in zip(rows, pool.map(look_at, rows)):
                _note(found, reader, row, seen, shapes[places[row]])
                progress.update()
        progress.close()
    found.more = len(reader) - found.records
    notes = getattr(reader, "notes", {})
    found.notes += [*notes.get("damage", ()), *notes.get("refused", ())]
    return found


class _Look:
    """Puts records into rows of batches, as training would.

    contents: of every batch, None for that of each record.
    """

    def __init__(self, shapes, captions, tokens, inputs, texts, pixels):
        self.inputs, self.texts, self.pixels, self.contents = inputs, texts, pixels, None
        self.row = assemble.Assemble(
            reader=None, schedule=Schedule((1,), 1, 0), members=None, shapes=shapes, contents=None, captions=captions,
            tokenize=None, length=tokens, seed=0, start=0, stop=1,
        )  # fmt: skip

    def contents_of(self, reader, shape_of):
        """Raises InputError: a loader would not begin."""
        return assemble.contents(reader, self.inputs, shape_of, _ids if self.texts else None)

    def __call__(self, record, place):
        """(what it has, {captioner: characters}, {captioner: score}), or a BadRecord."""
        try:
            contents = self.contents or self.contents_of([record], lambda _: self.row.shapes[place])
            header = contents.image and record.image is not None and not self.pixels
            if header:
                images.header(record.image)
            row = dataclasses.replace(self.row, contents=contents._replace(image=contents.image and not header))
            row.fill(assemble.zeros(row.layout(place)), 0, record)
            texts = usable(record) if contents.texts else {}
        except InputError as error:
            return BadRecord("features" if record.arrays else "unreadable", str(error))
        except BadRecord as bad:
            return bad
        except Exception as error:
            return BadRecord("error", f"{type(error).__name__}: {error}")
        has = {name for name, array in record.arrays.items() if array is not None}
        return has | ({"picture"} if record.image is not None else set()), {n: len(t) for n, t in texts.items()}, record.scores


def _ids(texts):
    """Stands for a tokenizer."""
    return {"ids": np.zeros((len(texts), 1), np.int32)}


def _note(found, reader, row, seen, shape):
    if isinstance(seen, BadRecord):
        entry = found.bad.setdefault(seen.reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < EXAMPLES:
            entry[1].append(f"{reader.key(row)}: {seen}")
        return
    has, lengths, scores = seen
    found.counts.update(has)
    found.shapes[shape] += 1
    for name, length in lengths.items():
        found.captions[name] += 1
        found.lengths[name] = found.lengths.get(name, 0) + length
    for name, score in scores.items():
        low, high = found.scores.get(name, (score, score))
        found.scores[name] = min(low, score), max(high, score)


def report(found):
    """The findings as lines of text."""
    good = sum(found.shapes.values())
    first = f"the first {found.records} of {found.records + found.more}" if found.more else f"{found.records}"
    lines = [f"{first} records, {good} can be trained on"]
    lines += [f"  {count} with {name}" for name, count in sorted(found.counts.items())]
    for name, count in found.captions.most_common():
        line = f"  {count} captions {name!r}, {found.lengths[name] / count:.0f} characters on average"
        low, high = found.scores.get(name, (None, None))
        lines.append(line + (f", scores {low:g} to {high:g}" if low is not None else ""))
    lines.append("batches (height x width):")
    lines += [f"  {height} x {width}: {count}" for (height, width), count in sorted(found.shapes.items())]
    for reason, (count, examples) in sorted(found.bad.items()):
        lines += [f"{count} bad records, {reason}, such as", *(f"  {example}" for example in examples)]
    if found.notes:
        lines += [f"{len(found.notes)} problems of the source", *(f"  {note}" for note in found.notes[: 10 * EXAMPLES])]
    lines.append("something is wrong" if found.wrong else "nothing is wrong")
    return lines


def _open(options, overrides):
    """(reader, arguments of `check`) for a folder or a config."""
    if not options.what.endswith(".py"):
        if overrides:
            raise InputError(f"{overrides[0]}: only a CONFIG has fields")
        source = guess(options.what)
        if hasattr(source, "allow_damaged"):
            source = dataclasses.replace(source, allow_damaged=True)  # the damage is reported
        how = dict(size=options.size, aspect=not options.square, tokens=options.tokens, texts=options.texts)
        return source.open(), how
    from sana_jax import experiment

    config = experiment.load_one(options.what, overrides)
    data, reads = config.data, config.objective.reads
    source = (
        dataclasses.replace(data.source, allow_damaged=True) if hasattr(data.source, "allow_damaged") else data.source
    )
    captions = data.captions or Captions()
    how = dict(size=data.size, aspect=data.buckets, captions=captions, tokens=data.tokens, inputs=reads)
    return source.open(), how | {"texts": "texts" in reads}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="DIR|CONFIG", help="a folder or file of data, or an experiment")
    parser.add_argument("--size", type=int, default=512, help="of a folder: pixels of a side (512)")
    parser.add_argument("--square", action="store_true", help="of a folder: squares, not aspect ratios")
    parser.add_argument(
        "--no-captions", dest="texts", action="store_false", help="of a folder: pictures need no captions"
    )
    parser.add_argument("--tokens", type=int, default=300, help="of a folder: the most states of a caption (300)")
    parser.add_argument("--headers", action="store_true", help="do not decode pictures, which is most of the time")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    options, overrides = parser.parse_known_args(arguments)
    try:
        reader, how = _open(options, overrides)
        found = check(reader, pixels=not options.headers, **how)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        shapes = {f"{height}x{width}": count for (height, width), count in found.shapes.items()}
        print(json.dumps(vars(found) | {"shapes": shapes}, indent=2, sort_keys=True))
    else:
        encoding = sys.stdout.encoding or "utf-8"  # names of files need not be text
        print("\n".join(report(found)).encode(encoding, "backslashreplace").decode(encoding))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
