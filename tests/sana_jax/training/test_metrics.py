"""The records of a run: what is written, what a kill leaves, what a restart cuts."""

import builtins
import errno
import importlib.util
import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.errors import InputError
from sana_jax.training import metrics as module
from sana_jax.training.metrics import Lagged, Metrics, keep_until, plain, read, summary


def values(step, loss=None):
    """As a step's metrics come from the device."""
    loss = 1 / (step + 2) if loss is None else loss
    named = {"loss": loss, "grad_norm": 0.5, "lr": 1e-4, "finite": 1.0, "skipped": 0.0, "skipped_in_row": 0.0}
    arrays = {"time_loss": jnp.arange(10.0), "time_count": jnp.array([2.0, 0.0] * 5)}
    return {name: jnp.float32(value) for name, value in named.items()} | arrays


def clocks(step):
    return {"time": 1e9 + step, "images_per_second": 2.5, "goodput": 0.9, "productive_seconds": 3.0 * step}


def run(folder, first, last, every=2, **kwargs):
    made = Metrics(folder, 20, step=first, tensorboard=False, **kwargs)
    for step in range(first + 1, last + 1):
        if step % every == 0:
            made.log(step, values(step), clocks(step))
    made.close()


def test_a_line_has_the_loss_bit_for_bit(tmp_path):
    run(tmp_path, 0, 2)
    (line,) = read(tmp_path / "metrics.jsonl")
    loss = np.float32(0.25)
    assert line["step"] == 2 and np.float32(line["loss"]) == loss
    assert float.fromhex(line["loss_hex"]) == loss
    assert line["time_loss"][:4] == [0.0, None, 2.0, None]
    assert (line["time_count"][:2], line["skipped"], line["finite"]) == ([2, 0], 0, 1)
    (line,) = read(tmp_path / "timing.jsonl")
    assert line == {"step": 2, **clocks(2)}


@pytest.mark.parametrize("loss, text", [(np.nan, "nan"), (np.inf, "inf")])
def test_what_json_cannot_hold_is_null_and_the_hex_says_what(loss, text):
    line = plain(values(1, loss))
    assert (line["loss"], line["loss_hex"]) == (None, text)
    json.dumps(line, allow_nan=False)


def test_a_killed_run_has_the_same_lines_in_the_end(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0, 20)
    run(killed, 0, 13)
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 14, "lo')  # kill -9 in the middle of a line
    run(killed, 8, 20)  # from the checkpoint of step 8
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read(killed / "timing.jsonl")] == list(range(2, 21, 2))
    assert [(e["kind"], e["step"]) for e in read(killed / "events.jsonl")] == [("start", 0), ("resume", 8)]


def test_a_restart_without_cutting_would_be_seen(tmp_path, monkeypatch):
    """The control of the test above."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0, 20)
    run(killed, 0, 13)
    monkeypatch.setattr(module, "keep_until", lambda path, step: 0)
    run(killed, 8, 20)
    assert (killed / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes()


def test_a_restart_knows_the_start_and_the_productive_seconds_of_its_step(tmp_path):
    run(tmp_path, 0, 13)
    began = next(read(tmp_path / "events.jsonl"))["time"]
    made = Metrics(tmp_path, 20, step=9, tensorboard=False)
    made.close()
    assert (made.began, made.productive) == (began, 24.0)  # of step 8, the last line that stays


def test_cutting_is_all_or_nothing(tmp_path, monkeypatch):
    run(tmp_path, 0, 12)
    path, before = tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.os, "replace", killed)
        keep_until(path, 4)
    assert path.read_bytes() == before
    assert keep_until(path, 4) == 4
    assert [line["step"] for line in read(path)] == [2, 4]
    assert keep_until(path, 4) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl", "timing.jsonl"]


def test_lines_that_are_none_go_and_are_counted(tmp_path, capsys):
    run(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0\0\0\n[1]\n" + path.read_bytes())
    run(tmp_path, 4, 4)
    assert [line["step"] for line in read(path)] == [2, 4]
    assert "metrics.jsonl: 2 line(s) cut" in capsys.readouterr().err


class FullDisk(io.FileIO):
    """Takes 30 bytes of each of the first two writes and refuses the rest."""

    writes = 0

    def write(self, data):
        FullDisk.writes += 1
        if FullDisk.writes <= 4:
            if FullDisk.writes % 2 == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:30])
        return super().write(data)


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, monkeypatch, capsys):
    whole, full = tmp_path / "whole", tmp_path / "full"
    run(whole, 0, 12)
    monkeypatch.setattr(FullDisk, "writes", 0)
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open",
        lambda path, mode="r", *a, **k: FullDisk(path, "ab") if mode == "ab" and "metrics" in str(path) else real(path, mode, *a, **k),
    )  # fmt: skip
    run(full, 0, 12)
    monkeypatch.undo()
    assert (full / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_an_unwritable_folder_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir=.*cannot be written"):
        Metrics(tmp_path / "file", 10)


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    made = Metrics(tmp_path / "run", 10)
    made.log(2, values(2), clocks(2))
    made.event("save", step=2)
    made.picture("preview", 2, np.zeros((4, 4, 3), np.uint8))
    made.say("hello")
    made.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_without_a_terminal_there_is_a_line_for_each_log(tmp_path, capsys):
    run(tmp_path, 0, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/20", "step 4/20"]
    assert "loss 0.2500  grad 0.500  lr 1.00e-04  images/s 2.5  goodput 90%" in lines[0]


def test_on_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path, 0, 4)
    said = capsys.readouterr().err
    assert "4/20" in said and "loss 0.1667" in said and "step 4/20" not in said


def test_the_line_tells_troubles():
    line = summary(plain(values(1)) | {"skipped": 2}, {"mfu": 0.416, "bad": {"damaged": 3, "empty": 1}})
    assert "MFU 41.6%" in line and "skipped 2" in line and "bad 4" in line


def test_absent_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = Metrics(tmp_path, 10)
    made.log(2, values(2), clocks(2))
    made.close()
    assert capsys.readouterr().err.count("tensorboardX is not installed") == 1


@pytest.mark.train
def test_tensorboard_gets_the_same_scalars_and_the_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    made = Metrics(tmp_path, 10)
    made.log(2, values(2), clocks(2))
    made.picture("preview", 2, np.full((4, 4, 3), 128, np.uint8))
    made.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = scalars(file.read_bytes())
    assert found["loss"] == 0.25 and found["images_per_second"] == 2.5
    assert found["time_loss/02"] == 2.0 and "time_loss/01" not in found
    assert found["preview"] == (4, 4)


def scalars(data):
    """{tag: number, or (height, width)} of an event file."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            picture = value.HasField("image")
            found[value.tag] = (value.image.height, value.image.width) if picture else value.simple_value
        data = data[16 + size :]
    return found


def test_steps_are_read_one_late_and_whole_where_wanted():
    lagged = Lagged()
    assert lagged.push(1, values(1), whole=True, note="a") == []
    ((step, got, note),) = lagged.push(2, values(2), whole=False)
    assert (step, note) == (1, "a") and got["loss"] == np.float32(1 / 3) and "time_loss" in got
    ((step, got, note),) = lagged.drain()
    assert (step, note, sorted(got)) == (2, None, ["finite", "skipped", "skipped_in_row"])
    assert lagged.drain() == []
