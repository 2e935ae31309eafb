"""benchmarks/load.py in toy size: its figures are of a real load, and too much memory is seen."""

import json

from benchmarks import load


def test_rows_of_a_load(tmp_path, capsys):
    assert load.main(["--output", str(tmp_path), "--smoke", "--devices", "2"]) == 0
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert row["ok"] and row["files"] > 1 and row["devices"] == 2 and row["platform"] == "cpu"
    assert 0 < row["parameters_gb"] < row["peak_gb"] and row["before_gb"] <= row["peak_gb"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load.json"], "the weights are removed"
    assert "toy" in capsys.readouterr().out


def test_more_than_the_bound_is_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "GB", 10**5)  # so that the interpreter alone is beyond one shard and 1 "GB"
    assert load.main(["--output", str(tmp_path), "--smoke"]) == 1
    assert "False" in capsys.readouterr().out
