"""Files of prompts: one per line, or JSON {id: {"prompt": ...}}.  What is broken is told, not lost."""

import json
import re
import unicodedata
from typing import NamedTuple

from sana_jax.errors import InputError, nearest
from sana_jax.files import read_bounded

LONGEST = 10_000  # characters; 300 tokens are some 1500
LARGEST = 64 << 20  # bytes of a file
# "category" is what MJHQ-30K's list has beside its prompts; nothing depends on it.
KEYS = ("prompt", "negative_prompt", "seed", "category")
NAME = re.compile(r"\w[\w .+=@,-]*")  # of an id, since pictures are named after it
LONGEST_NAME = 120  # bytes


class Entry(NamedTuple):
    """One prompt of a file; what is None is as for all the others."""

    place: str  # "line 3" or "id 'cat'"
    name: str  # what its pictures are named after
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


class Problem(NamedTuple):
    place: str
    reason: str


def read(path, form="lines"):
    """(entries, problems, number of blank lines), everything in the order of the file.

    Args:
      form: "lines", UTF-8 with one prompt in each; or "json", an object of id -> prompt, or of
        id -> an object with "prompt" and possibly "negative_prompt" and "seed".
    Raises:
      InputError: the file cannot be read as a whole, or has no prompt, broken ones included.
    """
    data = read_bounded(path, LARGEST)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: is UTF-16, must be UTF-8")
    results, blank = (_json if form == "json" else _lines)(data.removeprefix(b"\xef\xbb\xbf"), path)
    if not results:
        raise InputError(f"{path}: has no prompts")
    entries = [result for result in results if isinstance(result, Entry)]
    return entries, [result for result in results if isinstance(result, Problem)], blank


def _lines(data, path):
    results, blank = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        place = f"line {number}"
        try:
            prompt = line.decode("utf-8").strip(" \t\r")
        except UnicodeDecodeError as error:
            results.append(Problem(place, f"not UTF-8 ({error.reason}, byte {error.start})"))
            continue
        if reason := bad_text(prompt):
            results.append(Problem(place, reason))
        elif prompt.strip():
            results.append(Entry(place, f"{number:05d}", prompt))
        elif number <= data.count(b"\n"):  # what follows the last newline is no line
            blank += 1
    return results, blank


def bad_text(text):
    """Why this is no prompt, or None; the same for files, records and the command line."""
    if not isinstance(text, str):
        return f"must be a string, is {type(text).__name__}"
    if len(text) > LONGEST:
        return f"has {len(text)} characters, must have at most {LONGEST}"
    for i, character in enumerate(text):
        # Surrogates are what JSON can smuggle in and UTF-8 cannot hold.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            return f"has the control character U+{ord(character):04X} at character {i}"
    return None


def _json(data, path):
    try:
        # Pairs, since a dict would lose an id that is there twice.
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, _Pairs):
        raise InputError(f'{path}: must be an object, {{"id": {{"prompt": "..."}}}}, is {type(found).__name__}')
    results, seen = [], {}
    for name, value in found:
        place = f"id {name[:80]!r}"
        # Many disks hold one file for both: the second picture would take the place of the first.
        file = unicodedata.normalize("NFC", name).casefold()
        if file in seen:
            same = "is there twice" if seen[file] == name else f"is id {seen[file][:80]!r} where case does not count"
            results.append(Problem(place, same))
            continue
        seen[file] = name
        result = _entry(place, name, value)
        results.append(Problem(place, result) if isinstance(result, str) else result)
    return results, 0


class _Pairs(tuple):
    """A JSON object: (key, value) pairs."""


def _entry(place, name, value):
    """The Entry, or why there is none."""
    if not NAME.fullmatch(name) or len(name.encode("utf-8", "replace")) > LONGEST_NAME or name.endswith((" ", ".")):
        return f"is no file name: at most {LONGEST_NAME} bytes of letters, digits, spaces and . + = @ , - _"
    fields = dict(value) if isinstance(value, _Pairs) else {"prompt": value}
    for key in fields:
        if key not in KEYS:
            return f"has {key!r}, must have only {', '.join(KEYS)}{nearest(key, KEYS)}"
    if isinstance(value, _Pairs) and len(value) > len(fields):
        return "has a key twice"
    if "prompt" not in fields:
        return "has no 'prompt'"
    for key in ("prompt", "negative_prompt"):
        if key in fields and (reason := bad_text(fields[key])):
            return f"{key}: {reason}"
    if not fields["prompt"].strip():
        return "prompt: is empty"
    seed = fields.get("seed")
    if "seed" in fields and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32):
        return f"seed={seed!r}: must be an int in [0, {2**32 - 1}]"
    return Entry(place, name, fields["prompt"].strip(), fields.get("negative_prompt"), seed)
