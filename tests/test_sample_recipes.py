"""--from-image: the same picture, bit for bit, from what a PNG says of itself; or why not."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import sana_jax
from sana_jax import bundled, images
from sana_jax.cli import records
from tests import sample_runs
from tests.sample_runs import refused, run

pytestmark = pytest.mark.parity  # the toy model is written by diffusers

compile_cache, model, painter = sample_runs.compile_cache, sample_runs.model, sample_runs.painter

QUIET = ("--compile-cache", "none")
SIZES = "a size is given with --ar, --size, --height and --width\n"


def pixels(path):
    return images.read_picture(path)[0]


@pytest.fixture(scope="module")
def painted(model, tmp_path_factory):
    """Pictures of many kinds, by name, painted at 64 x 64 in few steps."""
    folder = tmp_path_factory.mktemp("painted")
    long = "and so on " * 30  # of several lengths of text, that for which programs are compiled
    (folder / "list.txt").write_text(f"one cat\nzwei Häuschen im 雪, {long}")

    def paint(*arguments, warning=""):
        status, _, err = run(*arguments, "--model", model, "--steps", 2, *QUIET)
        assert (status, err) == (0, warning)

    # Images of one prompt in a batch, with a negative prompt, in the other stack.
    flags = ["--neg", "blur: ugly", "--stack", "nvlabs", "--batch-size", 2, "--seed", 12]
    warning = "sample.py: warning: prompt: --ar and what follows is no part of the prompt in stack 'nvlabs'; " + SIZES
    paint(f'a "cat",\nby night 雪 {long} --ar 3:4', *flags, "-n", 2, "-o", folder / "batch.png", warning=warning)
    # Several prompts in a batch: the longest decides how far all are padded.
    paint("--prompts-file", folder / "list.txt", *flags, "-o", folder / "file")
    # A cell of a grid.
    paint("a cat", "--grid", "cfg=1.5,4.5", "--grid", "seed=3", "-o", folder / "grid.png")
    return types.SimpleNamespace(
        batch=folder / "batch-1.png", line=folder / "file" / "00001.png", cell=folder / "grid_guidance-scale=1.5_seed=3.png",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["batch", "line", "cell"])
def test_the_same_bits(painted, tmp_path, kind):
    source, path = getattr(painted, kind), tmp_path / "again.png"
    status, out, err = run("--from-image", source, "-o", path, *QUIET)
    assert status == 0 and err.endswith(SIZES) == (kind == "batch")
    assert f"{source}: painted again" in out and out.splitlines()[-1] == f"{source}: the same, bit for bit"
    np.testing.assert_array_equal(pixels(path), pixels(source))
    assert records.read(path)[0] == records.read(source)[0], "and the same can be said of the copy"


def test_bits_that_are_not_the_same_are_told(painter, painted):
    """Also where the picture takes the place of the one that it was made from."""
    copy = shutil.copy(painted.cell, "copy.png")
    status, out, err = run("--from-image", copy, "-o", copy, *QUIET)
    assert (status, err) == (1, "sample.py: error: copy.png: NOT the same bits\n") and "bit for bit" not in out
    assert (pixels(copy) == 128).all()


def test_a_record_is_needed_for_the_bits(painted, tmp_path):
    """The neighbours in a batch matter: without them the picture is only nearly the same.

    (If ever it were the same, the record would hold more than it needs, and this could go.)
    """
    recipe, _ = records.read(painted.line)
    assert len(recipe.batch["prompts"]) == 2 and recipe.batch["position"] == 0
    text = images.read_texts(painted.line, ("sana_jax",))["sana_jax"]
    neighbours = {"position": 0, "prompts": ["one cat"], "negative_prompts": ["blur: ugly"], "indices": [0]}
    alone = json.loads(text) | {"batch": neighbours}
    images.save_png(tmp_path / "alone.png", pixels(painted.line), {"sana_jax": json.dumps(alone)})
    status, out, err = run("--from-image", tmp_path / "alone.png", "-o", tmp_path / "b.png", *QUIET)
    difference = np.abs(pixels(tmp_path / "b.png").astype(int) - pixels(painted.line))
    assert difference.max() <= 2
    said = (0, True, False) if difference.max() == 0 else (1, False, True)
    assert (status, "the same, bit for bit" in out, "NOT the same bits" in err) == said


def test_flags_beside_it_make_a_variation(painted, tmp_path):
    path = tmp_path / "b.png"
    status, out, err = run("--from-image", painted.cell, "--cfg", 3, "-p", "a dog", "-o", path, *QUIET)
    assert (status, err) == (0, "")
    said = f"{painted.cell}: a variation: prompt 'a cat' -> 'a dog', guidance_scale 1.5 -> 3.0"
    assert said in out.splitlines() and "bit for bit" not in out
    before, after = (records.read(p)[0] for p in (painted.cell, path))
    assert after.settings == before.settings | {"guidance_scale": 3.0, "prompt": "a dog"}
    assert (pixels(path) != pixels(painted.cell)).any()
    # A flag that says what is recorded anyway changes nothing.
    _, out, _ = run("--from-image", painted.cell, "--cfg", 1.5, "--seed", 3, "-o", path, *QUIET)
    assert out.splitlines()[-1] == f"{painted.cell}: the same, bit for bit"


def test_more_variations(painted, painter):
    def said(*flags):
        status, out, err = run("--from-image", painted.cell, "-o", "b.png", *QUIET, *flags)
        assert (status, err) == (0, "") and "bit for bit" not in out
        return [line for line in out.splitlines() if "variation" in line]

    assert said("--grid", "cfg=2,4.5") == [f"{painted.cell}: a variation in 2 pictures"]
    assert said("-n", 2) == [f"{painted.cell}: a variation in 2 pictures"]
    assert said("--dtype", "bf16") == [f"{painted.cell}: a variation: dtype 'float32' -> 'bfloat16'"]
    assert said("--ar", "2:1") == [f"{painted.cell}: a variation: width 64 -> 96"]
    assert said("--chi", "none")[0].startswith(f"{painted.cell}: a variation: chi_sha256 '")


def test_what_is_not_the_same_is_refused_by_name(painted, model, monkeypatch, tmp_path):
    def message(*more, source=painted.cell):
        return refused(monkeypatch, tmp_path, "--from-image", source, "-o", tmp_path / "new" / "b.png", *QUIET, *more)

    sha256 = records.read(painted.cell)[0].identity["model_sha256"]
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"unused": 1}))
    end = f"{painted.cell} was painted with {sha256!r}, so that its bits cannot be promised; --allow-mismatch model_sha256 goes on"
    assert message("--model", other).startswith("model_sha256='") and message("--model", other).endswith(end)
    # The same files elsewhere are the same model.
    moved = shutil.copytree(model, tmp_path / "moved")
    status, out, _ = run("--from-image", painted.cell, "--model", moved, "-o", tmp_path / "a.png", *QUIET)
    assert status == 0 and out.splitlines()[-1].endswith("the same, bit for bit")
    (tmp_path / "a.png").unlink()

    monkeypatch.setattr(sana_jax, "__version__", "9.9")
    assert message().startswith(f"sana_jax='9.9': {painted.cell} was painted with ")
    status, out, _ = run("--from-image", painted.cell, "--allow-mismatch", "sana_jax", "-o", tmp_path / "a.png", *QUIET)
    assert status == 0 and out.splitlines()[-1].endswith("the same, bit for bit"), "allowed, and in this case harmless"
    (tmp_path / "a.png").unlink()
    monkeypatch.undo()


def test_an_instruction_that_changed(painter, model):
    chi = pathlib.Path("chi.txt")
    chi.write_text("Say one thing: ")
    assert run("a cat", "--model", model, "--chi", chi, "-o", "a.png", *QUIET)[0] == 0
    chi.write_text("Say two things: ")
    status, _, err = run("--from-image", "a.png", "-o", "b.png", *QUIET)
    assert status == 2 and err.startswith("sample.py: error: chi_sha256='") and "a.png was painted with" in err
    chi.unlink()
    status, _, err = run("--from-image", "a.png", "-o", "b.png", *QUIET)
    assert (status, err) == (2, f"sample.py: error: {chi.absolute()}: cannot be read (No such file or directory)\n")
    assert len(painter.calls) == 1


def test_a_picture_that_names_a_pickle(painted, monkeypatch, tmp_path):
    record = json.loads(images.read_texts(painted.cell, ("sana_jax",))["sana_jax"])
    record["loading"]["model"] = "hf://evil/repo/model.pth"
    images.save_png(tmp_path / "evil.png", pixels(painted.cell), {"sana_jax": json.dumps(record)})
    text = refused(monkeypatch, tmp_path, "--from-image", "evil.png", *QUIET)
    assert text == "model='hf://evil/repo/model.pth': is a pickle that evil.png names; pass --model yourself if you trust that file"


def test_a_picture_of_another_tool(painter, model, tmp_path, monkeypatch):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", "a cat\nNegative prompt: dog\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7, Seed: 42, Size: 64x96, Model: x")
    Image.new("RGB", (8, 8)).save("foreign.png", pnginfo=chunk)
    status, out, err = run("--from-image", "foreign.png", "--model", model, "--seed", 1, "-o", "b.png", *QUIET)
    assert (status, err) == (0, (
        "sample.py: warning: foreign.png: painted by another program, so that its bits cannot be promised; "
        "without meaning here: Sampler: DPM++ 2M, Model: x\n"
    ))  # fmt: skip
    ((prompts, given),) = painter.calls
    assert (prompts, given["negative_prompts"]) == (["a cat"], ["dog"])
    found = {name: given[name] for name in ("steps", "guidance_scale", "seed", "width", "height", "sampler")}
    assert found == dict(steps=30, guidance_scale=7.0, seed=1, width=64, height=96, sampler="flow-dpm-solver")
    assert "foreign.png: a variation: " in out
    monkeypatch.setattr(bundled, "NAME", "absent")
    status, _, err = run("--from-image", "foreign.png", "-o", "b.png", *QUIET)
    assert status == 2 and "model: none given" in err


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    from tests.toy_pipeline import VARIANTS, make_sprint_pipeline, make_transformer

    pipeline = make_sprint_pipeline()
    pipeline.transformer = make_transformer(sample_size=2, **VARIANTS["sprint"])
    folder = tmp_path_factory.mktemp("sprint") / "toy"
    pipeline.save_pretrained(folder)
    return folder


def test_a_picture_to_begin_with(sprint, monkeypatch, tmp_path):
    """SANA-Sprint on from a picture: that picture is recorded by its path and its sha256."""
    monkeypatch.chdir(tmp_path)
    shade = np.linspace(0, 255, 80 * 100 * 3).reshape(80, 100, 3).astype(np.uint8)
    images.save_png("start.png", shade, {})
    flags = ["--image", "start.png", "--strength", 0.5, "--steps", 2, "--seed", 4]
    status, out, err = run("a cat", "--model", sprint, *flags, "-o", "a.png", *QUIET)
    assert (status, err) == (0, "") and "scm, 2 steps" in out
    recipe, _ = records.read("a.png")
    settings = recipe.settings
    assert (settings["init_image"], settings["strength"], settings["flow_shift"]) == (str(tmp_path / "start.png"), 0.5, None)
    assert recipe.settings["init_image_sha256"] == images.read_picture("start.png")[1]
    status, out, err = run("--from-image", "a.png", "-o", "b.png", *QUIET)
    assert (status, err, out.splitlines()[-1]) == (0, "", "a.png: the same, bit for bit")

    pathlib.Path("start.png").rename("moved.png")
    message = refused(monkeypatch, tmp_path, "--from-image", "a.png", "-o", "c.png", *QUIET)
    assert message == f"image='{tmp_path}/start.png': cannot be read (No such file or directory)"
    status, out, err = run("--from-image", "a.png", "--image", "moved.png", "-o", "b.png", *QUIET)
    assert (status, out.splitlines()[-1]) == (0, "a.png: the same, bit for bit"), "the same file by another name"
    images.save_png("start.png", shade[::-1], {})
    message = refused(monkeypatch, tmp_path, "--from-image", "a.png", "-o", "c.png", *QUIET)
    assert message.startswith("init_image_sha256='") and message.endswith("or --allow-mismatch init_image_sha256")
    status, out, _ = run("--from-image", "a.png", "--image", "start.png", "-o", "b.png", *QUIET)
    assert status == 0 and "a.png: a variation: init_image_sha256 '" in out
    assert (pixels("b.png") != pixels("a.png")).any()


def test_what_a_model_has_no_use_for(sprint, model, monkeypatch, tmp_path):
    images.save_png(tmp_path / "start.png", np.zeros((8, 8, 3), np.uint8), {})

    def message(*arguments):
        return refused(monkeypatch, tmp_path, "cat", *arguments, *QUIET)

    assert message("--model", sprint, "--neg", "dog").startswith("negative_prompt: SANA-Sprint has no unconditional half")
    assert message("--model", sprint, "--flow-shift", 3).startswith("flow_shift=3.0: has no meaning for SANA-Sprint")
    assert message("--model", sprint, "--sampler", "flow-euler").startswith("sampler='flow-euler': this is a SANA-Sprint")
    assert message("--model", model, "--sampler", "scm").startswith("sampler='scm': only samples SANA-Sprint")
    assert message("--model", model, "--image", "start.png").startswith("image: only sampler='scm' of SANA-Sprint begins")
    assert message("--model", model, "--pag-scale", 2, "--pag-layers", 7).startswith("pag_layers=(7,): this transformer has")


def test_steps_are_shown_as_they_happen(model, tmp_path, capsys):
    """A bar over the evaluations of the network; and the picture is the same with and without."""
    flags = ["a cat", "--model", model, "--steps", 2, *QUIET]
    assert run(*flags, "-o", tmp_path / "a.png")[::2] == (0, "")
    status, _, err = run(*flags, "-n", 2, "-o", tmp_path / "b.png", "--progress", "steps")
    assert status == 0 and "4/4" in err and "step" in err
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b-0.png"))
    status, _, err = run(*flags, "-o", tmp_path / "c.png", "--progress", "images")
    assert status == 0 and "1/1" in err and "image" in err


def test_a_bar_over_the_steps_that_are_left(sprint, tmp_path):
    images.save_png(tmp_path / "start.png", np.zeros((8, 8, 3), np.uint8), {})
    flags = ["--image", tmp_path / "start.png", "--strength", 0.5, "--steps", 4, "--progress", "steps", "-n", 2]
    status, _, err = run("a cat", "--model", sprint, *flags, "-o", tmp_path / "a.png", *QUIET)
    assert status == 0 and "4/4" in err and "/8" not in err


@pytest.mark.parametrize("name", ["chi", "init_image"])
def test_a_record_that_names_a_file_without_end(painted, monkeypatch, tmp_path, name):
    record = json.loads(images.read_texts(painted.cell, ("sana_jax",))["sana_jax"])
    (record["loading"] if name == "chi" else record)[name] = "/dev/zero"
    images.save_png(tmp_path / "evil.png", pixels(painted.cell), {"sana_jax": json.dumps(record)})
    text = refused(monkeypatch, tmp_path, "--from-image", "evil.png", *QUIET)
    assert text.endswith(": cannot be read (must be a plain file, is a device or a pipe)") and "/dev/zero" in text
