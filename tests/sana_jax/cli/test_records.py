"""What PNG files say of themselves: ours, other tools', and nonsense."""

import json

import numpy as np
import pytest

from sana_jax import images
from sana_jax.cli import a1111, records
from sana_jax.errors import InputError

PROMPT = 'ein Häuschen\nim 雪 "q" \\'
SETTINGS = records.SETTINGS | {
    "prompt": PROMPT, "negative_prompt": "blur", "index": 3, "height": 64, "width": 96, "steps": 3,
    "sampler": "flow-euler", "flow_shift": 3.0, "seed": 5, "guidance_scale": 4.5,
}  # fmt: skip
BATCH = {"position": 1, "prompts": ["x", PROMPT], "negative_prompts": ["", "blur"], "indices": [0, 3]}
LOADING = records.LOADING | {"model": "/models/toy, old"}
IDENTITY = {name: f"this {name}" for name in (*records.MODEL, *records.MACHINE)}
RECORD = records.make(SETTINGS, BATCH, LOADING, IDENTITY, seconds=0.5)


def write(tmp_path, **texts):
    images.save_png(tmp_path / "a.png", np.zeros((2, 3, 3), np.uint8), texts)
    return tmp_path / "a.png"


def test_there_and_back(tmp_path):
    path = write(tmp_path, **records.texts(RECORD))
    recipe, unknown = records.read(path)
    assert recipe == records.Recipe(SETTINGS, LOADING, BATCH, IDENTITY) and unknown == []
    # What a later version adds within the format is not in the way.
    more = RECORD | {"novel": [1, {"a": 2}], "versions": RECORD["versions"] | {"novel": "1"}}
    assert records.read(write(tmp_path, sana_jax=json.dumps(more)))[0] == recipe


def test_text_of_other_tools(tmp_path):
    assert records.texts(RECORD)["parameters"] == (
        f"{PROMPT}\nNegative prompt: blur\nSteps: 3, Sampler: flow-euler, CFG scale: 4.5, Seed: 5, Size: 96x64, "
        'Model hash: this model, Model: "toy, old", Version: sana_jax this sana_jax'
    )
    settings, unknown = a1111.read(records.texts(RECORD)["parameters"], "a.png", ("flow-euler",))
    assert settings == {
        "prompt": PROMPT, "negative_prompt": "blur", "steps": 3, "guidance_scale": 4.5, "seed": 5, "width": 96,
        "height": 64, "sampler": "flow-euler",
    }  # fmt: skip
    assert unknown == ["Model hash: this model", 'Model: "toy, old"', "Version: sana_jax this sana_jax"]


FOREIGN = {
    "a cat\nby night\nNegative prompt: blur,\nugly\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7, Seed: 42, Size: 512x768, "
    "Model hash: abc, Lora hashes: \"x: 1, y: 2\", Version: v1.9": (
        dict(prompt="a cat\nby night", negative_prompt="blur,\nugly", steps=30, guidance_scale=7.0, seed=42, width=512, height=768),
        ["Sampler: DPM++ 2M", "Model hash: abc", 'Lora hashes: "x: 1, y: 2"', "Version: v1.9"],
    ),
    "a cat\nSteps: 5, Sampler: Euler, Seed: 1": (dict(prompt="a cat", steps=5, sampler="flow-euler", seed=1), []),
    "Steps: 5, Sampler: Euler, Seed: 1": (dict(prompt="", steps=5, sampler="flow-euler", seed=1), []),
    "just words: two, no settings": (dict(prompt="just words: two, no settings"), []),
    "Negative prompt: only": (dict(prompt="", negative_prompt="only"), []),
}


@pytest.mark.parametrize("text", FOREIGN)
def test_pictures_of_other_tools(tmp_path, text):
    settings, unknown = FOREIGN[text]
    recipe, found = records.read(write(tmp_path, parameters=text))
    assert recipe == (records.SETTINGS | settings, records.LOADING, None, {}) and found == unknown


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nSteps: many, Sampler: Euler, Seed: 1", "its Steps is no number"),
        ("a\nSteps: 1" + "0" * 5000 + ", Sampler: Euler, Seed: 1", "its Steps is no number"),
        ("a\nSteps: 0, Sampler: Euler, Seed: 1", "its record is wrong: steps=0: must be an int in"),
        ("a\nSteps: 5, CFG scale: nan, Seed: 1", "its record is wrong: guidance_scale=nan"),
        ("a\nSteps: 5, Seed: -1, Size: 8x8", "its record is wrong: seed=-1"),
        ("a\nSteps: 5, Seed: 1, Size: 99999x8", "its record is wrong: width=99999"),
        ("a\nSteps: 5, Seed: 1, Size: big", "its Size must be <width>x<height>"),
    ],
)
def test_nonsense_of_other_tools(tmp_path, text, message):
    with pytest.raises(InputError, match="a.png: ") as caught:
        records.read(write(tmp_path, parameters=text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


HOSTILE = {
    "{": "is not readable as JSON",
    "[" * 200_000: "is not readable as JSON",
    '{"a":' * 100_000: "is not readable as JSON",
    "[]": "must be a JSON object, is list",
    "3": "must be a JSON object, is int",
    '{"format": 2}': "has format=2, must have 1",
    '{"format": "1"}': "has format='1', must have 1",
    "{}": "has format=None, must have 1",
    '{"format": 1}': "its record is wrong: prompt=None: must be a string",
    json.dumps(RECORD | {"prompt": 3}): "prompt=3: must be a string",
    json.dumps(RECORD | {"prompt": "\ud800"}): "its record is wrong: prompt: has the control character U+D800",
    json.dumps(RECORD | {"prompt": "a\0b"}): "its record is wrong: prompt: has the control character U+0000 at character 1",
    json.dumps(RECORD | {"negative_prompt": "x" * 10_001}): "negative_prompt: has 10001 characters, must have at most 10000",
    json.dumps(RECORD | {"batch": BATCH | {"prompts": ["a\0b", PROMPT]}}): "batch.prompts must be a list of one string",
    json.dumps(RECORD | {"steps": "3"}): "steps='3': must be an int",
    json.dumps(RECORD | {"steps": 10**9}): "steps=1000000000: must be an int",
    json.dumps(RECORD | {"height": 64.5}): "height=64.5: must be an int, in pixels",
    json.dumps(RECORD | {"guidance_scale": float("nan")}): "guidance_scale=nan: must be a number",
    json.dumps(RECORD | {"guidance_interval": 3}): "guidance_interval=3: must be two numbers",
    json.dumps(RECORD | {"guidance_interval": {"a": 1, "b": 2}}): "guidance_interval={'a': 1, 'b': 2}: must be two numbers",
    json.dumps(RECORD | {"pag_layers": ["x"]}): "pag_layers[0]='x': must be an int",
    json.dumps(RECORD | {"sampler": ["scm"]}): "sampler=['scm']: must be one of",
    json.dumps(RECORD | {"index": -1}): "index=-1: must be an int",
    json.dumps(RECORD | {"init_image": {}}): "init_image={}: must be a string",
    json.dumps(without("batch")): "batch must be an object",
    json.dumps(RECORD | {"loading": []}): "loading must be an object",
    json.dumps(RECORD | {"loading": LOADING | {"model": 3}}): "loading.model must be a string",
    json.dumps(RECORD | {"loading": LOADING | {"dtype": None}}): "loading.dtype must be a string",
    json.dumps(RECORD | {"versions": "1"}): "versions must be an object",
    json.dumps(without("model_sha256")): "model_sha256 must be a string",
    json.dumps(RECORD | {"versions": {}}): "sana_jax must be a string",
    json.dumps(RECORD | {"batch": {}}): "batch must be an object with position, prompts, negative_prompts, indices",
    json.dumps(RECORD | {"batch": BATCH | {"indices": []}}): "batch.indices must be a list of 1 to 1024 numbers",
    json.dumps(RECORD | {"batch": BATCH | {"indices": [3] * 5000}}): "batch.indices must be a list of 1 to 1024 numbers",
    json.dumps(RECORD | {"batch": BATCH | {"indices": [0, "3"]}}): "batch.indices must be a list of 1 to 1024 numbers",
    json.dumps(RECORD | {"batch": BATCH | {"prompts": [PROMPT] * 3}}): "batch.prompts must be a list of one string",
    json.dumps(RECORD | {"batch": BATCH | {"prompts": [1, PROMPT]}}): "batch.prompts must be a list of one string",
    json.dumps(RECORD | {"batch": BATCH | {"negative_prompts": [""]}}): "batch.negative_prompts must be a list of as many",
    json.dumps(RECORD | {"batch": BATCH | {"position": 2}}): "batch.position must be in [0, 1]",
    json.dumps(RECORD | {"batch": BATCH | {"position": True}}): "batch.position must be in [0, 1]",
    json.dumps(RECORD | {"batch": BATCH | {"position": 0}}): "batch must be that of this picture",
}


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_nonsense_ends_in_one_line(tmp_path, number):
    text = list(HOSTILE)[number]
    with pytest.raises(InputError, match="a.png: its record ") as caught:
        records.read(write(tmp_path, sana_jax=text, parameters="a cat"))
    assert HOSTILE[text] in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_that_says_nothing(tmp_path):
    with pytest.raises(InputError, match="a.png: does not say how it was made"):
        records.read(write(tmp_path))


def recipe(**changes):
    return records.Recipe(SETTINGS, LOADING, BATCH, IDENTITY)._replace(**changes)


def test_what_differs_is_named():
    assert records.difference(recipe(), SETTINGS, IDENTITY) is None
    assert records.difference(recipe(), SETTINGS | {"steps": 4}, IDENTITY) == ("steps", 3, 4)
    assert records.difference(recipe(), SETTINGS, IDENTITY | {"chi_sha256": "b"}) == ("chi_sha256", "this chi_sha256", "b")
    # The machine may change between two halves of a long run; the file that a path names may not.
    assert records.difference(recipe(), SETTINGS | {"init_image": "b"}, IDENTITY | {"jax": "b"}) is None
    assert records.difference(recipe(), SETTINGS | {"init_image_sha256": "b"}, IDENTITY)[0] == "init_image_sha256"
    assert records.changed(recipe(), [SETTINGS], IDENTITY) == ""
    assert records.changed(recipe(), [SETTINGS | {"seed": 6}], IDENTITY) == "a variation: seed 5 -> 6"
    assert records.changed(recipe(), [SETTINGS], IDENTITY | {"dtype": "b"}) == "a variation: dtype 'this dtype' -> 'b'"
    assert records.changed(recipe(), [SETTINGS] * 2, IDENTITY) == "a variation in 2 pictures"


@pytest.mark.parametrize("name", IDENTITY)
def test_what_must_be_the_same(name):
    other = IDENTITY | {name: "other"}
    with pytest.raises(InputError) as caught:
        records.require_same(recipe(), other, [], "a.png")
    assert str(caught.value) == (
        f"{name}='other': a.png was painted with 'this {name}', so that its bits cannot be promised; "
        f"--allow-mismatch {name} goes on"
    )
    records.require_same(recipe(), other, [name], "a.png")
    records.require_same(recipe(batch=None, identity={}), other, [], "a.png")


@pytest.mark.parametrize("name", ["model", "dc_ae", "text"])
def test_a_picture_names_no_pickle(name):
    named = recipe(loading=LOADING | {name: "evil.PTH"})
    with pytest.raises(InputError, match=f"{name}='evil.PTH': is a pickle that a.png names; pass --{name.replace('_', '-')} "):
        records.refuse_pickles(named, {}, "a.png")
    records.refuse_pickles(named, {name: "evil.PTH"}, "a.png")
    records.refuse_pickles(recipe(), {}, "a.png")
