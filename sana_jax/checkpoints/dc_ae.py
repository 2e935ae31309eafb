"""DC-AE in diffusers' (`AutoencoderDC`) and efficientvit's formats: config.json and fields.

`fields` are those of `sana_jax.models.dc_ae.DCAE`, as plain numbers and tuples.  The names of the
tensors are in dc_ae_names.py, the structure that names tell in dc_ae_structure.py.
"""

from sana_jax.checkpoints.dc_ae_names import counters as counters
from sana_jax.checkpoints.dc_ae_names import diffusers_rules as diffusers_rules
from sana_jax.checkpoints.dc_ae_names import efficientvit_rules as efficientvit_rules
from sana_jax.checkpoints.dc_ae_names import is_efficientvit as is_efficientvit
from sana_jax.checkpoints.dc_ae_names import with_counters as with_counters
from sana_jax.checkpoints.dc_ae_structure import infer_fields as infer_fields
from sana_jax.checkpoints.dc_ae_structure import latent_scale, published_names
from sana_jax.errors import InputError, require_choice, require_positive

RES, VIT = "ResBlock", "EfficientViTBlock"

# What diffusers takes for a key that a config.json leaves out.
_DEFAULTS = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": RES,
    "decoder_block_types": RES,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
# The one value of each that DCAE builds.
_BUILT = {"encoder_out_shortcut": True, "decoder_in_shortcut": True}


# --- config.json.


def _list(field, value, count=None):
    if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
        entries = "" if count is None else f" of {count} entries, one for each stage"
        raise InputError(f"{field}={value!r}: must be a list{entries}")
    return value


def _positives(field, value, count=None):
    return tuple(require_positive(field, v) for v in _list(field, value, count))


def _per_stage(field, value, stages):
    """One value for each stage; diffusers lets a lone string stand for all."""
    return [value] * stages if isinstance(value, str) else _list(field, value, stages)


def _stages_with(field, value, stages, usual, other):
    """The numbers of the stages that have `other` and not `usual`."""
    values = _per_stage(field, value, stages)
    return tuple(i for i, v in enumerate(values) if require_choice(field, v, (usual, other)) == other)


def _side(side, config, stages):
    """The fields of one half: depths, and attention from block types and scales."""
    depths, kinds, scales = (
        f"{side}_{key}" for key in ("layers_per_block", "block_types", "qkv_multiscales")
    )
    first, *others = _list(depths, config[depths], stages)
    attention = tuple(
        _positives(scales, sizes) if require_choice(kinds, kind, (RES, VIT)) == VIT else None
        for kind, sizes in zip(_per_stage(kinds, config[kinds], stages), _list(scales, config[scales], stages))
    )
    return {
        f"{side}_depths": (0 if first == 0 else require_positive(depths, first), *_positives(depths, others)),
        f"{side}_attention": attention,
    }


def config_fields(config: dict) -> dict:
    """config.json of diffusers' `AutoencoderDC` -> fields.  Unknown keys are ignored.

    Raises InputError: a value of the wrong type, or a structure that DCAE does not build.
    """
    config = _DEFAULTS | config
    for field, built in _BUILT.items():
        require_choice(field, config[field], (built,))
    field = "encoder_block_out_channels"
    widths = _positives(field, config[field])
    if not widths:
        raise InputError(f"{field}=[]: must have an entry for each stage")
    if tuple(_list(field := "decoder_block_out_channels", config[field])) != widths:
        raise InputError(f"{field}={config[field]!r}: must be the encoder's, {list(widths)}")
    act, norm = "decoder_act_fns", "decoder_norm_types"
    return {
        "latent_channels": require_positive("latent_channels", config["latent_channels"]),
        "in_channels": require_positive("in_channels", config["in_channels"]),
        "widths": widths,
        **_side("encoder", config, len(widths)),
        **_side("decoder", config, len(widths)),
        "head_dim": require_positive("attention_head_dim", config["attention_head_dim"]),
        # diffusers takes every other name for the other kind; the shapes of the weights tell a slip.
        "rearrange_down": config["downsample_block_type"] == "pixel_unshuffle",
        "rearrange_up": config["upsample_block_type"] != "interpolate",
        "decoder_relu": _stages_with(act, config[act], len(widths), "silu", "relu"),
        "decoder_batch_norm": _stages_with(norm, config[norm], len(widths), "rms_norm", "batch_norm"),
        "silu_out": require_choice("decoder_conv_act_fn", config["decoder_conv_act_fn"], ("relu", "silu")) == "silu",
        "scaling_factor": require_positive("scaling_factor", config["scaling_factor"], float),
    }


def to_config(fields: dict) -> dict:
    """Fields -> what `AutoencoderDC.from_config` needs to build the same model."""

    def named(stages, usual, other):
        return [other if i in stages else usual for i in range(len(fields["widths"]))] if stages else usual

    config = {
        "_class_name": "AutoencoderDC",
        **_BUILT,
        "latent_channels": fields["latent_channels"],
        "in_channels": fields["in_channels"],
        "attention_head_dim": fields["head_dim"],
        "downsample_block_type": "pixel_unshuffle" if fields["rearrange_down"] else "Conv",
        "upsample_block_type": "pixel_shuffle" if fields["rearrange_up"] else "interpolate",
        "decoder_act_fns": named(fields["decoder_relu"], "silu", "relu"),
        "decoder_norm_types": named(fields["decoder_batch_norm"], "rms_norm", "batch_norm"),
        "decoder_conv_act_fn": "silu" if fields["silu_out"] else "relu",
        "scaling_factor": fields["scaling_factor"],
    }
    for side in ("encoder", "decoder"):
        attention = fields[f"{side}_attention"]
        config |= {
            f"{side}_block_out_channels": list(fields["widths"]),
            f"{side}_layers_per_block": list(fields[f"{side}_depths"]),
            f"{side}_block_types": [RES if scales is None else VIT for scales in attention],
            f"{side}_qkv_multiscales": [list(scales or ()) for scales in attention],
        }
    return config


# --- efficientvit, whose config.json is {"model_name": the variant} or absent.


def efficientvit_fields(header, config, path, given=()):
    """Fields of weights in efficientvit's names; see `infer_fields` and `latent_scale`."""
    fields = infer_fields(header, given)
    scale = (config or {}).get("scaling_factor")  # ours; see `efficientvit_config`
    if scale is not None:
        return fields | {"scaling_factor": require_positive("scaling_factor", scale, float)}
    return fields | latent_scale(fields, config, path, given)


def efficientvit_config(fields):
    """config.json of efficientvit, with the scale of the latent, which efficientvit itself ignores.

    `model_name` is there for published structures; sana-1.0 and 1.1 differ by weights alone.
    """
    scale = fields["scaling_factor"]
    names = [name for name, known in published_names(fields).items() if known == scale]
    return {"scaling_factor": scale} | ({"model_name": names[0]} if names else {})


def read_fields(header, config, path, given=()):
    """Fields of a checkpoint in either format, from its config.json or None.

    Args:
      header: {name: (shape, dtype)}.
      path: of the checkpoint, for messages; the name of the variant in it tells the latent's scale.
      given: field names that the caller sets.
    Raises:
      InputError, CheckpointError: a config or tensors that no DC-AE has.
    """
    if is_efficientvit(header):
        return efficientvit_fields(header, config, path, given)
    if config is not None:
        return config_fields(config)
    fields = infer_fields(header, given)
    return fields | latent_scale(fields, None, path, given)
