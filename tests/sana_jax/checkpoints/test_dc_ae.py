"""config.json of DC-AE in diffusers' format."""

import inspect

import pytest

from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import rules
from sana_jax.errors import InputError
from sana_jax.models import dc_ae
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
from tests.dc_ae_toys import TOYS, fields_of, shapes_of

# vae/config.json as published with SANA, less what has no effect.
PUBLISHED = {
    "_class_name": "AutoencoderDC",
    "_diffusers_version": "0.32.0.dev0",
    "attention_head_dim": 32,
    "decoder_act_fns": "silu",
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}

# What the others change in it, as diffusers' conversion of efficientvit's models writes them.
_IN = {
    "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
    "scaling_factor": 0.3189,
}


def _deeper(latent_channels, more, scaling_factor):
    """`_IN` with more stages at the end, all of the same kind."""
    ends = {"norm_types": "rms_norm", "act_fns": "silu", "layers_per_block": 2, "qkv_multiscales": [],
            "block_out_channels": 2048, "block_types": "EfficientViTBlock"}  # fmt: skip
    lists = {key: value for key, value in (PUBLISHED | _IN).items() if isinstance(value, list)}
    longer = {key: value + [ends[key.split("_", 1)[1]]] * more for key, value in lists.items()}
    return _IN | longer | {"latent_channels": latent_channels, "scaling_factor": scaling_factor}


VARIANTS = {
    "sana": (DC_AE_F32C32_SANA, {}),
    "in": (dc_ae.DC_AE_F32C32_IN, _IN),
    "mix": (dc_ae.DC_AE_F32C32_MIX, _IN | {"scaling_factor": 0.4552}),
    "f64c128-in": (dc_ae.DC_AE_F64C128_IN, _deeper(128, 1, 0.2889)),
    "f64c128-mix": (dc_ae.DC_AE_F64C128_MIX, _deeper(128, 1, 0.4538)),
    "f128c512-in": (dc_ae.DC_AE_F128C512_IN, _deeper(512, 2, 0.4883)),
    "f128c512-mix": (dc_ae.DC_AE_F128C512_MIX, _deeper(512, 2, 0.3620)),
    "lite": (
        dc_ae.DC_AE_LITE_F32C32_SANA,
        {
            "decoder_layers_per_block": [0, 3, 5, 4, 4, 4],
            "decoder_block_types": "ResBlock",
            "decoder_qkv_multiscales": [[]] * 6,
            "upsample_block_type": "pixel_shuffle",
            "decoder_conv_act_fn": "silu",
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_configs_are_the_presets(variant):
    model, changes = VARIANTS[variant]
    config = PUBLISHED | changes
    assert DCAE(**names.config_fields(config)) == model
    written = names.to_config(fields_of(model))
    assert names.config_fields(written) == fields_of(model)
    alike = {"decoder_block_types": ["ResBlock"] * 6} if variant == "lite" else {}
    assert {k: written[k] for k in config if k != "_diffusers_version"} == {
        k: v for k, v in (config | alike).items() if k != "_diffusers_version"
    }


@pytest.mark.parity
def test_defaults_are_diffusers():
    import diffusers

    signature = inspect.signature(diffusers.AutoencoderDC.__init__).parameters
    defaults = {k: p.default for k, p in signature.items() if k != "self"}
    assert names._DEFAULTS == defaults


def test_lone_block_type_stands_for_all_stages():
    fields = names.config_fields(PUBLISHED | {"decoder_block_types": "ResBlock"})
    assert fields["decoder_attention"] == (None,) * 6
    assert fields["encoder_attention"] == (None, None, None, (5,), (5,), (5,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_norm_types": ["rms_norm", "batch_norm"]}, "decoder_norm_types=.*a list of 6 entries"),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types='layer_norm': must be one of 'rms_norm', 'batch_"),
        ({"decoder_act_fns": ["relu"] * 5 + ["gelu"]}, "decoder_act_fns='gelu'.*'silu'"),
        ({"decoder_act_fns": None}, "decoder_act_fns=None: must be a list"),
        ({"decoder_conv_act_fn": "gelu"}, "decoder_conv_act_fn='gelu'.*'relu'"),
        ({"encoder_block_out_channels": []}, r"encoder_block_out_channels=\[\]: must have an entry"),
        ({"encoder_out_shortcut": False}, "encoder_out_shortcut=False: must be one of True"),
        ({"encoder_block_types": "ResBlok"}, "'ResBlok'.*did you mean 'ResBlock'"),
        ({"decoder_block_types": ["ResBlock"]}, "decoder_block_types=.*a list of 6 entries"),
        ({"encoder_layers_per_block": [2, 0, 2, 3, 3, 3]}, "encoder_layers_per_block=0: must be"),
        ({"encoder_layers_per_block": [-1, 2, 2, 3, 3, 3]}, "encoder_layers_per_block=-1: must be"),
        ({"encoder_qkv_multiscales": [5]}, "encoder_qkv_multiscales=.*a list of 6 entries"),
        ({"decoder_block_out_channels": [64] * 6}, "decoder_block_out_channels=.*the encoder's"),
        ({"latent_channels": "32"}, "latent_channels='32': must be a positive int"),
        ({"scaling_factor": None}, "scaling_factor=None: must be a positive number"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        names.config_fields(PUBLISHED | change)


@pytest.mark.parametrize("model", TOYS.values())
def test_config_round_trip(model):
    assert names.config_fields(names.to_config(fields_of(model))) == fields_of(model)


@pytest.mark.parity
def test_empty_config_is_diffusers_default():
    """Every key that is absent, and every unusual name of a resampler, means what it does there."""
    import diffusers

    for config in ({}, {"upsample_block_type": "up", "downsample_block_type": "down"}):
        config = config | {f"{side}_block_out_channels": (32,) * 6 for side in ("encoder", "decoder")}
        fields, theirs = names.config_fields(config), diffusers.AutoencoderDC(**config).state_dict()
        table = names.diffusers_rules(fields)
        assert rules.names(table, shapes_of(DCAE(**fields))) == {n: tuple(t.shape) for n, t in theirs.items()}
