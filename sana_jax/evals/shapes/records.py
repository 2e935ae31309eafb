"""What is kept of every picture: JSON lines that an interrupted run goes on from, and the settings it had."""

import json
import os
import pathlib

from sana_jax.checkpoints.write import write_json
from sana_jax.errors import InputError
from sana_jax.evals.shapes.detector import detect
from sana_jax.evals.shapes.verdict import judge


def read_rows(path):
    """{index: row} of a file of JSON lines, {} without one.  A last line that was cut short is taken off it.

    Raises InputError: any other line that is no row.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(text)
            rows[row["index"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} is no row of an evaluation ({error}); remove the file") from error
    return rows


def open_folder(folder, settings):
    """Makes the folder of a run, or goes on in it.

    Raises InputError: it cannot be written, or holds a run with other settings, which are named.
    """
    folder = pathlib.Path(folder)
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, settings)
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"output={str(folder)!r}: cannot be used ({error})") from error
    other = [f"{name}={known.get(name)!r}, not {value!r}" for name, value in settings.items() if known.get(name) != value]
    if other:
        raise InputError(f"output={str(folder)!r}: holds a run with {'; '.join(other)}; give it a folder of its own")
    return folder


def evaluate(paint, lines, path, batch, keep=None, say=lambda text: None, unit=None):
    """Rows of all lines, painted and judged where the file does not have them yet.

    Batches are always the same lines, so that a run that was interrupted ends in the same bits.

    Args:
      paint: (lines, their indices) -> uint8 [b H W 3]; always called with `batch` of them, the last filled up
        with repetitions.
      lines: metadata with prompts, see `prompts.prompts`.
      path: of the JSON lines.
      keep: called with (index, picture) before the row is written.
      say: called with a line of progress.
      unit: of `detect`.
    """
    rows = read_rows(path)
    for begin in range(0, len(lines), batch):
        numbers = range(begin, min(begin + batch, len(lines)))
        if all(i in rows for i in numbers):
            continue
        filled = [*numbers, *[begin] * (batch - len(numbers))]
        pictures = paint([lines[i] for i in filled], filled)
        with open(path, "a", encoding="utf-8") as file:
            for i, picture in zip(numbers, pictures):
                if i not in rows:
                    if keep is not None:
                        keep(i, picture)
                    rows[i] = row_of(i, lines[i], detect(picture, unit))
                    file.write(json.dumps(rows[i]) + "\n")
        say(f"{path}: {numbers[-1] + 1} of {len(lines)}")
    return [rows[i] for i in range(len(lines))]


def row_of(index, line, found):
    """One JSON line: the metadata, what was found, the verdict."""
    verdict = judge(found, line)
    things = [thing._asdict() for thing in found]
    return {"index": index, **line, "found": things, **verdict._asdict()}
