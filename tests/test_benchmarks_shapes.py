"""The benchmarks on the model of shapes, with a painter in the model's place; and their plots."""

import json
import pathlib
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from benchmarks import (
    plots, shapes_binding, shapes_detector, shapes_guidance, shapes_levels, shapes_pictures, shapes_runs, shapes_solver
)  # fmt: skip
from sana_jax.data import shapes_scene as world
from sana_jax.evals.shapes import painters
from sana_jax.evals.shapes.prompts import prompts
from sana_jax.evals.shapes.verdict import judge
from sana_jax.images import read_picture
from sana_jax.sampling import flow_dpm_solver
from tests import toy_shapes

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


class Painter(toy_shapes.Known):
    """A Pipeline whose latents are the truth, further away the fewer the steps; below 3 steps it is all grey."""

    def __init__(self):
        super().__init__(128)
        self.calls = 0

    def generate(self, asked, *, seed, first_image, height, width, steps=20, output="uint8", **options):
        self.calls += 1
        by_prompt = {line["prompt"]: line for line in prompts("seen", 3)}
        some = [by_prompt[text] for text in asked]
        truth = painters.truth((height, width), seed)(some, first_image)
        if output == "uint8":
            return truth
        truth = truth / np.float32(127.5) - 1
        return truth * 0 if steps < 3 else truth + np.float32(0.1 / steps)

    def decode(self, latents):
        return np.clip(latents, -1, 1)


@pytest.fixture
def docs(tmp_path):
    """A copy of the documents that the scripts write into."""
    for name in ("solver.md", "guidance.md"):
        (tmp_path / name).write_text((DOCS / name).read_text())
    return tmp_path


def test_solver_and_guidance_write_their_pages(docs):
    painter = Painter()
    flags = ["--output", str(docs / "out"), "--docs", str(docs), "--smoke", "--batch-size", "6"]
    assert shapes_solver.main(flags, lambda model: painter) == 0
    written = json.loads((docs / "out" / "shapes_solver.json").read_text())
    rows = {(row["sampler"], row["steps"]): row for row in written["rows"]}
    assert rows["flow-dpm-solver", 4]["latent_error"] == 0 < rows["flow-euler", 3]["latent_error"]
    same = rows["flow-euler", 3]["difference"]
    assert same["low"] < same["score"] == 0 < same["high"]  # six pictures alike are no proof
    assert rows["flow-euler", 2]["score"]["score"] == 0 and rows["flow-euler", 2]["difference"]["score"] < -0.5
    (promise,) = written["promises"]
    assert promise["steps"] == 2 and promise["score"] < -0.5 and promise["images"] == 6
    page = (docs / "solver.md").read_text()
    assert "Flow-DPM-Solver, 2 steps, less Euler, 3 steps, 6 pictures: -" in page and ", inside +-1.0" in page
    assert "| Euler | 2 | 0.000 [0.000, " in page and "Not measured yet" not in page
    assert ElementTree.parse(docs / "solver.svg").getroot().tag.endswith("svg")
    calls = painter.calls
    assert shapes_solver.main(flags, lambda model: painter) == 0  # all of it is kept
    assert painter.calls == calls == 4
    assert (docs / "solver.md").read_text() == page
    shapes_guidance.main(flags, lambda model: painter)
    assert "| 4.5 (the model) | " in (docs / "guidance.md").read_text()


def test_a_promise_is_of_more_pictures_and_may_be_broken(docs, monkeypatch):
    monkeypatch.setattr(shapes_solver, "ways", lambda smoke: [("flow-dpm-solver", 4), ("flow-euler", 3), ("flow-dpm-solver", 3)])
    flags = ["--output", str(docs / "out"), "--docs", str(docs), "--images-per-category", "1", "--images-per-promise", "3"]
    for way, status in ((("flow-dpm-solver", 2), 1), (("flow-dpm-solver", 4), 0)):  # grey below 3 steps
        monkeypatch.setattr(shapes_solver, "promises", lambda smoke: ({way: 0.7}, ("flow-euler", 3)))
        assert shapes_solver.main([*flags, "--batch-size", "6"], lambda model: Painter()) == status
        written = json.loads((docs / "out" / "shapes_solver.json").read_text())
        assert written["images"] == 6 and [promise["images"] for promise in written["promises"]] == [18]
        assert ("NOT inside" in (docs / "solver.md").read_text()) == bool(status)


def test_toy_sizes_do_not_write_into_the_documents(docs, monkeypatch):
    (docs / "docs").mkdir()
    monkeypatch.chdir(docs)
    for script in (shapes_solver, shapes_guidance):
        assert script.main(["--output", "out", "--smoke", "--batch-size", "6"], lambda model: Painter()) == 0
    assert not any((docs / "docs").iterdir())


@pytest.mark.parametrize(
    "script, flags, problem",
    [
        (shapes_solver, ["--images-per-category", "0"], "shapes_solver: error: images_per_category=0: must be"),
        (shapes_solver, ["--images-per-promise", "0"], "shapes_solver: error: images_per_promise=0: must be"),
        (shapes_guidance, ["--batch-size", "0"], "shapes_guidance: error: batch_size=0: must be"),
        (shapes_guidance, ["--docs", "nowhere", "--smoke"], "shapes_guidance: error: [Errno 2] No such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, script, flags, problem):
    assert script.main(["--output", str(tmp_path / "out"), *flags], lambda model: Painter()) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1


def test_the_picture_of_the_readme(tmp_path):
    assert shapes_pictures.main(["--output", str(tmp_path), "--side", "64"], lambda model: Painter()) == 0
    sheet, _ = read_picture(tmp_path / "shapes.png")
    assert len(sheet) == 20 + 6 * (64 + 20 + 8)
    first, third = (sheet[40:104, x : x + 64] for x in (8, 8 + (sheet.shape[1] - 8) // 2))
    assert first.std() > 10 and (first != third).any()  # another seed is another picture


@pytest.mark.parametrize("first", [0, 1, 7, 19])
def test_sampling_from_a_noise_level_on(first):
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 3), np.float32)
    whole = flow_dpm_solver.schedule(20, 1.5, order=3)
    rest = shapes_levels.rest(whole, first)
    sigma = rest.sigma[0]
    end = flow_dpm_solver.flow_dpm_solver(lambda x, t: noise - x0, (1 - sigma) * x0 + sigma * noise, rest)
    np.testing.assert_allclose(end, x0, atol=1e-5)
    if first in (1, 7):  # the coefficients of a step that has earlier data are wrong for one that has none
        cut = flow_dpm_solver.Schedule(*(array[first:] for array in whole))
        wrong = flow_dpm_solver.flow_dpm_solver(lambda x, t: noise - x0, (1 - sigma) * x0 + sigma * noise, cut)
        assert np.abs(wrong - x0).max() > 1e-3


def test_levels_of_the_bundled_model(tmp_path):
    flags = ["--output", str(tmp_path), "--smoke", "--images-per-category", "1", "--batch-size", "4"]
    assert shapes_levels.main(flags) == 0
    rows = json.loads((tmp_path / "shapes_levels.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [1, 2]
    assert rows[0]["loss"] < rows[0]["other"]  # it reads its prompt
    assert shapes_levels.main([*flags[:-1], "0"]) == 2


def test_false_prompts_are_false():
    a = world.Thing("star", "orange", "small", 0.2, 0.5, 0.1, 0.0)
    scene = world.Scene((a, a._replace(shape="ring", colour="blue", x=0.8)), "beige", "plain", 1.0, 1.0, (0,) * 4)
    said = shapes_binding.sentences([(scene, "left of")])
    assert said["true"] == ["an orange star left of a blue ring"]
    assert said["opposite"] == ["an orange star right of a blue ring"]
    assert said["colours"] == ["a blue star left of an orange ring"]
    facts = shapes_binding.asked(48)
    assert all(len(texts) == 48 for texts in shapes_binding.sentences(facts).values())
    for scene, relation in facts:
        a, b = scene.things
        found = world.relations(a, b)
        assert relation in found and world.OPPOSITE[relation] not in found and a.colour != b.colour
        swapped = scene._replace(things=(a._replace(colour=b.colour), b._replace(colour=a.colour)))
        turned = scene._replace(things=(a._replace(x=b.x, y=b.y), b._replace(x=a.x, y=a.y)))
        assert not any(map(world.is_held_out, (scene, swapped, turned)))


def test_a_row_of_what_false_prompts_cost():
    true, down = np.float64([1, 2, 3, 4]), np.array([True, False, True, False])
    losses = {"true": true, "opposite": true + [5, 1, 7, 3], "colours": true + 0.5, "other": true + [1, 2, 3, 4]}
    row = shapes_binding.row(0.5, losses, down)
    assert [row[name]["score"] for name in shapes_binding.MORE] == [2, 6, 0.5, 2.5] and row["loss"] == 2.5
    assert row["across"]["high"] - 2 == pytest.approx(1.96 * np.sqrt(2) / np.sqrt(2), rel=1e-3)


def test_binding_of_the_bundled_model(tmp_path, capsys):
    flags = ["--output", str(tmp_path), "--pictures", "32"]
    assert shapes_binding.main(flags) == 0
    rows = json.loads((tmp_path / "shapes_binding.json").read_text())["rows"]
    assert len(rows) == len(shapes_binding.LEVELS) and max(row["other"]["low"] for row in rows) > 0.1  # it reads its prompt
    assert "across" in capsys.readouterr().out
    assert shapes_binding.main([*flags[:-1], "1"]) == 2


def test_marks_must_be_there(tmp_path):
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match="has 0 places"):
        shapes_runs.write_between(tmp_path / "page.md", "shapes_solver", "text")


def test_pages_have_their_marks():
    for name in ("solver", "guidance"):
        assert shapes_runs.MARKS[0].format(f"shapes_{name}") in (DOCS / f"{name}.md").read_text()


def test_near_misses_ask_for_something_else():
    rng = np.random.default_rng(0)
    for line in prompts("seen", 2):
        missed = shapes_detector.near_miss(line, rng)
        assert missed["include"] != line["include"] and not judge([], missed).correct


@pytest.mark.parametrize("low, high, log, expected", [(0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (4, 50, True, [5, 10, 20, 50])])
def test_ticks(low, high, log, expected):
    assert plots.ticks(low, high, log) == pytest.approx(expected)


def test_points_of_a_plot_stand_where_they_should():
    series = plots.Series("a & b", ((1, 0.5, 0.4, 0.6), (10, 0.9, 0.8, 1.0), (100, 0.7, 0.6, 0.8)))
    root = ElementTree.fromstring(plots.svg([plots.Panel("t", "x", "y", (series,) * 2, log="x")]))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter() if c.tag.endswith("circle") and c.get("r") == "3"]
    (x0, y0), (x1, y1), (x2, y2) = circles[:3]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 < y2 < y0
    assert any(text.text == "a & b" for text in root.iter() if text.tag.endswith("text"))
