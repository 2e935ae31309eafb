"""Names, config.json and inferred structure of DC-AE in diffusers' format."""

import ast
import dataclasses
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import rules
from sana_jax.errors import CheckpointError, InputError
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
from tests import peers

KEY_LIST = pathlib.Path(__file__).parents[2] / "golden/key_lists/dc_ae_f32c32_sana.txt"

TOY = DCAE(
    widths=(8, 16, 32, 64),
    encoder_depths=(1, 2, 1, 2),
    decoder_depths=(2, 1, 2, 1),
    encoder_attention=(None, None, (), (3, 5)),
    decoder_attention=(None, (5,), None, (5,)),
    head_dim=16,
    scaling_factor=0.5,
)

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


def fields_of(model):
    skip = ("dtype", "param_dtype", "parent", "name")
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skip}


def shapes_of(model):
    x = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def table_of(model):
    depths = model.encoder_depths, model.decoder_depths
    return names.diffusers_rules(*depths, model.encoder_attention, model.decoder_attention)


def published_keys():
    rows = (line.split(" ", 1) for line in KEY_LIST.read_text().splitlines())
    return {name: ast.literal_eval(shape) for name, shape in rows}


# --- Names.


def test_names_and_shapes_are_the_published_ones():
    expected = published_keys()
    assert len(expected) == 375
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 312_250_275
    assert rules.names(table_of(DC_AE_F32C32_SANA), shapes_of(DC_AE_F32C32_SANA)) == expected


def test_round_trip_is_bit_exact():
    shapes, table, rng = shapes_of(TOY), table_of(TOY), np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    state = dict(rules.to_torch(table, leaves))
    back = rules.to_flax(table, shapes, peers.header(state), state.items(), np.float32)
    assert back.keys() == leaves.keys()
    assert all((back[path] == leaf).all() for path, leaf in leaves.items())


@pytest.mark.parity
def test_round_trip_of_the_peer_is_bit_exact():
    import diffusers

    module = diffusers.AutoencoderDC.from_config(names.to_config(fields_of(TOY)))
    state = peers.to_numpy_state(peers.randomise(module, seed=0))
    table, header = table_of(TOY), peers.header(state)
    leaves = rules.to_flax(table, shapes_of(TOY), header, state.items(), np.float32)
    back = dict(rules.to_torch(table, leaves))
    assert back.keys() == state.keys()
    assert all(back[n].dtype == a.dtype and (back[n] == a).all() for n, a in state.items())
    assert fields_of(TOY) == names.infer_fields(header) | {"scaling_factor": 0.5}


# --- config.json.


def test_published_config_is_the_preset():
    fields = names.config_fields(PUBLISHED)
    assert fields == fields_of(DC_AE_F32C32_SANA)
    assert DCAE(**fields) == DC_AE_F32C32_SANA and hash(DCAE(**fields))


@pytest.mark.parametrize("model", [DC_AE_F32C32_SANA, TOY])
def test_config_round_trip(model):
    config = names.to_config(fields_of(model))
    assert names.config_fields(config) == fields_of(model)


def test_written_config_says_what_the_published_one_says():
    written = names.to_config(fields_of(DC_AE_F32C32_SANA))
    same = {k: v for k, v in PUBLISHED.items() if k != "_diffusers_version"}
    assert {k: written[k] for k in same} == same


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
        ({"upsample_block_type": "pixel_shuffle"}, "upsample_block_type=.*'interpolate'"),
        ({"downsample_block_type": "pixel_unshuffle"}, "downsample_block_type=.*'Conv'"),
        ({"decoder_norm_types": ["rms_norm", "batch_norm"]}, "decoder_norm_types='batch_norm'"),
        ({"decoder_act_fns": "relu"}, "decoder_act_fns='relu'.*'silu'"),
        ({"decoder_conv_act_fn": "silu"}, "decoder_conv_act_fn='silu'.*'relu'"),
        ({"encoder_out_shortcut": False}, "encoder_out_shortcut=False: must be one of True"),
        ({"encoder_block_types": "ResBlok"}, "'ResBlok'.*did you mean 'ResBlock'"),
        ({"decoder_block_types": ["ResBlock"]}, "decoder_block_types=.*a list of 6 entries"),
        ({"encoder_layers_per_block": [0, 2, 2, 3, 3, 3]}, "encoder_layers_per_block=0: must be"),
        ({"encoder_qkv_multiscales": [5]}, "encoder_qkv_multiscales=.*a list of 6 entries"),
        ({"decoder_block_out_channels": [64] * 6}, "decoder_block_out_channels=.*the encoder's"),
        ({"latent_channels": "32"}, "latent_channels='32': must be a positive int"),
        ({"scaling_factor": None}, "scaling_factor=None: must be a positive number"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        names.config_fields(PUBLISHED | change)


def test_empty_config_is_diffusers_default_which_we_do_not_build():
    with pytest.raises(InputError, match="upsample_block_type='pixel_shuffle'"):
        names.config_fields({})


# --- Structure from names and shapes.


def test_structure_of_the_published_names():
    header = {name: (list(shape), "F32") for name, shape in published_keys().items()}
    fields = names.infer_fields(header)
    assert DCAE(**fields) == DC_AE_F32C32_SANA


def test_structure_without_scales_leaves_head_dim_open():
    model = TOY.clone(encoder_attention=(None, None, (), ()), decoder_attention=(None,) * 4)
    header = {n: (s, "F32") for n, s in rules.names(table_of(model), shapes_of(model)).items()}
    fields = fields_of(model)
    del fields["head_dim"], fields["scaling_factor"]
    assert names.infer_fields(header) == fields


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("", "decoder.conv_out.conv.weight", "decoder.conv_out.conv.weight: a DC-AE without"),
        ("encoder.conv_out", None, "encoder.conv_out.weight: absent"),
        ("encoder.down_blocks.1.", None, r"encoder: blocks in stages \[0, 2, 3, 4, 5\]"),
        ("decoder.up_blocks.0.", None, "decoder: blocks in stages"),
        ("decoder.", None, r"decoder: blocks in stages \[\]"),
        ("encoder.down_blocks.5.", None, "stage widths"),
        ("decoder.up_blocks.2.1.norm", None, "decoder, stage 2, norm.weight: absent"),
    ],
)
def test_headers_that_are_refused(drop, add, message):
    keys = published_keys().items()
    header = {n: (s, "F32") for n, s in keys if not (drop and n.startswith(drop))}
    if add:
        header[add] = ((12, 256, 3, 3), "F32")
    with pytest.raises(CheckpointError, match=message):
        names.infer_fields(header)
