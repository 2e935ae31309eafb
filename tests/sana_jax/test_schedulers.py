"""scheduler_config.json and pipeline classes: what is followed, what is refused, what is written."""

import json

import pytest

from sana_jax import schedulers
from sana_jax.errors import InputError
from sana_jax.models.sana import SANA_1600M, SANA_SPRINT_1600M


def folder(tmp_path, **config):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "config, shift",
    [
        (dict(_class_name="DPMSolverMultistepScheduler", flow_shift=3.0, use_flow_sigmas=True), 3.0),
        (dict(flow_shift=2), 2.0),
        (dict(_class_name="SCMScheduler", sigma_data=0.5, prediction_type="trigflow"), None),
        (dict(_class_name="SCMScheduler"), None),
        ({}, None),
    ],
)
def test_read(tmp_path, config, shift):
    assert schedulers.read_flow_shift(folder(tmp_path, **config)) == shift


def test_no_scheduler(tmp_path):
    assert schedulers.read_flow_shift(tmp_path) is None


def test_euler_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="came with Euler; sampler='flow-euler' follows it"):
        assert schedulers.read_flow_shift(folder(tmp_path, _class_name="FlowMatchEulerDiscreteScheduler", shift=3)) == 3


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(_class_name="DDIMScheduler"), "_class_name='DDIMScheduler': must be one of 'DPMSolverMultistepScheduler'"),
        (dict(solver_order=3), "solver_order=3: must be one of 2"),
        (dict(prediction_type="trigflow"), "prediction_type='trigflow': must be one of 'flow_prediction'"),
        (dict(_class_name="SCMScheduler", sigma_data=1.0), "sigma_data=1.0: must be one of 0.5"),
        (dict(_class_name="SCMScheduler", prediction_type="epsilon"), "prediction_type='epsilon': must be one of 'trigflow'"),
        (dict(flow_shift=-1), "flow_shift=-1: must be a positive number or null"),
    ],
)
def test_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=f"scheduler_config.json: {message}"):
        schedulers.read_flow_shift(folder(tmp_path, **config))


@pytest.mark.parametrize("name, sprint", schedulers.PIPELINES.items())
def test_pipeline_class_and_transformer_agree(name, sprint):
    fits, other = (SANA_SPRINT_1600M, SANA_1600M) if sprint else (SANA_1600M, SANA_SPRINT_1600M)
    schedulers.check_pipeline_class("x/model_index.json", name, fits)
    with pytest.raises(InputError, match=f"x/model_index.json: _class_name='{name}' has .* but guidance_embeds={not sprint} "):
        schedulers.check_pipeline_class("x/model_index.json", name, other)


@pytest.mark.parity
@pytest.mark.parametrize("module", [SANA_1600M, SANA_SPRINT_1600M], ids=["flow", "sprint"])
def test_what_is_written_is_read_by_diffusers_and_by_us(tmp_path, module):
    import diffusers

    config, entries = schedulers.scheduler_config(module, 3.5), schedulers.pipeline_entries(module)
    path = folder(tmp_path, **config)
    peer = getattr(diffusers, entries["scheduler"][1]).from_pretrained(path)
    assert hasattr(diffusers, entries["_class_name"])
    assert {key: peer.config[key] for key in config if key != "_class_name"} == {k: v for k, v in config.items() if k != "_class_name"}
    assert schedulers.read_flow_shift(path) == (None if module.guidance_embed else 3.5)
