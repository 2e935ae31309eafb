"""Structure of a DC-AE from the names and shapes of its tensors, and what no tensor shows.

Three families are published (docs/numerics.md 3.2), and each is recognised by what its names show.
What they do not show, the activations and the scale of the latent, comes from the family and from
the name of the variant.
"""

import pathlib
import re
import warnings

from sana_jax.checkpoints.dc_ae_names import DIFFUSERS, EFFICIENTVIT, is_efficientvit
from sana_jax.errors import CheckpointError

WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)  # of every published variant, from stage 0 on

# What tells the published families apart, and its values for each.
SIGNS = "rearrange_down", "rearrange_up", "encoder's stage 0 empty", "decoder's stage 0 empty", "BatchNorm"
SANA = (False, False, False, False, False)
LITE = (False, True, False, True, False)
IMAGENET = (True, True, True, True, True)
FAMILIES = SANA, LITE, IMAGENET

_SANA = 32, (2, 2, 2, 3, 3, 3), (3, 3, 3, 3, 3, 3)
_F32 = 32, (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2)
_F64 = 128, (*_F32[1], 2), (*_F32[2], 2)
_F128 = 512, (*_F64[1], 2), (*_F64[2], 2)
# name: (scale of the latent, family, (latent channels, depths of the encoder, of the decoder)).
PUBLISHED = {
    "dc-ae-f32c32-sana-1.0": (0.41407, SANA, _SANA),
    "dc-ae-f32c32-sana-1.1": (0.41407, SANA, _SANA),
    "dc-ae-lite-f32c32-sana-1.1": (0.41407, LITE, (32, _SANA[1], (0, 3, 5, 4, 4, 4))),
    "dc-ae-f32c32-in-1.0": (0.3189, IMAGENET, _F32),
    "dc-ae-f32c32-mix-1.0": (0.4552, IMAGENET, _F32),
    "dc-ae-f64c128-in-1.0": (0.2889, IMAGENET, _F64),
    "dc-ae-f64c128-mix-1.0": (0.4538, IMAGENET, _F64),
    "dc-ae-f128c512-in-1.0": (0.4883, IMAGENET, _F128),
    "dc-ae-f128c512-mix-1.0": (0.3620, IMAGENET, _F128),
}


def family(fields):
    """The SIGNS of these fields: one of FAMILIES, or a tuple like them."""
    empty = (not fields[f"{side}_depths"][0] for side in ("encoder", "decoder"))
    return fields["rearrange_down"], fields["rearrange_up"], *empty, bool(fields["decoder_batch_norm"])


def published_names(fields):
    """{name: scale of the latent} of the published variants with this structure; mostly there is none."""
    structure = fields["latent_channels"], fields["encoder_depths"], fields["decoder_depths"]
    if fields["widths"] != WIDTHS[: len(fields["widths"])]:
        return {}
    return {
        name: scale for name, (scale, kind, known) in PUBLISHED.items() if (kind, known) == (family(fields), structure)
    }


def latent_scale(fields, config, path, given=()):
    """{"scaling_factor": s} for weights whose config does not hold it, or {} to leave the default.

    Args:
      fields: the structure.
      config: config.json of efficientvit ({"model_name": ...}) or None.
      path: of the weights: a folder or file named after the variant tells it too.
      given: field names that the caller sets.
    Raises:
      CheckpointError: the config names a variant of another structure.
    Warns: the scale cannot be told.
    """
    known, name = published_names(fields), str((config or {}).get("model_name"))
    if name in PUBLISHED and name not in known:
        raise CheckpointError(
            f"{path}: model_name={name!r} in config.json, but the tensors are not those of that variant"
        )
    if "scaling_factor" in given:
        return {}
    for part in (name, *reversed(pathlib.Path(path).absolute().parts)):  # the innermost folder first
        if found := [scale for variant, scale in known.items() if variant in part]:
            return {"scaling_factor": found[0]}
    if family(fields) not in (SANA, LITE):  # SANA's own variants share one scale, the default
        which = f"may be {' or '.join(f'{s} ({n})' for n, s in known.items())}" if known else "is not known"
        warnings.warn(
            f"{path}: the scale of the latent {which}; SANA's is used: pass scaling_factor= for another", stacklevel=4
        )
    return {}


def infer_fields(header, given=()):
    """{name: (shape, dtype)} of a DC-AE in either format -> the fields that it shows.

    scaling_factor is not among them (see `latent_scale`), nor head_dim where no attention has
    scales.  Where both halves leave stage 0 empty its width is half of stage 1's, as in the
    published ones.  `given`: field names that the caller sets.
    Raises CheckpointError: not a DC-AE, or one whose activations neither its names nor `given` tell.
    """
    words = EFFICIENTVIT if is_efficientvit(header) else DIFFUSERS
    shapes = {name: tuple(map(int, shape)) for name, (shape, _) in header.items()}
    encoder, a, down = _half(words, "encoder", shapes)
    decoder, b, up = _half(words, "decoder", shapes)
    stages = {len(encoder["encoder_depths"]), len(decoder["decoder_depths"])}
    if len(stages) > 1 or any(a[i] != b[i] for i in a.keys() & b.keys()):
        raise CheckpointError(f"stage widths {a} of the encoder and {b} of the decoder: must be the same")
    widths = {0: a[1] // 2 if 1 in a else 0} | a | b
    conv_in = [f"{word}.weight" for key, word in words.items() if key.startswith("encoder/conv_in")]
    fields = encoder | decoder | {
        "latent_channels": _size(shapes, 0, f"{words['encoder/conv_out']}.weight"),
        "in_channels": _size(shapes, 1, *conv_in),
        "widths": tuple(widths[i] for i in range(len(widths))),
        # A wrong guess for one stage is found when its shape is compared.
        "rearrange_down": any((widths.get(i + 1, 0) // 4,) == channels for i, channels in down.items()),
        "rearrange_up": any((4 * widths[i],) == channels for i, channels in up.items()),
    }
    if (kind := family(fields)) in FAMILIES:
        # BatchNorm goes with ReLU, and the lite decoder ends with SiLU.
        return fields | {"decoder_relu": fields["decoder_batch_norm"], "silu_out": kind == LITE}
    if missing := {"decoder_relu", "silu_out"} - set(given):
        shown = ", ".join(f"{name}: {value}" for name, value in zip(SIGNS, kind))
        raise CheckpointError(
            f"no published DC-AE is like this one ({shown}) and no tensor tells its activations; "
            f"pass {' and '.join(f'{name}=' for name in sorted(missing))}"
        )
    return fields


def _half(words, side, shapes):
    """What the names of one half show.

    Returns (fields, {stage: width}, {stage: channels out of its resampler's convolution}).
    """
    entry = re.compile(re.escape(words[side]).replace(r"\{\}", r"(\d+)") + r"\.(.+)")
    resamplers = [f"{word}." for key, word in words.items() if key.startswith(("down", "up"))]
    resamplers = {word + leaf for word in resamplers for leaf in ("weight", "bias")}
    stages, channels = {}, {}  # stage -> entry -> {name within it: shape}
    for name, shape in shapes.items():
        if m := entry.fullmatch(name):
            if m[3] in resamplers:
                channels[int(m[1])] = shape[:1]
            else:
                stages.setdefault(int(m[1]), {}).setdefault(int(m[2]), {})[m[3]] = shape
    first = min(stages, default=0)  # stage 0 may be empty
    if first > 1 or sorted(stages) != list(range(first, first + len(stages))) or not stages:
        raise CheckpointError(f"{side}: blocks in stages {sorted(stages)}, must be 0, 1, ... or 1, 2, ...; is this a DC-AE?")
    widths, attention, batch_norm, head_dim = {}, {}, [], {}
    for i, entries in stages.items():
        block, where = entries[min(entries)], f"{side}, stage {i}, "  # the first block stands for all
        vit = any(part.startswith(words["attention/qkv"][0].split(".")[0]) for part in block)
        widths[i] = _size(block, 0, f"{words['attention_norm' if vit else 'norm']}.weight", where=where)
        attention[i] = () if vit else None
        while vit and (scale := f"{words['attention/scale'].format(len(attention[i]))}.weight") in block:
            mix = f"{words['attention/scale_mix'].format(len(attention[i]))}.weight"
            head_dim = {"head_dim": _size(block, 1, mix, where=where)}
            attention[i] += (_size(block, 3, scale, where=where),)
        if f"{words['norm']}.running_mean" in block:
            batch_norm.append(i)
    if first:  # an empty stage takes after the next
        attention[0] = attention[1]
        batch_norm += [0] if 1 in batch_norm else []
    fields = {
        f"{side}_depths": (0,) * first + tuple(len(stages[i]) for i in sorted(stages)),
        f"{side}_attention": tuple(attention[i] for i in sorted(attention)),
        **head_dim,
    }
    if side == "decoder":
        fields["decoder_batch_norm"] = tuple(sorted(batch_norm))
    return fields, widths, channels


def _size(shapes, axis, *names, where=""):
    """The size along an axis of the first of `names` that there is."""
    for name in names:
        if len(shapes.get(name, ())) > axis:
            return shapes[name][axis]
    raise CheckpointError(
        f"{where}{names[0]}: absent or odd, so this is no DC-AE in diffusers' or efficientvit's names"
    )
