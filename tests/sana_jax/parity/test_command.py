"""`python -m sana_jax.parity` as a command: where it writes, who interrupts it, who stops listening."""

import os
import re
import shlex
import shutil
import sys

import pytest

from sana_jax import convert
from sana_jax.parity import __main__ as command
from sana_jax.parity import ladder, report
from sana_jax.parity.__main__ import main


@pytest.fixture
def no_ladder(monkeypatch):
    def climb(*_):
        raise AssertionError("the ladder ran")

    monkeypatch.setattr(ladder, "climb", climb)


def test_an_output_that_cannot_be_written_is_refused_first(capsys, tmp_path, no_ladder):
    file = tmp_path / "file"
    file.write_text("kept")
    for output in (file, file / "below", ""):
        assert main([str(tmp_path), "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and f"output={str(output)!r}: " in captured.err
    assert file.read_text() == "kept" and [*tmp_path.iterdir()] == [file]


def test_looking_whether_an_output_can_be_written_leaves_nothing(tmp_path):
    report.check_writable(tmp_path / "a" / "b")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parity
def test_an_interrupt_is_one_line(capsys, toy_folder, monkeypatch):
    def climb(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "climb", climb)
    assert main([str(toy_folder)]) == 130
    assert capsys.readouterr() == ("", "sana_jax.parity: error: interrupted\n")


@pytest.mark.parity
@pytest.mark.parametrize("shift, status", [(3.0, 0), (3.03, 1)])
def test_the_status_is_told_to_who_stopped_reading(toy_folder, tmp_path, monkeypatch, shift, status):
    """As in `| head`: both streams lead into a pipe that nobody reads."""
    model = shutil.copytree(toy_folder, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"flow_shift": 3.0', f'"flow_shift": {shift}'))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out, os.fdopen(os.dup(write), "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        found = main([str(model), "--reference", str(toy_folder), "--only", "solver", "--output", str(tmp_path / "out")])
        monkeypatch.undo()
    assert found == status and (tmp_path / "out" / "parity.md").is_file()


@pytest.mark.parity
def test_what_a_pth_file_is_told_to_do_works(capsys, toy_folder, tmp_path):
    convert.convert(toy_folder / "transformer", tmp_path / "original", to="nvlabs", report=lambda line: None)
    (file,) = (tmp_path / "original").glob("*.pth")
    assert main([str(file)]) == 2
    (advice,) = re.findall(r"python -m sana_jax\.convert (.*) makes one", capsys.readouterr().err)
    assert "python -m sana_jax.convert FILE DIR --dc-ae X --text Y" in command.__doc__
    words = {"DIR": tmp_path / "model", "X": toy_folder, "Y": toy_folder}
    arguments = [str(words.get(word, word)) for word in shlex.split(advice)]
    arguments += ["--size", "512", "--cross-heads", "4"]  # which a published file would tell
    assert convert.main(arguments) == 0
    assert main([str(tmp_path / "model"), "--reference", str(toy_folder), "--only", "dit", "--size", "64x64"]) == 0
    assert "| DiT weights, 73 tensors | 0.0e+00 |" in capsys.readouterr().out
