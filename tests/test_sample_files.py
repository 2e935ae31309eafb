"""Prompt files, grids and their resumption: nothing twice, nothing missing, what is broken by line."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import sample
import sana_jax
from sana_jax import images, text
from sana_jax.cli import records
from sana_jax.errors import NonFiniteError
from tests import sample_runs
from tests.sample_runs import run

pytestmark = pytest.mark.parity  # the toy model is written by diffusers

compile_cache, model, painter = sample_runs.compile_cache, sample_runs.model, sample_runs.painter

ROOT = pathlib.Path(sample.__file__).parent
BROKEN = {17: b"nul \x00", 100: b"latin \xe9t\xe9", 101: b"\xff\xfe", 250: b"x" * 10_001, 499: b"bell \x07"}
BLANK = (3, 444)
LINES = 500


def write_lines(path):
    """500 lines, of which five are broken and two are blank, and the numbers of those that are fine."""
    lines = [BROKEN.get(n, b"" if n in BLANK else b"prompt %d" % n) for n in range(1, LINES + 1)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return [n for n in range(1, LINES + 1) if n not in BROKEN and n not in BLANK]


def painted(painter):
    """{prompt: how often it was painted}."""
    return collections.Counter(prompt for prompts, _ in painter.calls for prompt in prompts)


def arguments(model, *more):
    return ["--prompts-file", "list.txt", "--model", model, "-o", "out", "--size", "32x32", "--compile-cache", "none", *more]


def test_500_lines_interrupted_and_resumed(painter, model):
    fine = write_lines(pathlib.Path("list.txt"))
    paths = [pathlib.Path(f"out/{n:05d}.png") for n in fine]
    reports = [f"sample.py: error: list.txt: line {n}: " for n in BROKEN]

    def interrupt(number):
        if number == 21:
            raise KeyboardInterrupt

    painter.before = interrupt
    status, out, err = run(*arguments(model, "--batch-size", 8))
    assert status == 130
    *broken, last = err.splitlines()
    assert [line.startswith(report) for line, report in zip(broken, reports, strict=True)] == [True] * 5
    assert last == f"sample.py: error: interrupted after 160 of {len(fine)} pictures; the same command paints the rest"
    assert sorted(pathlib.Path("out").iterdir()) == paths[:160]
    times = {path: path.stat().st_mtime_ns for path in paths[:160]}

    # One picture is lost, one is cut, and what a killed process may leave lies about.
    paths[5].unlink()
    paths[6].write_bytes(paths[6].read_bytes()[:-20])
    pathlib.Path(f"out/.{paths[7].name}.partial").write_bytes(b"half")
    painter.before, painter.calls[20:] = lambda number: None, []
    first = painted(painter)
    painter.calls.clear()
    status, out, err = run(*arguments(model, "--batch-size", 8))
    assert status == 1 and err.splitlines() == broken
    assert out.splitlines()[-2] == (
        f"list.txt: {len(fine) - 158} painted, 158 already there, 0 failed, 5 broken, 2 blank lines; "
        "not painted: line 17, line 100, line 101, line 250, line 499"
    )
    assert [path for path in sorted(pathlib.Path("out").iterdir()) if path.suffix == ".png" and path.name[0] != "."] == paths
    again = [path for path in paths[:160] if path.stat().st_mtime_ns != times[path]]
    assert again == paths[5:7], "what was whole is not written again"
    # The batch of the two is the batch that it was, so that their bits are too.
    assert first + painted(painter) == collections.Counter(f"prompt {n}" for n in fine) + painted_again(fine[:8])
    for n, path in zip(fine, paths):
        recipe, _ = records.read(path)
        assert recipe.settings["prompt"] == f"prompt {n}"

    # Nothing is left to do, and a repaired line is painted alone.
    painter.calls.clear()
    assert run(*arguments(model, "--batch-size", 8))[0] == 1 and not painter.calls
    lines = pathlib.Path("list.txt").read_bytes().split(b"\n")
    pathlib.Path("list.txt").write_bytes(b"\n".join(b"mended %d" % n if n + 1 in BROKEN else x for n, x in enumerate(lines)))
    status, out, err = run(*arguments(model))
    assert (status, err) == (0, "") and painted(painter) == {f"mended {n - 1}": 1 for n in BROKEN}


def painted_again(numbers):
    return collections.Counter(f"prompt {n}" for n in numbers)


def test_a_process_that_is_killed(model, tmp_path, monkeypatch):
    """SIGKILL between two pictures, then the same command: the same bits as without."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("list.txt").write_bytes(b"".join(b"prompt %d\n" % n for n in range(12)) + b"\xff\n")
    more = ["--step", "2", "--compile-cache", str(tmp_path / "cache")]
    status, _, _ = run(*arguments(model, *more, "-o", "whole")[:4], *more, "-o", "whole")
    assert status == 1
    command = [sys.executable, ROOT / "sample.py", *map(str, arguments(model)[:4]), *more, "-o", "out"]
    process = subprocess.Popen(
        command, env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(pathlib.Path("out").glob("0*.png"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    there = {path: path.stat().st_mtime_ns for path in pathlib.Path("out").glob("0*.png") if images.is_whole(path)}
    assert 2 <= len(there) < 12, "killed in the middle"
    status, out, err = run(*arguments(model)[:4], *more, "-o", "out")
    assert status == 1 and err == "sample.py: error: list.txt: line 13: not UTF-8 (invalid start byte, byte 0)\n"
    assert out.splitlines()[-2] == (
        f"list.txt: {12 - len(there)} painted, {len(there)} already there, 0 failed, 1 broken, 0 blank lines; "
        "not painted: line 13"
    )
    assert all(path.stat().st_mtime_ns == times for path, times in there.items())
    names = sorted(p.name for p in pathlib.Path("out").iterdir())
    left = [name for name in names if name.endswith(".partial")]  # of what was being written when it was killed
    assert [name for name in names if name not in left] == [f"{n:05d}.png" for n in range(1, 13)]
    assert all(name.endswith(f".png.{process.pid}.partial") for name in left)
    for path in pathlib.Path("whole").iterdir():
        np.testing.assert_array_equal(images.read_picture(path)[0], images.read_picture(pathlib.Path("out") / path.name)[0])


def test_what_is_there_but_differs_is_not_skipped(painter, model):
    pathlib.Path("list.txt").write_text("one\ntwo\n")
    assert run(*arguments(model))[0] == 0

    def message(*more):
        painter.calls.clear()
        status, _, err = run(*arguments(model, *more))
        assert (status, painter.calls) == (2, [])
        return err.removeprefix("sample.py: error: ").rstrip("\n")

    end = "; use another --output, or --overwrite"
    first, second = pathlib.Path("out/00001.png"), pathlib.Path("out/00002.png")
    assert message("--steps", 3) == f"steps=3: {first} is there, with 20{end}"
    assert message("--stack", "nvlabs") == f"stack='nvlabs': {first} is there, with 'diffusers'{end}"
    assert message("--chi", "none").startswith("chi_sha256='e3b0c4")
    pathlib.Path("list.txt").write_text("one\nthree\n")
    assert message() == f"prompt='three': {second} is there, with 'two'{end}"
    assert run(*arguments(model, "--overwrite"))[0] == 0 and painted(painter) == {"one": 1, "three": 1}
    images.save_png(second, np.zeros((2, 2, 3), np.uint8), {})
    assert message() == f"{second}: does not say how it was made, has no text 'sana_jax' or 'parameters'"
    images.save_png(second, np.zeros((2, 2, 3), np.uint8), {"parameters": "three"})
    assert message().startswith("height=32: out/00002.png is there, with None")


def test_a_drawn_seed_is_told_and_goes_on(painter, model):
    pathlib.Path("list.txt").write_text("one\ntwo\n")

    def interrupt(number):
        if number == 2:
            raise KeyboardInterrupt

    painter.before = interrupt
    status, out, err = run(*arguments(model, "--seed", -1))
    (seed,) = re.findall(r"^seed: (\d+) \(drawn\)$", out, re.MULTILINE)
    rest = f"the same command with --seed {seed} paints the rest"
    assert (status, err) == (130, f"sample.py: error: interrupted after 1 of 2 pictures; {rest}\n")
    status, _, err = run(*arguments(model, "--seed", -1))
    end = f"is there, with {seed}; use --seed {seed} to go on with those, another --output, or --overwrite\n"
    assert status == 2 and re.fullmatch(rf"sample.py: error: seed=\d+: out/00001.png {end}", err)
    assert run(*arguments(model, "--seed", seed))[0] == 0 and painter.calls[-1][0] == ["two"]


def test_json_and_a_bad_picture_in_a_batch(painter, model):
    """Entries with their own seed and negative prompt; one picture is not finite, one entry is broken."""
    prompts = {"a cat": {"prompt": "one", "negative_prompt": "blur"}, "../b": "two", "c": "three", "d": {"prompt": "four", "seed": 9}}
    pathlib.Path("list.json").write_text(json.dumps(prompts))

    def overflow(number):
        if "three" in painter.calls[-1][0]:
            raise NonFiniteError("blocks/3")

    painter.before = overflow
    command = ["--json_file", "list.json", *arguments(model, "--batch-size", 2, "--neg", "fog")[2:]]
    status, out, err = run(*command)
    assert (status, err.splitlines()) == (1, [
        "sample.py: error: list.json: id '../b': is no file name: at most 120 bytes of letters, digits, spaces and . + = @ , - _",
        "sample.py: error: id 'c': blocks/3",
    ])  # fmt: skip
    assert out.splitlines()[-2].endswith("2 painted, 0 already there, 1 failed, 1 broken, 0 blank lines; not painted: id '../b', id 'c'")
    assert sorted(p.name for p in pathlib.Path("out").iterdir()) == ["a cat.png", "d.png"]
    assert [(p, a["negative_prompts"], a["seed"]) for p, a in painter.calls] == [
        (["one", "three"], ["blur", "fog"], 0), (["one"], ["blur"], 0), (["three"], ["fog"], 0), (["four"], ["fog"], 9),
    ]  # fmt: skip


def test_a_line_that_is_cut_is_named(painter, model, monkeypatch):
    """The tokenizer's warning comes with the line of the file, not with a number in a batch."""

    def generate(self, prompts, *, height, width, **_):
        text.tokenize(self.text.tokenizer, prompts, "", 16)
        return np.zeros((len(prompts), height, width, 3), np.uint8)

    monkeypatch.setattr(sana_jax.Pipeline, "generate", generate)
    pathlib.Path("list.txt").write_text("one\n\ntwo cats " + "and a cat " * 20 + "\nthree\n")
    status, _, err = run(*arguments(model, "--batch-size", 3))
    assert status == 0 and re.fullmatch(r"sample.py: warning: line 3 is too long: its last \d+ tokens are cut\n", err), err


def test_a_file_without_one_good_prompt(painter, model):
    pathlib.Path("list.txt").write_bytes(b"\x00\n\n\xff\n")
    status, out, err = run(*arguments("absent"))
    assert status == 1 and len(err.splitlines()) == 2 and not painter.calls
    assert out == "list.txt: 0 painted, 0 already there, 0 failed, 2 broken, 1 blank lines; not painted: line 1, line 3\n"


def test_grids(painter, model):
    """Each cell is a picture with a record of its own; a sheet for each prompt; resumed like all else."""
    pathlib.Path("list.txt").write_text("one\ntwo\n")
    command = arguments(model, "--grid", "cfg=2,4.5", "--grid", "steps=3,5")
    assert run(*command)[0] == 0
    found = sorted(p.name for p in pathlib.Path("out").iterdir())
    cells = [f"guidance-scale={w}_steps={s}" for w in ("2", "4.5") for s in (3, 5)]
    assert found == sorted(f"{n}_{x}.png" for n in ("00001", "00002") for x in [*cells, "grid"])
    settings = records.read("out/00002_guidance-scale=4.5_steps=3.png")[0].settings
    assert (settings["prompt"], settings["guidance_scale"], settings["steps"]) == ("two", 4.5, 3)
    pathlib.Path("out/00001_grid.png").unlink()
    pathlib.Path("out/00002_guidance-scale=2_steps=3.png").unlink()
    before = pathlib.Path("out/00002_grid.png").stat().st_mtime_ns
    painter.calls.clear()
    assert run(*command)[0] == 0 and painted(painter) == {"two": 1}
    assert sorted(p.name for p in pathlib.Path("out").iterdir()) == found
    assert pathlib.Path("out/00002_grid.png").stat().st_mtime_ns > before
    status, out, _ = run("cat", *arguments(model, "--grid", "seed=5,6")[2:])
    assert status == 0
    assert out.splitlines()[-4:-1] == ["out/00003_5_seed=5.png", "out/00004_6_seed=6.png", "out/00005_0_grid.png"]
