"""Every experiment in configs/: it loads, says what it is, and is what the papers describe."""

import ast
import dataclasses
import pathlib
import re

import pytest

from sana_jax import experiment
from sana_jax.aot import programs
from sana_jax.data import buckets
from sana_jax.data.shapes import Shapes
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.sana import SANA_1_5_4800M, SANA_600M, SANA_1600M, SANA_1600M_4K, Sana
from sana_jax.stacks import NVLABS

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
# The cascade: each begins with the parameters of the run before it.
BEFORE = {
    "sana_600m_1024": "runs/sana_600m_512",
    "sana_1600m_1024": "runs/sana_1600m_512",
    "sana_1600m_2k": "runs/sana_1600m_1024",
    "sana_1600m_4k": "runs/sana_1600m_2k",
    "sana_1_5_4800m_1024": "sana-1.5-1.6b",
    "sana_1600m_1024_finetune": "sana-1.6b",
    "dc_ae_1k": "runs/dc_ae_512",
    "dc_ae_2k": "runs/dc_ae_1k",
    "dc_ae_4k": "runs/dc_ae_2k",
    ("shapes", "autoencoder_256"): "autoencoder",
    ("shapes", "flow_sizes"): "flow",
}


def load(name, *arguments):
    return experiment.load(FOLDER / f"{name}.py", arguments)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name):
    """Its model is built, its patterns are matched, its numbers are in range: see experiment_checks."""
    config = load(name)
    for stage in config.stages or (config,):
        assert stage.init.weights == BEFORE.get((name, stage.name) if config.stages else name, "")
        if isinstance(stage.model, Sana):
            assert stage.data.size == 32 * stage.model.sample_size
            assert stage.model == stage.model.clone(**NVLABS.sana_fields())
        if isinstance(stage.data.source, Shapes):
            reader = stage.data.source.open()
            assert min(buckets.divide(reader, stage.data.size, stage.data.buckets)[2]) >= stage.data.batch


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name):
    words = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert re.search(r"https://arxiv.org/abs/\d{4}\.\d{5}", words)
    assert "Hardware: " in words and re.search("Cost(, an estimate)?: ", words)
    assert f"python train.py configs/{name}.py workdir=" in words


def test_a_derived_one_is_a_few_lines():
    for name in {name for name in BEFORE if isinstance(name, str)} | {"sana_600m_512", "sana_1_5_1600m_1024"}:
        words, *code = ast.parse((FOLDER / f"{name}.py").read_text()).body
        assert code[-1].end_lineno - words.end_lineno <= 16, name


def test_the_recipes():
    base = load("sana_1600m_512")
    assert base.model.clone(dtype=SANA_1600M.dtype, remat=None) == SANA_1600M.clone(sample_size=16, **NVLABS.sana_fields())
    assert (base.objective.shift, base.objective.caption_dropout, base.optim.clip, base.optim.lr) == (3, 0.1, 0.1, 1e-4)
    assert (base.data.captions.how, base.data.captions.threshold, base.data.captions.temperature) == ("power", 25, 0.1)
    assert (base.optim.lr_rule, base.optim.base_batch, base.optim.warmup) == ("sqrt", 256, 2000)
    small = load("sana_600m_1024")
    assert (small.model.width, small.model.depth, small.objective.shift) == (SANA_600M.width, SANA_600M.depth, 4)
    largest = load("sana_1600m_4k")
    assert largest.model.position_scale == SANA_1600M_4K.position_scale == 2 and largest.objective.shift == 6
    assert load("sana_1600m_2k").model.position_scale == 1 and load("sana_1600m_2k").objective.shift == 3
    grown = load("sana_1_5_4800m_1024")
    assert grown.init.grow == 18 and grown.model.depth == SANA_1_5_4800M.depth == 60 and grown.model.qk_norm
    assert load("sana_1600m_1024_finetune").optim.lr == 2e-5


def test_one_stage_learns_several_sizes():
    stage = load("shapes").stages[-1]
    assert programs.shapes_of(stage)[0] == (512, 512), "what a plan for memory looks at first"
    reader = stage.data.source.open()
    shapes, _, counts = buckets.divide(reader, stage.data.size, stage.data.buckets)
    shares = {shape: count / len(reader) for shape, count in zip(shapes, counts)}
    assert sum(share for shape, share in shares.items() if min(shape) > 300) == pytest.approx(1 / 4, abs=0.001)
    assert sum(share for (height, width), share in shares.items() if height != width) == pytest.approx(1 / 3, abs=0.001)


def test_dc_ae_stages_leave_pixels_alone():
    assert load("dc_ae_512").optim.freeze == ()
    for name in ("dc_ae_1k", "dc_ae_2k", "dc_ae_4k"):
        config = load(name)
        assert isinstance(config.model, DCAE) and config.optim.freeze == load("dc_ae_1k").optim.freeze
        frozen = {p for p in _paths(config.model) if any(re.fullmatch(f, p) for f in config.optim.freeze)}
        moving = _paths(config.model) - frozen
        assert {"/".join(p.split("/")[:2]) for p in moving} == {
            "encoder/stage_4", "encoder/stage_5", "encoder/conv_out",
            "decoder/stage_4", "decoder/stage_5", "decoder/conv_in",
        }  # fmt: skip


def _paths(model):
    from sana_jax.parameters import parameter_shapes

    return set(parameter_shapes(model))


def test_overrides_of_a_real_one():
    config = load("sana_1600m_512", "model.depth=2", "data.batch=8", "optim.lr=2e-5", "mesh.fsdp=8")
    assert dataclasses.replace(config, model=None) == dataclasses.replace(
        load("sana_1600m_512"),
        model=None,
        data=dataclasses.replace(config.data, batch=8),
        optim=dataclasses.replace(config.optim, lr=2e-5),
        mesh=experiment.Mesh(fsdp=8),
    )
