"""The command with the world's own painter in the model's place: files, resume, controls, exit status."""

import inspect
import json
import types

import numpy as np
import pytest

from sana_jax.evals.shapes import __main__ as command
from sana_jax.evals.shapes import painters
from sana_jax.evals.shapes.prompts import TAGS, prompts
from sana_jax.pipeline import Pipeline

SIZE = 128


class Painter:
    """Stands in for a Pipeline: paints what each prompt asks for, but for some pictures an empty scene."""

    def __init__(self, wrong=()):
        self.sana = types.SimpleNamespace(sample_size=SIZE // 32), {"w": np.ones(3, np.float32)}
        self.dc_ae, self.text = (None, {}), None
        self.defaults, self.flow_shift = {"steps": 20, "guidance_scale": 4.5, "max_sequence_length": 300}, 3.0
        self.wrong, self.calls, self.fails_at = wrong, [], None

    def generate(self, asked, *, seed, first_image, height, width, bin_resolution, **options):
        self.calls.append((asked, first_image, options))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        lines = {line["prompt"]: line for line in prompts("seen", 4)}
        some = [{"include": []} if i in self.wrong else lines.get(text, {"include": []}) for text, i in zip(asked, first_image)]
        return painters.truth((height, width), seed)(some, first_image)

    def __getattribute__(self, name):
        """Nothing is asked of it that a Pipeline would not take."""
        mine = object.__getattribute__(self, name)
        if name not in ("generate", "encode", "decode"):
            return mine

        def call(*args, **options):
            inspect.signature(getattr(Pipeline, name)).bind(self, *args, **options)
            return mine(*args, **options)

        return call

    def encode(self, pictures):
        return np.asarray(pictures)

    decode = encode


def run(folder, painter, *flags):
    return command.main(
        ["--images-per-category", "4", "--output", str(folder), "--batch-size", "5", *flags], load=lambda model: painter
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with controls; pictures 2 and 8, of the category "counting", are empty."""
    folder = tmp_path_factory.mktemp("evals") / "whole"
    painter = Painter(wrong=(2, 8))
    return folder, painter, run(folder, painter, "--controls", "--neighbours", "30")


def test_a_run_says_what_it_found(whole, capsys):
    folder, painter, status = whole
    assert status == 0
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(24))
    assert [row["index"] for row in rows if not row["correct"]] == [2, 8]
    assert "expected" in rows[2]["reason"] and rows[2]["found"] == []
    assert rows[0]["found"][0]["shape"] == rows[0]["include"][0]["class"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["categories"]["counting"]["score"] == 0.5
    assert summary["overall"]["score"] == pytest.approx(5.5 / 6)
    assert summary["overall"]["low"] < 5.5 / 6 < summary["overall"]["high"]
    assert summary["settings"] == {
        "model": None, "split": "seen", "seed": 0, "batch_size": 5, "steps": 20, "guidance_scale": 4.5,
        "sampler": None, "flow_shift": 3.0, "height": SIZE, "width": SIZE,
    }  # fmt: skip
    assert len(list((folder / "images").glob("*.png"))) == 24 and (folder / "grid.png").exists()


def test_controls_beside_the_score(whole):
    controls = json.loads((whole[0] / "summary.json").read_text())["controls"]
    assert controls["truth"]["overall"]["score"] == controls["reconstruction"]["overall"]["score"] == 1
    assert controls["no_text"]["overall"]["score"] == 0  # this painter paints nothing without a prompt
    assert 0 < controls["shuffled"]["images"] and controls["shuffled"]["overall"]["score"] < 0.3
    assert 0.5 < controls["neighbours"]["latents"]["ratio"] < 2
    unguided = [options["guidance_scale"] for asked, _, options in whole[1].calls if not any(asked)]
    assert unguided == [1.0] * 5


def test_an_interrupted_run_goes_on(whole, tmp_path, capsys):
    first = Painter(wrong=(2, 8))
    first.fails_at = 3
    assert run(tmp_path, first) == 130
    path = tmp_path / "images.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 10
    path.write_text("\n".join(lines[:8]) + "\n" + lines[8][:20])  # as a killed process may leave it
    second = Painter(wrong=(2, 8))
    assert run(tmp_path, second) == 0
    assert [numbers[0] for _, numbers, _ in second.calls] == [5, 10, 15, 20]  # a batch is painted whole or not at all
    assert path.read_text() == (whole[0] / "images.jsonl").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "overall 0.92 [0.73, 0.97]"
    third = Painter()
    assert run(tmp_path, third) == 0 and third.calls == []


def test_exit_status_below_the_minimum(whole, capsys):
    folder, painter, _ = whole
    assert run(folder, Painter(), "--minimum", "0.91") == 0
    assert run(folder, Painter(), "--minimum", "0.93") == 1


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--split", "sen"], "split='sen': must be one of 'seen', 'held_out', 'phrased'; did you mean 'seen'?"),
        (["--minimum", "90"], "minimum=90.0: must be a number in [0, 1]"),
        (["--height", "100"], "height=100: must be a multiple of 32, 128 or more"),
        (["--images-per-category", "1", "--controls"], "images_per_category=1: must be 2 or more with --controls"),
        (["--sampler", "euler"], "sampler='euler': must be one of"),
        (["--batch-size", "0"], "batch_size=0: must be a positive integer"),
        (["--steps", "14"], "holds a run with steps=20, not 14; give it a folder of its own"),
    ],
)
def test_bad_input_is_named(whole, capsys, flags, problem):
    assert run(whole[0], Painter(), *flags) == 2
    assert problem in capsys.readouterr().err


def test_other_weights_are_another_run(whole, capsys):
    painter = Painter()
    painter.sana = painter.sana[0], {"w": np.zeros(3, np.float32)}
    assert run(whole[0], painter) == 2
    assert "weights=" in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path, capsys):
    assert run(tmp_path, Painter()) == 0
    with open(tmp_path / "images.jsonl", "a") as file:
        file.write("{}\n")
    assert run(tmp_path, Painter()) == 2
    assert "images.jsonl: line 25 is no row" in capsys.readouterr().err


def test_categories_take_turns():
    assert [line["tag"] for line in prompts("seen", 4)] == list(TAGS) * 4
