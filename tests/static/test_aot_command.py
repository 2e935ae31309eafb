"""`python -m sana_jax.aot`: what it takes, prints and writes."""

import json
import pathlib

import pytest

from sana_jax import aot, experiment
from sana_jax.aot import programs
from sana_jax.aot.__main__ import main
from sana_jax.models.dc_ae import DCAE

pytestmark = pytest.mark.static
needs_compiler = pytest.mark.skipif(not aot.available(), reason="needs the extra `static`")
CONFIG = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "sana_600m_512.py")
TINY = """
from sana_jax.data.synthetic import Synthetic
from sana_jax.experiment import Data, Experiment, Optim
from sana_jax.models.gemma2 import Gemma2
from sana_jax.training.objectives import LanguageModel
from sana_jax.training.optimizer import AdamW

config = Experiment(
    model=Gemma2(512, 64, 1, 4, 2, 16, 128, dtype="bf16"), objective=LanguageModel(),
    data=Data(Synthetic(), batch=16, size=512, tokens=32), optim=Optim(AdamW()), steps=10,
)
"""


@needs_compiler
def test_a_training_step(tmp_path, capfd):
    config, file = tmp_path / "tiny.py", tmp_path / "plan.json"
    config.write_text(TINY)
    wanted = ["--shape", "448x576", "--output", str(file), "data.batch=32", "--optim.lr=1e-3"]
    assert main(["--devices", "8", "--mesh", "fsdp=8", str(config), *wanted]) == 0
    printed = capfd.readouterr().out
    written = json.loads(file.read_text())
    (row,) = written["programs"]
    assert written["target"] == "h200" and row["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert row["collectives"]["all-gather"] > 0 and row["fusions"] > 0 and row["warnings"] == []
    assert 0 < row["temp_bytes"] < row["peak_bytes"] and row["flops"] > 1e7
    assert row["program"] == "tiny, batch 32 of 448x576" and row["program"] in printed
    assert "of 140.40 GiB" in printed and "collectives" in printed


@needs_compiler
def test_a_sampler(capfd, monkeypatch):
    small = programs.SAMPLERS["sana-sprint-0.6b"].clone(depth=1, width=288, heads=9, cross_heads=4)
    monkeypatch.setitem(programs.SAMPLERS, "sana-sprint-0.6b", small)
    decoder = dict(widths=(8,) * 5 + (32,), encoder_attention=(None,) * 6, decoder_attention=(None,) * 6)
    monkeypatch.setattr(
        programs, "DC_AE_F32C32_SANA", DCAE(encoder_depths=(1,) * 6, decoder_depths=(1,) * 6, **decoder)
    )
    assert main(["--sampler", "sana-sprint-0.6b", "--target", "rtx4090", "--size", "128", "--steps", "1"]) == 0
    printed = capfd.readouterr().out
    assert "sana-sprint-0.6b, 128 px, 1 at once: 1 x rtx4090" in printed and "collectives        none" in printed


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "give a config file or --sampler"),
        ([CONFIG, "--sampler", "sana-1.6b"], "give a config file or --sampler"),
        (["--sampler", "sana-1.6"], "sampler='sana-1.6': must be one of"),
        (["--sampler", "sana-1.6b", "--size", "1000"], "size=1000: must be a multiple of 32"),
        (["--sampler", "sana-1.6b", "--devices", "2"], "batch=1: must be a multiple of the mesh's data=2"),
        ([CONFIG, "--devices", "0"], "devices=0"),
        ([CONFIG, "--devices", "8", "--mesh", "model=8"], "mesh='model=8': must be such as"),
        ([CONFIG, "--devices", "8", "--mesh", "fsdp=3"], "number of devices, 8"),
        ([CONFIG, "--devices", "8", "data.batch=12"], "data.batch=12: must be a multiple of 8"),
        ([CONFIG, "--shape", "512x500"], "shape='512x500': sana_600m_512 has"),
        ([CONFIG, "optim.lrr=1"], "optim.lrr"),
        ([CONFIG, "--target", "h20"], "target='h20'"),
        (["configs/nothing.py"], "no such config file"),
    ],
)
@needs_compiler
def test_bad_input_is_one_clear_line(arguments, problem, capfd):
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith("sana_jax.aot: ") and problem in said and "Traceback" not in said


@needs_compiler
def test_a_stage_is_compiled_with_the_networks_of_the_others():
    config = experiment.load(pathlib.Path(CONFIG).with_name("debug.py"))
    text, dc_ae, flow = config.stages
    mesh = aot.mesh_of("h200", data=8)
    program = programs.train_step(flow, mesh, (64, 64), stages=config.stages)
    _, frozen, batch = program.avals
    assert frozen["text"]["embedding"].shape == (text.model.vocab_size, text.model.width)
    assert "prefix" not in frozen and batch["ids"].shape == (8, flow.data.tokens)
    assert batch["image"].shape == (8, 64, 64, 3) and dc_ae.model.scaling_factor == flow.objective.scaling_factor
