"""Names of DC-AE's tensors in diffusers and in efficientvit (docs/numerics.md 2.3), both directions.

Each format is a dict of words under the same keys: paths of ours without their stage and block.  One
function turns words and the fields of a `sana_jax.models.dc_ae.DCAE` into a total table of rules.
"""

import numpy as np

from sana_jax.checkpoints.rules import CONV, DEPTHWISE, GROUPED, LINEAR, POINTWISE, Rule, dense, third

DIFFUSERS = {
    "encoder": "encoder.down_blocks.{}.{}",  # stage, entry: a block, or the resampler beside them
    "decoder": "decoder.up_blocks.{}.{}",
    "encoder/conv_in": "encoder.conv_in",
    "encoder/conv_in strided": "encoder.conv_in.conv",  # where stage 0 is empty
    "encoder/conv_in rearranged": "encoder.conv_in.conv",
    "encoder/conv_out": "encoder.conv_out",
    "decoder/conv_in": "decoder.conv_in",
    "decoder/norm_out": "decoder.norm_out",
    "decoder/conv_out": "decoder.conv_out",
    "decoder/conv_out up": "decoder.conv_out.conv",  # where stage 0 is empty
    "down strided": "conv",
    "down rearranged": "conv",
    "up": "conv",
    "conv_1": "conv1",
    "conv_2": "conv2",
    "norm": "norm",
    # Thirds of one convolution's output, not queries, keys and values: heads are cut from the fused
    # output (docs/numerics.md 1.9), so it stays fused and in this order.
    "attention/qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention/scale": "attn.to_qkv_multiscale.{}.proj_in",
    "attention/scale_mix": "attn.to_qkv_multiscale.{}.proj_out",
    "attention/project": "attn.to_out",
    "attention_norm": "attn.norm_out",
    "mix_ffn/expand": "conv_out.conv_inverted",
    "mix_ffn/depthwise": "conv_out.conv_depth",
    "mix_ffn/project": "conv_out.conv_point",
    "mix_ffn_norm": "conv_out.norm",
}
EFFICIENTVIT = {
    "encoder": "encoder.stages.{}.op_list.{}",
    "decoder": "decoder.stages.{}.op_list.{}",
    "encoder/conv_in": "encoder.project_in.conv",
    "encoder/conv_in strided": "encoder.project_in.conv",
    "encoder/conv_in rearranged": "encoder.project_in.conv.conv",
    "encoder/conv_out": "encoder.project_out.main.op_list.0.conv",
    "decoder/conv_in": "decoder.project_in.main.conv",
    "decoder/norm_out": "decoder.project_out.op_list.0",
    "decoder/conv_out": "decoder.project_out.op_list.2.conv",
    "decoder/conv_out up": "decoder.project_out.op_list.2.conv.conv",
    "down strided": "main.conv",
    "down rearranged": "main.conv.conv",
    "up": "main.conv.conv",
    "conv_1": "main.conv1.conv",
    "conv_2": "main.conv2.conv",
    "norm": "main.conv2.norm",
    "attention/qkv": ("context_module.main.qkv.conv",),
    "attention/scale": "context_module.main.aggreg.{}.0",
    "attention/scale_mix": "context_module.main.aggreg.{}.1",
    "attention/project": "context_module.main.proj.conv",
    "attention_norm": "context_module.main.proj.norm",
    "mix_ffn/expand": "local_module.main.inverted_conv.conv",
    "mix_ffn/depthwise": "local_module.main.depth_conv.conv",
    "mix_ffn/project": "local_module.main.point_conv.conv",
    "mix_ffn_norm": "local_module.main.point_conv.norm",
}


def is_efficientvit(header):
    """Whether the tensors {name: ...} bear efficientvit's names and not diffusers'."""
    return any(name.startswith(("encoder.stages.", "decoder.stages.")) for name in header)


def diffusers_rules(fields):
    """The total table of diffusers' `AutoencoderDC` for a DCAE with these fields."""
    return _rules(DIFFUSERS, LINEAR, fields)


def efficientvit_rules(fields):
    """The total table of efficientvit's `DCAE`."""
    return _rules(EFFICIENTVIT, POINTWISE, fields)


def _norm(torch, flax, batch=False):
    names = {"weight": "scale", "bias": "bias"} | ({"running_mean": "mean", "running_var": "var"} if batch else {})
    return [Rule(f"{torch}.{theirs}", f"{flax}/{ours}") for theirs, ours in names.items()]


def _res_block(words, torch, flax, batch_norm):
    return [
        *dense(f"{torch}.{words['conv_1']}", f"{flax}/conv_1", layout=CONV),
        *dense(f"{torch}.{words['conv_2']}", f"{flax}/conv_2", bias=False, layout=CONV),
        *_norm(f"{torch}.{words['norm']}", f"{flax}/norm", batch_norm),
    ]


def _efficient_vit_block(words, linear, torch, flax, scales):
    def row(key, layout, ours=None, bias=False):
        return dense(f"{torch}.{words[key]}", f"{flax}/{ours or key}", bias, layout)

    qkv = words["attention/qkv"]
    rows = [
        Rule(f"{torch}.{name}.weight", f"{flax}/attention/qkv/kernel", third(i, len(qkv), linear))
        for i, name in enumerate(qkv)
    ]
    for i, size in enumerate(scales):
        for key, layout, end in (("scale", DEPTHWISE, ""), ("scale_mix", GROUPED, "_mix")):
            name = words[f"attention/{key}"].format(i)
            rows += dense(f"{torch}.{name}", f"{flax}/attention/scale_{size}{end}", bias=False, layout=layout)
    return rows + [
        *row("attention/project", linear),
        *_norm(f"{torch}.{words['attention_norm']}", f"{flax}/attention_norm"),
        *row("mix_ffn/expand", POINTWISE, bias=True),
        *row("mix_ffn/depthwise", DEPTHWISE, bias=True),
        *row("mix_ffn/project", POINTWISE),
        *_norm(f"{torch}.{words['mix_ffn_norm']}", f"{flax}/mix_ffn_norm"),
    ]


def _stages(words, linear, side, fields):
    """Rows of all stages; the resampler of a stage is the encoder's last entry, the decoder's first."""
    depths, attention = fields[f"{side}_depths"], fields[f"{side}_attention"]
    goes_up = side == "decoder"
    ours, theirs = ("up", words["up"]) if goes_up else ("down", words[f"down {_down(fields)}"])
    rows = []
    for i, (depth, scales) in enumerate(zip(depths, attention, strict=True)):
        resampled = bool(depth) and i + 1 < len(depths)
        for j in range(depth):
            torch, flax = words[side].format(i, j + (goes_up and resampled)), f"{side}/stage_{i}/block_{j}"
            if scales is None:
                rows += _res_block(words, torch, flax, goes_up and i in fields["decoder_batch_norm"])
            else:
                rows += _efficient_vit_block(words, linear, torch, flax, scales)
        if resampled:
            torch = words[side].format(i, 0 if goes_up else depth)
            rows += dense(f"{torch}.{theirs}", f"{side}/stage_{i}/{ours}/conv", layout=CONV)
    return rows


def _down(fields):
    return "rearranged" if fields["rearrange_down"] else "strided"


def _rules(words, linear, fields):
    """`linear`: the layout of what is a linear layer in one format and a 1 x 1 convolution in the other."""
    conv_in, conv_out = ("encoder/conv_in", "encoder/conv_in"), ("decoder/conv_out", "decoder/conv_out")
    if not fields["encoder_depths"][0]:
        conv_in = f"encoder/conv_in {_down(fields)}", "encoder/conv_in/conv"
    if not fields["decoder_depths"][0]:
        conv_out = "decoder/conv_out up", "decoder/conv_out/conv"
    return [
        *dense(words[conv_in[0]], conv_in[1], layout=CONV),
        *_stages(words, linear, "encoder", fields),
        *dense(words["encoder/conv_out"], "encoder/conv_out", layout=CONV),
        *dense(words["decoder/conv_in"], "decoder/conv_in", layout=CONV),
        *_stages(words, linear, "decoder", fields),
        *_norm(words["decoder/norm_out"], "decoder/norm_out"),
        *dense(words[conv_out[0]], conv_out[1], layout=CONV),
    ]


# --- BatchNorm's counters of training steps, which published files hold and no result depends on.


def counters(rules):
    """The names of the counters that stand beside a table's running means."""
    mean = ".running_mean"
    return [
        rule.torch.removesuffix(mean) + ".num_batches_tracked" for rule in rules if rule.torch.endswith(mean)
    ]


def with_counters(rules, tensors):
    """The stream of (name, array) to write, followed by each counter as torch starts it: int64 0."""
    yield from tensors
    for name in counters(rules):
        yield name, np.zeros((), np.int64)
