"""Sana: names of diffusers and of NVlabs, and diffusers' config <-> ours (docs/numerics.md 2.1, 3.1)."""

import math
import re

from sana_jax.checkpoints import rules
from sana_jax.checkpoints.rules import DEPTHWISE, LINEAR, POINTWISE, Rule, dense
from sana_jax.errors import CheckpointError, InputError, require_choice, require_positive

BLOCK = "transformer_blocks.{i}"
CROSS_HEADS = {1152: 16, 2240: 20}  # published widths; names and shapes do not tell these


def diffusers_rules(heads, cross_heads, qk_norm, guidance_embed):
    """The total table of one structure; heads are those of the linear and the cross attention."""
    time = "time_embed" if guidance_embed else "time_embed.emb"

    def packed(torch, flax, parts, heads, bias):
        for part, name in enumerate(parts):
            yield Rule(f"{torch}.{name}.weight", f"{flax}/kernel", rules.packed_kernel(part, len(parts), heads))
            if bias:
                yield Rule(f"{torch}.{name}.bias", f"{flax}/bias", rules.packed_bias(part, len(parts), heads))

    table = [
        *dense("patch_embed.proj", "patch_embed", layout=POINTWISE),
        *dense(f"{time}.timestep_embedder.linear_1", "time_embed/mlp_1"),
        *dense(f"{time}.timestep_embedder.linear_2", "time_embed/mlp_2"),
        *dense("time_embed.linear", "time_embed/modulation"),
        *dense("caption_projection.linear_1", "caption_embed/mlp_1"),
        *dense("caption_projection.linear_2", "caption_embed/mlp_2"),
        Rule("caption_norm.weight", "caption_embed/norm/scale"),
        Rule(f"{BLOCK}.scale_shift_table", "blocks/modulation"),
        *packed(f"{BLOCK}.attn1", "blocks/self_attn/qkv", ("to_q", "to_k", "to_v"), heads, bias=False),
        *dense(f"{BLOCK}.attn1.to_out.0", "blocks/self_attn/out"),
        *dense(f"{BLOCK}.attn2.to_q", "blocks/cross_attn/query"),
        *packed(f"{BLOCK}.attn2", "key_value/kv", ("to_k", "to_v"), cross_heads, bias=True),
        *dense(f"{BLOCK}.attn2.to_out.0", "blocks/cross_attn/out"),
        *dense(f"{BLOCK}.ff.conv_inverted", "blocks/mix_ffn/expand", layout=POINTWISE),
        *dense(f"{BLOCK}.ff.conv_depth", "blocks/mix_ffn/depthwise", layout=DEPTHWISE),
        *dense(f"{BLOCK}.ff.conv_point", "blocks/mix_ffn/project", bias=False, layout=POINTWISE),
        Rule("scale_shift_table", "head/modulation"),
        *dense("proj_out", "head/out", layout=LINEAR),
    ]
    if qk_norm:
        table += [
            Rule(f"{BLOCK}.attn1.norm_q.weight", "blocks/self_attn/query_norm/scale"),
            Rule(f"{BLOCK}.attn1.norm_k.weight", "blocks/self_attn/key_norm/scale"),
            Rule(f"{BLOCK}.attn2.norm_q.weight", "blocks/cross_attn/query_norm/scale"),
            Rule(f"{BLOCK}.attn2.norm_k.weight", "key_value/key_norm/scale"),
        ]
    if guidance_embed:
        table += [
            *dense("time_embed.guidance_embedder.linear_1", "time_embed/guidance_1"),
            *dense("time_embed.guidance_embedder.linear_2", "time_embed/guidance_2"),
        ]
    return table


NVLABS_BLOCK = "blocks.{i}"
NVLABS_DROPPED = {  # in NVlabs' files and in no network: why each is not read
    "pos_embed": "a constant, computed for every size",
    "y_embedder.y_embedding": "the empty caption of training; here the text encoder makes it",
    "logvar_linear.weight": "a loss weight of Sprint's training",
    "logvar_linear.bias": "a loss weight of Sprint's training",
}


def nvlabs_rules(heads, cross_heads, qk_norm, guidance_embed):
    """The same structure under the names of NVlabs' .pth files."""
    table = [
        *dense("x_embedder.proj", "patch_embed", layout=POINTWISE),
        *dense("t_embedder.mlp.0", "time_embed/mlp_1"),
        *dense("t_embedder.mlp.2", "time_embed/mlp_2"),
        *dense("t_block.1", "time_embed/modulation"),
        *dense("y_embedder.y_proj.fc1", "caption_embed/mlp_1"),
        *dense("y_embedder.y_proj.fc2", "caption_embed/mlp_2"),
        Rule("attention_y_norm.weight", "caption_embed/norm/scale"),
        Rule(f"{NVLABS_BLOCK}.scale_shift_table", "blocks/modulation"),
        Rule(f"{NVLABS_BLOCK}.attn.qkv.weight", "blocks/self_attn/qkv/kernel", rules.fused_kernel(3, heads)),
        *dense(f"{NVLABS_BLOCK}.attn.proj", "blocks/self_attn/out"),
        *dense(f"{NVLABS_BLOCK}.cross_attn.q_linear", "blocks/cross_attn/query"),
        Rule(f"{NVLABS_BLOCK}.cross_attn.kv_linear.weight", "key_value/kv/kernel", rules.fused_kernel(2, cross_heads)),
        Rule(f"{NVLABS_BLOCK}.cross_attn.kv_linear.bias", "key_value/kv/bias", rules.fused_bias(2, cross_heads)),
        *dense(f"{NVLABS_BLOCK}.cross_attn.proj", "blocks/cross_attn/out"),
        *dense(f"{NVLABS_BLOCK}.mlp.inverted_conv.conv", "blocks/mix_ffn/expand", layout=POINTWISE),
        *dense(f"{NVLABS_BLOCK}.mlp.depth_conv.conv", "blocks/mix_ffn/depthwise", layout=DEPTHWISE),
        *dense(f"{NVLABS_BLOCK}.mlp.point_conv.conv", "blocks/mix_ffn/project", bias=False, layout=POINTWISE),
        Rule("final_layer.scale_shift_table", "head/modulation"),
        *dense("final_layer.linear", "head/out", layout=LINEAR),
    ]
    if qk_norm:
        table += [
            Rule(f"{NVLABS_BLOCK}.attn.q_norm.weight", "blocks/self_attn/query_norm/scale"),
            Rule(f"{NVLABS_BLOCK}.attn.k_norm.weight", "blocks/self_attn/key_norm/scale"),
            Rule(f"{NVLABS_BLOCK}.cross_attn.q_norm.weight", "blocks/cross_attn/query_norm/scale"),
            Rule(f"{NVLABS_BLOCK}.cross_attn.k_norm.weight", "key_value/key_norm/scale"),
        ]
    if guidance_embed:
        table += [
            *dense("cfg_embedder.mlp.0", "time_embed/guidance_1"),
            *dense("cfg_embedder.mlp.2", "time_embed/guidance_2"),
        ]
    return table


# Keys of transformer/config.json that are the same in every published model.
FIXED = {
    "patch_size": 1,
    "attention_bias": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "timestep_scale": 1.0,
    "guidance_embeds_scale": 0.1,
}


def config_fields(config, source="transformer/config.json"):
    """transformer/config.json of diffusers -> fields of `Sana`.

    Absent keys take diffusers' defaults; keys that diffusers itself ignores are ignored.
    Raises InputError: another class, or a value that no SANA has.
    """
    name = config.get("_class_name", "SanaTransformer2DModel")
    if name != "SanaTransformer2DModel":
        raise InputError(f"{source}: _class_name={name!r}, must be 'SanaTransformer2DModel': is this the right folder?")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"{source}: {key}={config[key]!r}, must be {value!r}")

    def number(key, default, kind=int, none=False):
        return require_positive(f"{source}: {key}", config.get(key, default), kind, none)

    heads, dim = number("num_attention_heads", 70), number("attention_head_dim", 32)
    width = heads * dim
    cross_heads = number("num_cross_attention_heads", 20)
    cross_dim = number("cross_attention_head_dim", 112)
    if cross_heads * cross_dim != width:
        raise InputError(
            f"{source}: num_cross_attention_heads={cross_heads} * cross_attention_head_dim={cross_dim} "
            f"must be {width} = num_attention_heads * attention_head_dim"
        )
    channels = number("in_channels", 32)
    if config.get("out_channels", channels) not in (channels, None):
        raise InputError(f"{source}: out_channels={config['out_channels']!r}, must be in_channels={channels}")
    norm = config.get("qk_norm")
    require_choice(f"{source}: qk_norm", norm, (None, "rms_norm_across_heads"))
    guidance = require_choice(f"{source}: guidance_embeds", config.get("guidance_embeds", False), (False, True, None))
    return {
        "width": width,
        "depth": number("num_layers", 20),
        "heads": heads,
        "cross_heads": cross_heads,
        "ffn_ratio": number("mlp_ratio", 2.5, float),
        "latent_channels": channels,
        "caption_width": number("caption_channels", 2304),
        "sample_size": number("sample_size", 32),
        "position_scale": number("interpolation_scale", None, float, none=True),
        "qk_norm": norm is not None,
        "guidance_embed": bool(guidance),
    }


def to_config(fields):
    """Fields of `Sana` -> transformer/config.json of diffusers."""
    width, cross = fields["width"], fields["cross_heads"]
    return FIXED | {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": fields["latent_channels"],
        "out_channels": fields["latent_channels"],
        "num_attention_heads": fields["heads"],
        "attention_head_dim": width // fields["heads"],
        "num_layers": fields["depth"],
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": width // cross,
        "cross_attention_dim": width,
        "caption_channels": fields["caption_width"],
        "mlp_ratio": fields["ffn_ratio"],
        "sample_size": fields["sample_size"],
        "interpolation_scale": fields["position_scale"],
        "qk_norm": "rms_norm_across_heads" if fields["qk_norm"] else None,
        "guidance_embeds": fields["guidance_embed"],
    }


# --- Structure from names and shapes.


def is_nvlabs(header):
    """Whether the names of a transformer are NVlabs' own."""
    return "x_embedder.proj.weight" in header


def is_diffusers(header):
    """Whether the names of a transformer are diffusers'."""
    return "patch_embed.proj.weight" in header


NAMES = {  # what the structure is read from: in diffusers' file, in NVlabs'
    "patch": ("patch_embed.proj.weight", "x_embedder.proj.weight"),
    "caption": ("caption_projection.linear_1.weight", "y_embedder.y_proj.fc1.weight"),
    "project": ("transformer_blocks.0.ff.conv_point.weight", "blocks.0.mlp.point_conv.conv.weight"),
    "table": (f"{BLOCK}.scale_shift_table", f"{NVLABS_BLOCK}.scale_shift_table"),
    "norm": ("transformer_blocks.0.attn1.norm_q.weight", "blocks.0.attn.q_norm.weight"),
    "guidance": ("time_embed.guidance_embedder.linear_1.weight", "cfg_embedder.mlp.0.weight"),
}


def infer_fields(header, overrides=()):
    """Structure from the names and shapes of a file without a config, in diffusers' or NVlabs' names.

    `header` is {name: (shape, dtype)}.  The position embedding and the sample size leave no trace in
    most weights, see `size_fields`; the number of cross-attention heads is told by published widths
    only; `overrides` are field names that the caller sets.
    Raises CheckpointError: not a SANA transformer.  InputError: cross_heads must be given.
    """
    name = {key: pair[is_nvlabs(header)] for key, pair in NAMES.items()}
    try:
        width, channels = header[name["patch"]][0][:2]
        caption_width = header[name["caption"]][0][1]
        hidden = header[name["project"]][0][1]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"not a SANA transformer in diffusers' or NVlabs' names: {error} is absent or odd") from error
    if width not in CROSS_HEADS and "cross_heads" not in overrides:
        raise InputError(f"cross_heads: width {width} is not a published one ({sorted(CROSS_HEADS)}); pass cross_heads=")
    return {
        "width": width,
        "depth": rules.layer_count(name["table"], header),
        "heads": width // 32,  # 32 channels in every published model
        "cross_heads": CROSS_HEADS.get(width),
        # The half keeps int(ratio * width) == hidden where hidden / width is not a short fraction.
        "ffn_ratio": hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width,
        "latent_channels": channels,
        "caption_width": caption_width,
        "qk_norm": name["norm"] in header,
        "guidance_embed": name["guidance"] in header,
    }


SIZES = {  # pixels -> the side of the latent grid and the position embedding that go with them
    512: {"sample_size": 16, "position_scale": None},
    1024: {"sample_size": 32, "position_scale": None},
    2048: {"sample_size": 64, "position_scale": 1.0},
    4096: {"sample_size": 128, "position_scale": 2.0},
}
LABELS = {512: "512px", 1024: "1024px", 2048: "2Kpx", 4096: "4Kpx"}
_IN_A_NAME = re.compile(r"(?<!\d)(512|1024|2048|4096|2K|4K)px", re.IGNORECASE)


def size_fields(header, fields, file_name):
    """{sample_size, position_scale} of a file without a config, or None where nothing tells them.

    Asked in turn: the grid of a stored `pos_embed`, the structure (SANA-1.5 and Sprint came out at
    1024 px alone), and the resolution in a published file name.
    """
    if "pos_embed" in header:
        side = math.isqrt(math.prod(header["pos_embed"][0][:-1]))
        if found := [size for size in SIZES.values() if size["sample_size"] == side]:
            return found[0]
    if fields["qk_norm"]:
        return SIZES[1024]
    if named := _IN_A_NAME.search(file_name):
        return SIZES[{"2K": 2048, "4K": 4096}.get(named[1].upper()) or int(named[1])]
    return None


def nvlabs_file_name(fields):
    """The name of an NVlabs file that `size_fields` understands, or "sana.pth" for an unusual size."""
    size = {key: fields[key] for key in ("sample_size", "position_scale")}
    known = [label for pixels, label in LABELS.items() if SIZES[pixels] == size]
    return f"sana_{known[0]}.pth" if known else "sana.pth"
