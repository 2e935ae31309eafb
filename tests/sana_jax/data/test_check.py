"""`python -m sana_jax.data.check`: what it counts, what it finds, and how it ends."""

import json
import os
import pathlib
import tarfile

import numpy as np
import pytest

from sana_jax.data import array_record
from sana_jax.data.check import check, main
from sana_jax.data.records import Record
from sana_jax.data.synthetic import Synthetic
from tests.sana_jax.data.pictures import bad_pictures, encoded, scene
from tests.sana_jax.data.test_folder import PNG, write
from tests.sana_jax.data.test_tar import DAMAGED, pack, special


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_folder_in_which_nothing_is_wrong(tmp_path, capsys):
    write(
        tmp_path,
        {
            "a.png": encoded(scene(64, 64)),
            "a.txt": "four",
            "inside/b.png": encoded(scene(128, 64)),
            "inside/b.txt": "sixsix",
        },
    )
    write(tmp_path, {"a_x.json": '{"a": {"x": "by another"}}', "a_x_clip_score.json": '{"a": {"x": 27.5}}'})
    status, out, _ = run(capsys, tmp_path, "--size", 512)
    assert status == 0
    assert out.splitlines() == [
        "2 records, 2 can be trained on",
        "  2 with picture",
        "  2 captions 'prompt', 5 characters on average",
        "  1 captions 'x', 10 characters on average, scores 27.5 to 27.5",
        "batches (height x width):",
        "  352 x 704: 1",
        "  512 x 512: 1",
        "nothing is wrong",
    ]


def test_every_bad_picture_is_named(tmp_path, capsys):
    bad = bad_pictures()
    write(tmp_path, {f"{name}.png".replace(" ", "_"): data for name, (data, _) in bad.items()} | {"good.png": PNG})
    status, out, _ = run(capsys, tmp_path, "--square", "--size", 32, "--no-captions", "--json")
    found = json.loads(out)
    assert status == 1 and found["records"] == len(bad) + 1 and found["shapes"] == {"32x32": 1}
    expected = {}
    for _, reason in bad.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert {reason: count for reason, (count, _) in found["bad"].items()} == expected
    status, out, _ = run(capsys, tmp_path, "--square", "--size", 32)
    assert "1 bad records, caption, such as\n  good.png: caption: absent" in out and "zero_bytes.png: empty" in out


def test_headers_alone_are_quick_and_see_less(tmp_path, capsys):
    data, _ = bad_pictures()["png cut in half"]
    write(tmp_path, {"a.png": data, "a.txt": "x"})
    assert run(capsys, tmp_path)[0] == 1 and run(capsys, tmp_path, "--headers")[0] == 0


@pytest.mark.parametrize(
    "data, words",
    [
        (DAMAGED["a flipped bit in a name"][0], "damaged header"),
        (
            pack([("a.png", PNG), ("a.txt", "x"), ("", special("notes", tarfile.SYMTYPE, "/etc/passwd"))]),
            "notes: a link",
        ),
    ],
)
def test_tars(tmp_path, capsys, data, words):
    (tmp_path / "s.tar").write_bytes(data)
    status, out, _ = run(capsys, tmp_path)
    assert status == 1 and words in out and "1 problems of the source" in out


def test_shards_and_features(tmp_path, capsys):
    array_record.write(Synthetic(3, 32).open(), tmp_path / "a")
    assert run(capsys, tmp_path / "a")[0] == 0
    with array_record.Writer(tmp_path / "b.array_record") as writer:
        for value in (1.0, np.inf, np.nan):
            arrays = {"latent": np.full((2, 2, 4), value, np.float16), "states": np.ones((3, 5), np.float16)}
            writer.write(Record("k", arrays=arrays), (64, 64))
    status, out, _ = run(capsys, tmp_path / "b.array_record", "--square", "--size", 64)
    assert status == 1 and "2 bad records, features" in out and "1 with states" in out


LATENT, STATES = np.ones((16, 16, 4), np.float16), np.ones((300, 5), np.float16)


@pytest.mark.parametrize(
    "first, second, words, begins",
    [
        ({"latent": np.ones((32, 32, 4))}, None, "batches of (512, 512) pixels (height, width) do not fit", False),
        ({"latent": LATENT}, {"latent": np.ones((32, 32, 4))}, "latent (32, 32, 4), expected (16, 16, 4)", True),
        ({"latent": LATENT}, {"latent": np.ones((16, 16, 8))}, "latent (16, 16, 8), expected (16, 16, 4)", True),
        ({"latent": LATENT, "states": np.ones((400, 5))}, None, "400 states, of which data.tokens allows 300", True),
        ({"latent": LATENT, "states": STATES}, {"latent": LATENT}, "no states", True),
        ({}, None, "has no latent and no image", False),
        ({"latent": LATENT}, {}, "no latent", True),
        ({"latent": LATENT, "states": STATES}, {"latent": LATENT, "states": STATES[:7]}, None, True),
    ],
)
def test_what_training_would_not_take(tmp_path, capsys, first, second, words, begins):
    records = [arrays for arrays in (first, second) if arrays is not None]
    with array_record.Writer(tmp_path / "b.array_record") as writer:
        for arrays in records:
            arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
            writer.write(Record("k", captions={"prompt": "x"}, arrays=arrays), (512, 512))
    status, out, _ = run(capsys, tmp_path)
    good = len(records) - (words is not None)
    assert status == (words is not None) and f"{good} can be trained on" in out and (words or "nothing is wrong") in out
    assert ("training would not begin" in out) == (not begins)


def test_names_that_are_no_text(tmp_path, capsys):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    status, out, _ = run(capsys, tmp_path)
    assert status == 1 and "caf\\udce9.png: format" in out


def test_tars_in_folders_inside(tmp_path, capsys):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "0.tar").write_bytes(pack({"a.png": PNG, "a.txt": "x"}))
    status, _, err = run(capsys, tmp_path)
    assert status == 2 and "0.tar is in" in err and "inside" in err and "recursive=True" in err
    assert run(capsys, tmp_path / "inside")[0] == 0


CONFIG = """
import dataclasses

from sana_jax.data.captions import Captions
from sana_jax.data.synthetic import Synthetic
from sana_jax.experiment import Data, Experiment, Optim
from sana_jax.models.gemma2 import Gemma2
from sana_jax.training.objectives import LanguageModel
from sana_jax.training.optimizer import AdamW

config = Experiment(
    model=Gemma2(vocab_size=320, width=32, depth=1, heads=2, kv_heads=1, head_dim=16, hidden=64), objective=LanguageModel(),
    data=Data(Synthetic(5, 64), batch=2, size=64, buckets=False, captions=Captions("first")), optim=Optim(AdamW()), steps=1,
)
"""


STAGES = "config = Experiment(stages=(one, dataclasses.replace(one, name='two')))"


def test_an_experiment(tmp_path, capsys):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    status, out, err = run(capsys, path, "data.source.records=7")
    assert (status, err) == (0, "") and "7 records" in out and "64 x 64: 7" in out
    status, _, err = run(capsys, path, "data.source.recrods=7")
    assert status == 2 and "records" in err
    path.write_text(CONFIG + "one = dataclasses.replace(config, name='one')\n" + STAGES)
    status, out, err = run(capsys, path, "stage=one", "one.data.source.records=7")
    assert (status, err) == (0, "") and "7 records" in out
    status, _, err = run(capsys, path)
    assert status == 2 and "choose one with stage=NAME: one, two" in err


def test_bad_input(tmp_path, capsys):
    for arguments in (
        [tmp_path / "absent"],
        [tmp_path / "absent.py"],
        [tmp_path],
        [pathlib.Path(__file__).parent, "a=1"],
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and err.startswith("error: ")


def test_findings_of_readers():
    found = check(Synthetic(4, 64, aspects=(1.0, 0.5)).open(), size=512)
    assert found.records == 4 and not found.wrong and found.shapes == {(512, 512): 2, (352, 704): 2}
