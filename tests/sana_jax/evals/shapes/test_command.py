"""The command with the world's own painter in the model's place: files, resume, controls, exit status."""

import dataclasses
import inspect
import json
import shutil
import warnings

import numpy as np
import pytest

from sana_jax import overrides
from sana_jax.data.cached import write_meta
from sana_jax.data.loader import Loader
from sana_jax.data.schedule import Schedule
from sana_jax.data.shapes import Shapes
from sana_jax.errors import InputError
from sana_jax.evals.shapes import __main__ as command
from sana_jax.evals.shapes import neighbours, painters, report
from sana_jax.evals.shapes.prompts import TAGS, meaning, prompts
from sana_jax.experiment import Data
from sana_jax.pipeline import Pipeline
from sana_jax.stacks import STACKS
from sana_jax.text import Instruction, Vocabulary
from tests import runs, toy_shapes

SIZE = 128
SOURCE = Shapes(seed=3, turn=0.1, apart=0.06, grid=1 / 64, textures=("plain", "dots"), kinds=(("two", 0.75), ("one", 0.25)))


class Painter(toy_shapes.Known):
    """Stands in for a Pipeline: paints what each prompt asks for, but for some pictures an empty scene."""

    def __init__(self, wrong=()):
        super().__init__(SIZE)
        self.wrong, self.calls, self.fails_at = wrong, [], None

    def generate(self, asked, *, seed, first_image, height, width, bin_resolution, **options):
        self.calls.append((asked, first_image, options))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        warnings.warn("prompts[0]: not in the model's vocabulary: star", stacklevel=2)
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
def trained(tmp_path_factory):
    """The folder of a run that saw 40 scenes of 128 px, the last ones out of order."""
    folder = tmp_path_factory.mktemp("evals") / "trained"
    runs.make_run(folder, runs.DC_AE, steps=(5,))
    config = json.loads((folder / "config.json").read_text())
    config["data"]["source"] = {"class": "Shapes", **dataclasses.asdict(SOURCE)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trained):
    """A run with controls; pictures 2 and 8, of the category "counting", are empty."""
    folder = tmp_path_factory.mktemp("evals") / "whole"
    painter = Painter(wrong=(2, 8))
    return folder, painter, run(folder, painter, "--controls", "--run", str(trained), "--neighbours", "30")


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
    sampling = {"split": "seen", "seed": 0, "batch_size": 5, "steps": 20, "guidance_scale": 4.5, "sampler": None}
    sampling |= {"flow_shift": 3.0, "height": SIZE, "width": SIZE, "unit": None}
    assert summary["settings"] == sampling | painters.identity(painter, "seen")
    assert summary["categories"]["counting"]["prompts"] == 4
    rest = [row for row in rows if not set(row["prompt"].split()) <= {"a", "picture", "of", "circle"}]
    assert summary["prompts_with_unknown_words"] == len(rest) > 12  # and no warning came through
    assert len(list((folder / "images").glob("*.png"))) == 24 and (folder / "grid.png").exists()


def test_controls_beside_the_score(whole):
    controls = json.loads((whole[0] / "summary.json").read_text())["controls"]
    assert controls["truth"]["overall"]["score"] == controls["reconstruction"]["overall"]["score"] == 1
    assert controls["no_text"]["overall"]["score"] == 0  # this painter paints nothing without a prompt
    assert 0 < controls["shuffled"]["images"] and controls["shuffled"]["overall"]["score"] < 0.3
    assert 0.5 < controls["neighbours"]["latents"]["ratio"] < 2
    assert json.loads((whole[0] / "summary.json").read_text())["training_scenes"] == 30
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
        (["--unit", "512"], "unit=512: must be an int in [128, 128]; nearest valid 128"),
        (["--unit", "128"], "holds a run with unit=None, not 128; give it a folder of its own"),
        (["--height", "100"], "height=100: must be a multiple of 32, 128 or more"),
        (["--images-per-category", "1", "--controls"], "images_per_category=1: too few for --controls, which shuffle"),
        (["--sampler", "euler"], "sampler='euler': must be one of"),
        (["--batch-size", "0"], "batch_size=0: must be a positive integer"),
        (["--run", "runs/flow"], "run='runs/flow': is for --controls"),
        (["--run", "runs/flow", "--controls"], "runs/flow/config.json"),
        (["--steps", "14"], "holds a run with steps=20, not 14; give it a folder of its own"),
    ],
)
def test_bad_input_is_named(whole, capsys, flags, problem):
    assert run(whole[0], Painter(), *flags) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, change",
    [
        ("weights", lambda p: setattr(p, "sana", (p.sana[0], {"w": np.zeros(3, np.float32)}))),
        ("dtype", lambda p: setattr(p.text.gemma2, "dtype", np.float16)),
        ("stack", lambda p: setattr(p, "stack", STACKS["diffusers"])),
        ("instruction", lambda p: setattr(p, "instruction", lambda: Instruction("Paint: ", "given"))),
        ("max_sequence_length", lambda p: p.defaults.update(max_sequence_length=48)),
        ("vocabulary", lambda p: setattr(p.text, "vocabulary", Vocabulary(frozenset({"star"})))),
    ],
)
def test_another_model_is_another_run(whole, capsys, name, change):
    change(painter := Painter())
    assert run(whole[0], painter) == 2
    assert f"holds a run with {name}=" in capsys.readouterr().err


def test_other_prompts_and_another_detector_are_another_run(whole, capsys, monkeypatch):
    monkeypatch.setattr(painters.detector, "VERSION", 0)
    monkeypatch.setattr(painters, "fingerprint", lambda split: "0")
    assert run(whole[0], Painter()) == 2
    told = capsys.readouterr().err
    assert "prompts=" in told and "detector=" in told


def test_pictures_that_are_gone(whole, trained, tmp_path, capsys):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    shutil.rmtree(folder / "images")
    assert run(folder, Painter(), "--controls", "--run", str(trained)) == 2
    assert "its pictures are gone" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "images.jsonl").mkdir()
    assert run(tmp_path, Painter()) == 2
    told = capsys.readouterr().err
    assert "sana_jax.evals.shapes: error: [Errno 21] Is a directory" in told and told.count("\n") == 1


def test_a_score_of_nothing():
    with pytest.raises(InputError, match="there is no picture to score"):
        report.scores([])


def test_shuffled_prompts_ask_for_something_else():
    lines = prompts("held_out", 30)
    others = command.other_prompts(lines)
    assert [line["tag"] for line in others] == [line["tag"] for line in lines]
    assert not any(meaning(line) == meaning(other) for line, other in zip(lines, others))


def test_painters_of_training_scenes_are_told(trained):
    """The scenes are those of the last batches, in the shuffled order of the run."""
    schedule, reader = Schedule((SOURCE.records,), 8, 0), SOURCE.open()
    shown = [reader.scene(int(i)) for n in range(5) for i in schedule.rows(n)[1]]
    assert neighbours.seen(trained, 1000) == (shown, SOURCE) and neighbours.seen(trained, 11)[0] == shown[-11:]
    remembered, fresh = shown[-3:], [reader.scene(i) for i in range(3)]  # its first records, which no run ever shows
    for scenes, low, high in ((remembered, 0, 0.05), (fresh, 0.5, 2)):
        pictures = painters.painted(scenes, (SIZE, SIZE))
        found = neighbours.summary(neighbours.nearest(Painter(), pictures, *neighbours.seen(trained, 24)))
        assert all(low <= of["ratio"] <= high for of in found.values())


def test_scenes_of_a_run_in_buckets_are_known_too(trained, tmp_path):
    """In the order of its batches, each of one size."""
    run_dir, sizes = shutil.copytree(trained, tmp_path / "run"), ((64, 64), (128, 32))
    source = dataclasses.replace(SOURCE, records=99, size=64, aspects=(1.0, 4.0))
    config = json.loads((run_dir / "config.json").read_text())
    config["data"] |= {"source": overrides.describe(source), "buckets": sizes, "size": 64}
    (run_dir / "config.json").write_text(json.dumps(config))
    reader = source.open()
    with Loader(reader, Data(source, 8, 64, sizes), inputs=("image",)) as loader:
        shown = [reader.scene(int(key.removeprefix("shapes-"))) for key in loader.where(range(40))]
    assert neighbours.seen(run_dir, 1000) == (shown, source) and len({scene.height for scene in shown[:8]}) == 1


def test_fresh_scenes_are_not_those_of_training(monkeypatch):
    """Of one thing on a coarse grid; half of what the source has is known."""
    source = Shapes(turn=0.0, jitter=0.0, grid=0.25, textures=("plain",), kinds=(("one", 1.0),))
    reader = dataclasses.replace(source, seed=neighbours.FRESH_SEED).open()
    known = [reader.scene(i)._replace(phase=(0.0,) * 4) for i in range(20)]
    shown = []
    monkeypatch.setattr(painters, "through", lambda pipeline, pictures: shown.append(pictures) or pictures)
    pictures = painters.painted(known, (SIZE, SIZE))
    found = neighbours.nearest(Painter(), pictures, known, source)
    assert max(found["pixels"]["sampled"]) < 0.005 < min(found["pixels"]["fresh"]), "but for rounding"
    assert len(shown[0]) == 20 and not any((one == other).all() for one in shown[0] for other in pictures)


def test_runs_on_features_of_shapes_are_known_too(trained, tmp_path):
    run_dir, features = shutil.copytree(trained, tmp_path / "run"), tmp_path / "features"
    config = json.loads((run_dir / "config.json").read_text())
    meta = {"rows": SOURCE.records, "shard_records": 8, "fingerprint": "0", "text": False}
    features.mkdir()
    write_meta(features, meta | {"made_from": config["data"]["source"]})
    config["data"]["source"] = {"class": "Cached", "path": str(features)}
    (run_dir / "config.json").write_text(json.dumps(config))
    assert neighbours.seen(run_dir, 11) == neighbours.seen(trained, 11)
    write_meta(features, meta | {"made_from": {"class": "Shapes"}, "size": 32, "buckets": [[32, 32]]})
    with pytest.raises(InputError, match=r"has other data.size, data.buckets than its features in .*features, so its order"):
        neighbours.seen(run_dir, 11)
    write_meta(features, meta)
    with pytest.raises(InputError, match="features: cache.json does not say what it was made from; the command"):
        neighbours.seen(run_dir, 11)


def test_runs_whose_order_is_not_known(trained, tmp_path):
    runs.make_run(tmp_path, runs.DC_AE)
    with pytest.raises(InputError, match="is not of Shapes, whose scenes"):
        neighbours.seen(tmp_path, 10)


def test_a_broken_line_is_named(tmp_path, capsys):
    assert run(tmp_path, Painter()) == 0
    with open(tmp_path / "images.jsonl", "a") as file:
        file.write("{}\n")
    assert run(tmp_path, Painter()) == 2
    assert "images.jsonl: line 25 is no row" in capsys.readouterr().err


def test_categories_take_turns():
    assert [line["tag"] for line in prompts("seen", 4)] == list(TAGS) * 4
