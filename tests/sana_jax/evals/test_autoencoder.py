"""The measurement against figures worked out by hand, and the command on a run and on a component."""

import json

import numpy as np
import pytest

from sana_jax.data.shapes import Shapes
from sana_jax.evals import autoencoder
from sana_jax.evals.shapes import painters
from sana_jax.export import export
from tests import runs

SIZE = 64


@pytest.fixture
def offset(monkeypatch):
    """An autoencoder whose latents are the picture / 2, and which gives it back 10 / 255 brighter."""
    monkeypatch.setattr(autoencoder, "encode_program", lambda params, images, dc_ae: images / 2)
    back = lambda params, latents, dc_ae: (np.clip(2 * latents + params / 127.5, -1, 1), True)  # noqa: E731
    monkeypatch.setattr(autoencoder, "decode_program", back)


def test_figures(offset):
    reader = Shapes(held_out=True).open()
    real = painters.painted([reader.scene(i) for i in range(5)], (SIZE, SIZE)).astype(float)
    errors = [np.mean((np.minimum(picture + 10, 255) - picture) ** 2) for picture in real]
    found = autoencoder.measure(None, 10.0, SIZE, 5, batch=2)
    assert found["psnr"].score == pytest.approx(np.mean(20 * np.log10(255 / np.sqrt(errors))), abs=1e-3)
    assert found["deviation"] == pytest.approx((real / 255).std(), rel=1e-4)
    assert 0.9 < found["ssim"].score < 1
    same = autoencoder.measure(None, 0.0, SIZE, 2, batch=2)
    assert same["ssim"].score == pytest.approx(1, abs=1e-6) and same["psnr"].score == pytest.approx(58.92, abs=0.01)


def test_a_run_and_what_was_exported_of_it(tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "component"
    runs.make_run(run, runs.DC_AE, ema=0.5)
    export(run, folder)
    tables = []
    for model in (run, folder):
        flags = ["--model", str(model), "--sizes", str(SIZE), "--count", "2", "--output", str(tmp_path / "out")]
        assert autoencoder.main(flags) == 0
        tables.append(capsys.readouterr().out)
        assert autoencoder.main([*flags, "--minimum-psnr", "90"]) == 1
        capsys.readouterr()
    assert tables[0] == tables[1] and tables[0].splitlines()[-1].split()[0] == str(SIZE)
    written = json.loads((tmp_path / "out" / "autoencoder.json").read_text())
    similar = written["sizes"][str(SIZE)]["ssim"]
    assert written["count"] == 2 and similar["low"] < similar["score"] < similar["high"]
    wrong = {"sizes: '100': must be multiples of 32": ["--sizes", "100"], "count=1: must be": ["--count", "1"]}
    for problem, other in wrong.items():
        assert autoencoder.main([*flags, *other]) == 2
        assert problem in capsys.readouterr().err
