"""Structure of DC-AE from names and shapes, and the scale of the latent, in both formats."""

import warnings

import pytest

from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import dc_ae_structure, rules
from sana_jax.errors import CheckpointError
from sana_jax.models import dc_ae
from sana_jax.models.dc_ae import DCAE
from tests.dc_ae_toys import TOYS, fields_of, shapes_of

PRESETS = {
    "dc-ae-f32c32-sana-1.0": dc_ae.DC_AE_F32C32_SANA,
    "dc-ae-f32c32-sana-1.1": dc_ae.DC_AE_F32C32_SANA,
    "dc-ae-lite-f32c32-sana-1.1": dc_ae.DC_AE_LITE_F32C32_SANA,
    "dc-ae-f32c32-in-1.0": dc_ae.DC_AE_F32C32_IN,
    "dc-ae-f32c32-mix-1.0": dc_ae.DC_AE_F32C32_MIX,
    "dc-ae-f64c128-in-1.0": dc_ae.DC_AE_F64C128_IN,
    "dc-ae-f64c128-mix-1.0": dc_ae.DC_AE_F64C128_MIX,
    "dc-ae-f128c512-in-1.0": dc_ae.DC_AE_F128C512_IN,
    "dc-ae-f128c512-mix-1.0": dc_ae.DC_AE_F128C512_MIX,
}
FORMATS = {"diffusers": names.diffusers_rules, "efficientvit": names.efficientvit_rules}


def header_of(model, fmt="diffusers"):
    table = FORMATS[fmt](fields_of(model))
    header = {name: (list(shape), "F32") for name, shape in rules.names(table, shapes_of(model)).items()}
    return header | {name: ([], "I64") for name in names.counters(table)}


# --- Structure.


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", PRESETS)
def test_structure_and_scale_of_published_variants(name, fmt):
    """From a single file that is named after its variant."""
    fields = names.read_fields(header_of(PRESETS[name], fmt), None, f"somewhere/{name}/model.safetensors")
    assert DCAE(**fields) == PRESETS[name]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("variant", TOYS)
def test_structure_of_toys(variant, fmt):
    fields = names.infer_fields(header_of(TOYS[variant], fmt))
    assert DCAE(**fields, scaling_factor=TOYS[variant].scaling_factor) == TOYS[variant]


@pytest.mark.parametrize("fmt", FORMATS)
def test_several_scales_and_none(fmt):
    model = TOYS["f32c32-sana"].clone(
        encoder_attention=(None, None, (), (3, 5), (5,), ()), decoder_attention=(None, (5,), None, (5,), (), (3,)),
        head_dim=16,
    )  # fmt: skip
    assert DCAE(**names.infer_fields(header_of(model, fmt))) == model


def test_structure_without_scales_leaves_head_dim_open():
    model = TOYS["f32c32-sana"].clone(encoder_attention=(None,) * 5 + ((),), decoder_attention=(None,) * 6)
    fields = fields_of(model)
    del fields["head_dim"], fields["scaling_factor"]
    assert names.infer_fields(header_of(model)) == fields


MIXTURES = {
    "BatchNorm without the rest": dict(decoder_batch_norm=(1,)),
    "one half empty at stage 0": dict(encoder_depths=(0, 1, 1, 2, 1, 1)),
    "rearranged down alone": dict(rearrange_down=True),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("change", MIXTURES)
def test_mixtures_must_be_told_their_activations(change, fmt):
    model = TOYS["f32c32-sana"].clone(**MIXTURES[change])
    header = header_of(model, fmt)
    with pytest.raises(CheckpointError, match="no published DC-AE is like .*pass decoder_relu= and silu_out="):
        names.infer_fields(header)
    with pytest.raises(CheckpointError, match="pass silu_out=$"):
        names.infer_fields(header, given=("decoder_relu",))
    fields = names.infer_fields(header, given=("decoder_relu", "silu_out", "dtype"))
    assert DCAE(**fields, decoder_relu=(), silu_out=False) == model


DIFFUSERS_HEADERS = [
    ("encoder.conv_in", "encoder.conv_in.weight: absent"),
    ("encoder.conv_out", "encoder.conv_out.weight: absent"),
    ("encoder.down_blocks.1.", r"encoder: blocks in stages \[0, 2, 3, 4, 5\]"),
    ("decoder.up_blocks.0.", "no published DC-AE is like this one"),
    ("decoder.", r"decoder: blocks in stages \[\]"),
    ("encoder.down_blocks.5.", "stage widths"),
    ("decoder.up_blocks.2.1.norm", "decoder, stage 2, norm.weight: absent"),
    ("encoder.down_blocks.3.0.attn.to_qkv_multiscale.0.proj_out", "encoder, stage 3, .*proj_out.weight: absent"),
]


@pytest.mark.parametrize(("drop", "message"), DIFFUSERS_HEADERS)
def test_headers_that_are_refused(drop, message):
    header = {name: value for name, value in header_of(TOYS["f32c32-sana"]).items() if not name.startswith(drop)}
    with pytest.raises(CheckpointError, match=message):
        names.infer_fields(header)


@pytest.mark.parametrize("fmt", FORMATS)
def test_odd_shapes_are_refused(fmt):
    """No shape leads to another error than ours, or to fields that it does not show."""
    header = header_of(TOYS["f32c32-in"], fmt)
    for name in header:
        if not name.endswith("num_batches_tracked"):
            try:
                fields = names.infer_fields(header | {name: ([], "F32")})
            except CheckpointError as error:
                assert "absent or odd" in str(error)
            else:  # the first block stands for the others, whose shapes are compared later
                assert DCAE(**fields, scaling_factor=0.3189) == TOYS["f32c32-in"]
    with pytest.raises(CheckpointError, match="blocks in stages"):
        names.infer_fields({})


# --- Scale of the latent.


def test_the_table_of_variants_is_that_of_the_presets():
    assert dc_ae_structure.PUBLISHED.keys() == PRESETS.keys()
    for name, model in PRESETS.items():
        assert dc_ae_structure.published_names(fields_of(model))[name] == model.scaling_factor
    other = fields_of(dc_ae.DC_AE_F32C32_IN.clone(encoder_depths=(0, 4, 7, 2, 2, 2)))
    assert dc_ae_structure.published_names(other) == {}
    assert dc_ae_structure.published_names(fields_of(TOYS["f32c32-in"])) == {}


@pytest.mark.parametrize("fmt", FORMATS)
def test_scale_is_told_by_the_innermost_name(fmt):
    header = header_of(dc_ae.DC_AE_F32C32_MIX, fmt)
    for path, expected in {
        "dc-ae-f32c32-in-1.0/dc-ae-f32c32-mix-1.0.safetensors": 0.4552,
        "dc-ae-f32c32-mix-1.0/snapshots/models--x--dc-ae-f32c32-in-1.0/model.safetensors": 0.3189,
        "dc-ae-f64c128-in-1.0/dc-ae-f32c32-mix-1.0-diffusers": 0.4552,
    }.items():
        assert names.read_fields(header, None, path)["scaling_factor"] == expected


def test_scale_is_told_by_the_config_of_efficientvit():
    header = header_of(dc_ae.DC_AE_F32C32_MIX, "efficientvit")
    path = "dc-ae-f32c32-in-1.0"
    read = {
        "mix": names.efficientvit_fields(header, {"model_name": "dc-ae-f32c32-mix-1.0"}, path),
        "own": names.efficientvit_fields(header, {"scaling_factor": 0.5}, path),
        "path": names.efficientvit_fields(header, {"model_name": "unheard of"}, path),
    }
    assert {key: fields["scaling_factor"] for key, fields in read.items()} == {
        "mix": 0.4552,
        "own": 0.5,
        "path": 0.3189,
    }
    with pytest.raises(CheckpointError, match="model_name='dc-ae-f64c128-in-1.0' in config.json, but the tensors"):
        names.efficientvit_fields(header, {"model_name": "dc-ae-f64c128-in-1.0"}, path)


def test_scale_that_nothing_tells_is_said():
    header = header_of(dc_ae.DC_AE_F32C32_MIX)
    with pytest.warns(UserWarning, match=r"scale of the latent may be 0.3189 \(.*in-1.0\) or 0.4552 .*scaling_factor="):
        assert "scaling_factor" not in names.read_fields(header, None, "a.safetensors")
    with pytest.warns(UserWarning, match="scale of the latent is not known"):
        names.read_fields(header_of(TOYS["f32c32-in"]), None, "dc-ae-f32c32-in-1.0.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names.read_fields(header, None, "a.safetensors", given=("scaling_factor",))
        assert "scaling_factor" not in names.read_fields(header_of(TOYS["lite-f32c32"]), None, "a.safetensors")


@pytest.mark.parametrize("name", PRESETS)
def test_efficientvit_config_round_trip(name):
    model = PRESETS[name]
    config = names.efficientvit_config(fields_of(model))
    assert config["model_name"] == {"dc-ae-f32c32-sana-1.1": "dc-ae-f32c32-sana-1.0"}.get(name, name)
    assert DCAE(**names.read_fields(header_of(model, "efficientvit"), config, "a")) == model


def test_efficientvit_config_of_an_unpublished_model():
    assert names.efficientvit_config(fields_of(TOYS["f32c32-in"])) == {"scaling_factor": 0.3189}
    other = dc_ae.DC_AE_F32C32_IN.clone(scaling_factor=0.7)
    assert names.efficientvit_config(fields_of(other)) == {"scaling_factor": 0.7}
