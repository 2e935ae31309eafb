"""Files of prompts: what is read, what is broken and by which line or id."""

import json

import pytest

from sana_jax.cli import prompt_files
from sana_jax.cli.prompt_files import Entry, Problem
from sana_jax.errors import InputError


def read(tmp_path, data, form="lines"):
    path = tmp_path / "prompts"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return prompt_files.read(path, form)


def test_lines(tmp_path):
    data = b"\xef\xbb\xbfone cat\r\n\n  two\tdogs \xe9\x9b\xaa  \n \t\nlast"
    entries, problems, blank = read(tmp_path, data)
    assert entries == [
        Entry("line 1", "00001", "one cat"), Entry("line 3", "00003", "two\tdogs 雪"), Entry("line 5", "00005", "last"),
    ]  # fmt: skip
    assert (problems, blank) == ([], 2)
    # Other separators than a newline belong to the prompt: a line number is that of an editor.
    entries, _, _ = read(tmp_path, "a\u2028b\nc")
    assert [entry.prompt for entry in entries] == ["a\u2028b", "c"]


def test_broken_lines(tmp_path):
    long = "x" * (prompt_files.LONGEST + 1)
    data = b"a\x00b\nfine\n\xff\xfeb\n\x1b[31mred\n" + long.encode() + b"\ncut \xe9\x9b\n\xc2\x85\n" + long[1:].encode()
    entries, problems, blank = read(tmp_path, data)
    assert [entry.place for entry in entries] == ["line 2", "line 8"] and blank == 0
    assert problems == [
        Problem("line 1", "has the control character U+0000 at character 1"),
        Problem("line 3", "not UTF-8 (invalid start byte, byte 0)"),
        Problem("line 4", "has the control character U+001B at character 0"),
        Problem("line 5", "has 10001 characters, must have at most 10000"),
        Problem("line 6", "not UTF-8 (unexpected end of data, byte 4)"),
        Problem("line 7", "has the control character U+0085 at character 0"),
    ]


def test_json(tmp_path):
    found = {
        "a cat": {"prompt": " one cat\nby night ", "negative_prompt": "", "seed": 7},
        "0003": "plain",
        "雪": {"prompt": "snow", "category": "nature"},
    }
    entries, problems, blank = read(tmp_path, json.dumps(found, ensure_ascii=False), "json")
    assert entries == [
        Entry("id 'a cat'", "a cat", "one cat\nby night", "", 7),
        Entry("id '0003'", "0003", "plain"),
        Entry("id '雪'", "雪", "snow"),
    ]
    assert (problems, blank) == ([], 0)


BROKEN = {
    '"../up": "x"': "is no file name: at most 120 bytes of letters, digits, spaces and . + = @ , - _",
    '"/etc/x": "x"': "is no file name",
    '".hidden": "x"': "is no file name",
    '"a\\u0000": "x"': "is no file name",
    '"a.": "x"': "is no file name",
    '"": "x"': "is no file name",
    '"' + "雪" * 41 + '": "x"': "is no file name",
    '"\\ud800": "x"': "is no file name",
    '"a": 3': "prompt: must be a string, is int",
    '"a": null': "prompt: must be a string, is NoneType",
    '"a": ["x"]': "prompt: must be a string, is list",
    '"a": {}': "has no 'prompt'",
    '"a": {"prompt": " "}': "prompt: is empty",
    '"a": {"prompt": "x\\u0000"}': "prompt: has the control character U+0000 at character 1",
    '"a": {"prompt": "\\ud800"}': "prompt: has the control character U+D800 at character 0",
    '"a": {"prompt": "x", "promt": "y"}': "has 'promt', must have only prompt, negative_prompt, seed, category; did you mean 'prompt'?",
    '"a": {"prompt": "x", "prompt": "y"}': "has a key twice",
    '"a": {"prompt": "x", "negative_prompt": 3}': "negative_prompt: must be a string, is int",
    '"a": {"prompt": "x", "seed": -1}': "seed=-1: must be an int in [0, 4294967295]",
    '"a": {"prompt": "x", "seed": true}': "seed=True: must be an int",
    '"a": {"prompt": "x", "seed": null}': "seed=None: must be an int",
    '"fine": "again"': "is there twice",
    '"FINE": "again"': "is id 'fine' where case does not count",
}


@pytest.mark.parametrize("entry", BROKEN)
def test_broken_entries(tmp_path, entry):
    entries, problems, _ = read(tmp_path, '{"fine": "x", ' + entry + ', "last": "y"}', "json")
    assert [e.name for e in entries] == ["fine", "last"], "the rest is read"
    ((place, reason),) = problems
    assert place.startswith("id ") and reason.startswith(BROKEN[entry])


@pytest.mark.parametrize(
    "data, form, message",
    [
        (b"", "lines", "has no prompts"),
        (b" \n\n\t\n", "lines", "has no prompts"),
        ("one".encode("utf-16"), "lines", "is UTF-16, must be UTF-8"),
        (b"{}", "json", "has no prompts"),
        (b"[]", "json", 'must be an object, {"id": {"prompt": "..."}}, is list'),
        (b'"x"', "json", "must be an object"),
        (b"{", "json", "not readable as JSON (Expecting property name"),
        (b"\xff", "json", "not readable as JSON ('utf-8' codec can't decode"),
        (b'{"a":' * 100_000, "json", "not readable as JSON ("),
        (b"[" * 100_000, "json", "not readable as JSON ("),
    ],
)
def test_files_that_are_none(tmp_path, data, form, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, data, form)
    assert str(caught.value).startswith(f"{tmp_path / 'prompts'}: {message}")
    with pytest.raises(InputError, match="cannot be read .Is a directory"):
        prompt_files.read(tmp_path, form)


def test_ids_that_one_file_would_hold(tmp_path):
    entries, problems, _ = read(tmp_path, '{"Stra\u00dfe": "x", "STRASSE": "y", "\u00e9": "x", "e\u0301": "y"}', "json")
    assert [e.name for e in entries] == ["Straße", "é"] and [p.place for p in problems] == ["id 'STRASSE'", "id 'e\u0301'"]


def test_a_file_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "LARGEST", 1 << 20)
    with pytest.raises(InputError, match="must have at most 1 MB"):
        read(tmp_path, b"x" * ((1 << 20) + 1))


def test_all_broken_is_no_error_by_itself(tmp_path):
    assert read(tmp_path, b"\x00\n\xff\n")[::2] == ([], 0)
