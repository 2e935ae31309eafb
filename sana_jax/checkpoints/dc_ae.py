"""DC-AE in diffusers' format (`AutoencoderDC`): names, config.json, and structure from names.

`fields` are those of `sana_jax.models.dc_ae.DCAE`, as plain numbers and tuples.
"""

import re

from sana_jax.checkpoints.rules import (
    CONV,
    DEPTHWISE,
    GROUPED,
    LINEAR,
    POINTWISE,
    Rule,
    dense,
    third,
)
from sana_jax.errors import CheckpointError, InputError, require_choice, require_positive

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
_BUILT = {
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
}


# --- Names.


def _norm(torch, flax):
    return [Rule(f"{torch}.weight", f"{flax}/scale"), Rule(f"{torch}.bias", f"{flax}/bias")]


def _conv(torch, flax, bias=True):
    return dense(torch, flax, bias, CONV)


def _res_block(torch, flax):
    return [
        *_conv(f"{torch}.conv1", f"{flax}/conv_1"),
        *_conv(f"{torch}.conv2", f"{flax}/conv_2", bias=False),
        *_norm(f"{torch}.norm", f"{flax}/norm"),
    ]


def _efficient_vit_block(torch, flax, scales):
    # to_q, to_k and to_v are thirds of one convolution's output, not queries, keys and values:
    # heads are cut from the fused output (docs/numerics.md 1.9), so it stays fused and in this order.
    attention, ffn = f"{torch}.attn", f"{torch}.conv_out"
    rows = [
        Rule(f"{attention}.to_{x}.weight", f"{flax}/attention/qkv/kernel", third(i, 3, LINEAR))
        for i, x in enumerate("qkv")
    ]
    for i, size in enumerate(scales):
        scale = f"{attention}.to_qkv_multiscale.{i}"
        rows += [
            Rule(f"{scale}.proj_in.weight", f"{flax}/attention/scale_{size}/kernel", DEPTHWISE),
            Rule(f"{scale}.proj_out.weight", f"{flax}/attention/scale_{size}_mix/kernel", GROUPED),
        ]
    return rows + [
        Rule(f"{attention}.to_out.weight", f"{flax}/attention/project/kernel", LINEAR),
        *_norm(f"{attention}.norm_out", f"{flax}/attention_norm"),
        *dense(f"{ffn}.conv_inverted", f"{flax}/mix_ffn/expand", layout=POINTWISE),
        *dense(f"{ffn}.conv_depth", f"{flax}/mix_ffn/depthwise", layout=DEPTHWISE),
        *dense(f"{ffn}.conv_point", f"{flax}/mix_ffn/project", bias=False, layout=POINTWISE),
        *_norm(f"{ffn}.norm", f"{flax}/mix_ffn_norm"),
    ]


def _stages(torch, flax, depths, attention, resampler, first):
    """Rows of all stages; the resampler of stage i is entry 0 (`first`) or the last of its list."""
    rows = []
    for i, (depth, scales) in enumerate(zip(depths, attention, strict=True)):
        resampled = i + 1 < len(depths)
        for j in range(depth):
            names = f"{torch}.{i}.{j + (first and resampled)}", f"{flax}/stage_{i}/block_{j}"
            rows += _res_block(*names) if scales is None else _efficient_vit_block(*names, scales)
        if resampled:
            entry = 0 if first else depth
            rows += _conv(f"{torch}.{i}.{entry}.conv", f"{flax}/stage_{i}/{resampler}/conv")
    return rows


def diffusers_rules(encoder_depths, decoder_depths, encoder_attention, decoder_attention):
    """The total table of diffusers' `AutoencoderDC` for a DCAE with these fields."""
    encoder = "encoder.down_blocks", "encoder", encoder_depths, encoder_attention
    decoder = "decoder.up_blocks", "decoder", decoder_depths, decoder_attention
    return [
        *_conv("encoder.conv_in", "encoder/conv_in"),
        *_stages(*encoder, resampler="down", first=False),
        *_conv("encoder.conv_out", "encoder/conv_out"),
        *_conv("decoder.conv_in", "decoder/conv_in"),
        *_stages(*decoder, resampler="up", first=True),
        *_norm("decoder.norm_out", "decoder/norm_out"),
        *_conv("decoder.conv_out", "decoder/conv_out"),
    ]


# --- config.json.


def _list(field, value, count=None):
    if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
        entries = "" if count is None else f" of {count} entries, one for each stage"
        raise InputError(f"{field}={value!r}: must be a list{entries}")
    return value


def _positives(field, value, count=None):
    return tuple(require_positive(field, v) for v in _list(field, value, count))


def _side(side, config, stages):
    """The fields of one half: depths, and attention from block types and scales."""
    depths, kinds, scales = (
        f"{side}_{key}" for key in ("layers_per_block", "block_types", "qkv_multiscales")
    )
    kind_of = config[kinds]
    kind_of = [kind_of] * stages if isinstance(kind_of, str) else _list(kinds, kind_of, stages)
    attention = tuple(
        _positives(scales, sizes) if require_choice(kinds, kind, (RES, VIT)) == VIT else None
        for kind, sizes in zip(kind_of, _list(scales, config[scales], stages))
    )
    return {
        f"{side}_depths": _positives(depths, config[depths], stages),
        f"{side}_attention": attention,
    }


def config_fields(config: dict) -> dict:
    """config.json of diffusers' `AutoencoderDC` -> fields.  Unknown keys are ignored.

    Raises InputError: a value of the wrong type, or a structure that DCAE does not build.
    """
    config = _DEFAULTS | config
    for field, built in _BUILT.items():
        value = config[field]
        if field == "downsample_block_type" and value != _DEFAULTS[field]:
            continue  # diffusers takes every other name for the strided convolution
        for v in value if isinstance(value, (list, tuple)) else [value]:
            require_choice(field, v, (built,))
    field = "encoder_block_out_channels"
    widths = _positives(field, config[field])
    if tuple(_list(field := "decoder_block_out_channels", config[field])) != widths:
        raise InputError(f"{field}={config[field]!r}: must be the encoder's, {list(widths)}")
    return {
        "latent_channels": require_positive("latent_channels", config["latent_channels"]),
        "in_channels": require_positive("in_channels", config["in_channels"]),
        "widths": widths,
        **_side("encoder", config, len(widths)),
        **_side("decoder", config, len(widths)),
        "head_dim": require_positive("attention_head_dim", config["attention_head_dim"]),
        "scaling_factor": require_positive("scaling_factor", config["scaling_factor"], float),
    }


def to_config(fields: dict) -> dict:
    """Fields -> what `AutoencoderDC.from_config` needs to build the same model."""
    config = {
        "_class_name": "AutoencoderDC",
        **_BUILT,
        "latent_channels": fields["latent_channels"],
        "in_channels": fields["in_channels"],
        "attention_head_dim": fields["head_dim"],
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


# --- Structure from names and shapes.

_ENTRY = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)")
_SCALE = re.compile(r"attn\.to_qkv_multiscale\.\d+\.proj_in\.weight")


def _shape(shapes, name, where=""):
    if name not in shapes:
        raise CheckpointError(f"{where}{name}: absent, so this is no DC-AE of the f32c32-sana kind")
    return shapes[name]


def infer_fields(header: dict) -> dict:
    """{name: (shape, dtype)} of a checkpoint without config.json -> the fields that it shows.

    scaling_factor is not among them, nor head_dim where no attention has scales.
    Raises CheckpointError: not an `AutoencoderDC`, or of a kind that DCAE does not build.
    """
    shapes = {name: tuple(map(int, shape)) for name, (shape, _) in header.items()}
    for name in ("encoder.conv_in.conv.weight", "decoder.conv_out.conv.weight"):
        if name in shapes:
            raise CheckpointError(f"{name}: a DC-AE without stage 0, only f32c32-sana is supported")
    fields = {
        "latent_channels": _shape(shapes, "encoder.conv_out.weight")[0],
        "in_channels": _shape(shapes, "encoder.conv_in.weight")[1],
    }
    blocks = {"encoder": {}, "decoder": {}}  # side -> stage -> entry -> {name within it: shape}
    for name, shape in shapes.items():
        if m := _ENTRY.fullmatch(name):
            side, stage, entry, part = m.groups()
            if part not in ("conv.weight", "conv.bias"):  # a resampler's
                blocks[side].setdefault(int(stage), {}).setdefault(int(entry), {})[part] = shape
    widths = {}
    for side, stages in blocks.items():
        if not stages or sorted(stages) != list(range(len(stages))):
            raise CheckpointError(f"{side}: blocks in stages {sorted(stages)}, must be 0, 1, ...")
        attention, width = [], []
        for i in range(len(stages)):
            block = stages[i][min(stages[i])]  # the first stands for all
            vit = any(part.startswith("attn.") for part in block)
            norm = "attn.norm_out.weight" if vit else "norm.weight"
            width.append(_shape(block, norm, f"{side}, stage {i}, ")[0])
            scales = sorted(part for part in block if _SCALE.fullmatch(part))
            attention.append(tuple(block[part][-1] for part in scales) if vit else None)
            for part in scales:
                mix = part.replace("proj_in", "proj_out")
                fields["head_dim"] = _shape(block, mix, f"{side}, stage {i}, ")[1]
        widths[side] = tuple(width)
        fields[f"{side}_depths"] = tuple(len(stages[i]) for i in range(len(stages)))
        fields[f"{side}_attention"] = tuple(attention)
    if widths["encoder"] != widths["decoder"]:
        raise CheckpointError(f"stage widths {widths}: must be the same in encoder and decoder")
    return fields | {"widths": widths["encoder"]}
