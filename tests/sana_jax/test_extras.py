"""sana_jax.json: what is refused, by name."""

import json

import pytest

from sana_jax import extras
from sana_jax.errors import InputError

FIELDS = {
    "stack": "nvlabs", "complex_human_instruction": "", "max_sequence_length": 48, "steps": 20, "guidance_scale": 3.0,
    "dtype": "float32", "vocabulary": ["a", "red", "2"],
}  # fmt: skip


def test_there_and_back(tmp_path):
    assert extras.read(tmp_path) == {}
    extras.write(tmp_path, FIELDS | {"stack": None})
    assert extras.read(tmp_path) == {name: value for name, value in FIELDS.items() if name != "stack"}
    (tmp_path / extras.FILE).write_text('{"steps": null}')
    assert extras.read(tmp_path) == {}
    assert FIELDS.keys() == extras.CHECKS.keys()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("steps", 0, r"steps=0: must be an int in \[1, 1000\]"),
        ("steps", "20", "steps='20': must be an int"),
        ("guidance_scale", -1, "guidance_scale=-1: must be a number"),
        ("max_sequence_length", True, "max_sequence_length=True: must be an int"),
        ("complex_human_instruction", 3, "complex_human_instruction=3: must be a string"),
        ("dtype", "fp8", "dtype='fp8': must be one of"),
        ("vocabulary", {}, "vocabulary={}: must be a list of words"),
        ("vocabulary", [], r"vocabulary=\[\]: must be a list of words"),
        ("vocabulary", ["a", "Red"], r"vocabulary\[1\]='Red': must be one word"),
        ("vocabulary", ["left of"], r"vocabulary\[0\]='left of': must be one word"),
        ("vocabulary", [2], r"vocabulary\[0\]=2: must be one word"),
    ],
)
def test_wrong(tmp_path, field, value, message):
    (tmp_path / extras.FILE).write_text(json.dumps({field: value}))
    with pytest.raises(InputError, match=f"{extras.FILE}: {message}"):
        extras.read(tmp_path)
    with pytest.raises(InputError, match=f"^{message}"):
        extras.write(tmp_path, {field: value})


def test_an_unknown_field_is_left_out_when_read_and_never_written(tmp_path):
    (tmp_path / extras.FILE).write_text('{"stak": "nvlabs", "steps": 3}')
    with pytest.warns(UserWarning, match=f"{extras.FILE}: stak: not known here"):
        assert extras.read(tmp_path) == {"steps": 3}
    with pytest.raises(InputError, match="field='stak': must be one of 'stack'.*did you mean 'stack'"):
        extras.write(tmp_path, {"stak": "nvlabs"})
