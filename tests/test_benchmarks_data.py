"""The loader's benchmark runs; what it measures in toy size means nothing."""

import json

import pytest

pytestmark = pytest.mark.parity


def test_smoke(tmp_path, capsys):
    from benchmarks import data

    assert data.main(["--output", str(tmp_path), "--smoke", "--sources", "cached"]) == 0
    (row,) = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert row["source"] == "cached" and row["ours_per_s"] > 0 and row["torch_per_s"] > 0, row
    assert "ours_per_s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
