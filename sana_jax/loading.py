"""From published folders to modules with parameters.

    sana, params = load_sana("folder/transformer")
    pipeline = load_pipeline("folder")

The layout is that of diffusers: model_index.json, scheduler/, tokenizer/, text_encoder/,
transformer/, vae/.  What it cannot say (which instruction and which stack) stands in sana_jax.json.
"""

import dataclasses
import os
import pathlib
import re
import warnings
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from sana_jax import precision, text
from sana_jax.checkpoints import dc_ae as dc_ae_names
from sana_jax.checkpoints import gemma2 as gemma2_names
from sana_jax.checkpoints import sana as sana_names
from sana_jax.checkpoints.read import Checkpoint, open_checkpoint, read_json
from sana_jax.checkpoints.rules import check, slots, to_flax
from sana_jax.errors import InputError, nearest, require_choice, require_positive
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.stacks import STACKS, Stack

EXTRAS = "sana_jax.json"  # our own file in a pipeline folder
KINDS = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "text_encoder": "gemma2"}


def parameter_shapes(module):
    """{path: shape} of a module's parameters, without computing any."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def published_rules(module):
    """The published table of a module's structure."""
    if isinstance(module, Sana):
        return sana_names.diffusers_rules(
            module.heads, module.cross_heads, module.qk_norm, module.guidance_embed
        )
    if isinstance(module, DCAE):
        return dc_ae_names.diffusers_rules(
            module.encoder_depths, module.decoder_depths, module.encoder_attention, module.decoder_attention
        )
    return gemma2_names.transformers_rules()


class Prepared(NamedTuple):
    """A module and a checkpoint whose header was found to fit it; no weights are read yet."""

    module: nn.Module
    shapes: dict
    checkpoint: Checkpoint

    def read(self):
        """(module, params).  Raises CheckpointError: weights that are truncated or not finite."""
        leaves = to_flax(
            published_rules(self.module),
            self.shapes,
            self.checkpoint.header,
            self.checkpoint.tensors(),
            np.dtype(self.module.param_dtype),
            self.checkpoint.source,
        )
        # One leaf at a time, so that an accelerator's copy and the host's do not both grow; on a
        # CPU the array itself is taken over.
        params = {path: jax.device_put(leaves.pop(path)) for path in list(leaves)}
        return self.module, flax.traverse_util.unflatten_dict(params, sep="/")


def _prepare(module_class, fields, overrides, checkpoint):
    """The module of these fields, dtypes settled, and the checkpoint checked against it."""
    names = [f.name for f in dataclasses.fields(module_class) if f.name not in ("parent", "name")]
    for name, value in overrides.items():
        if name not in names:
            raise InputError(f"{name}={value!r}: {module_class.__name__} has no such field{nearest(name, names)}")
    auto = [k for k in ("dtype", "param_dtype") if isinstance(overrides.get(k), str) and overrides[k] == "auto"]
    fields = fields | {k: v for k, v in overrides.items() if k not in auto}
    default = precision.stored(checkpoint.dtypes, checkpoint.source)
    fields["param_dtype"] = precision.parse(fields.get("param_dtype", fields.get("dtype", default)))
    fields["dtype"] = precision.parse(fields.get("dtype", fields["param_dtype"]))
    module = module_class(**fields)
    try:
        shapes = parameter_shapes(module)
    except (ArithmeticError, TypeError, ValueError) as error:  # heads that do not divide a width, say
        given = "".join(f", {name}={value!r}" for name, value in overrides.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"{checkpoint.source}: its structure{given} builds no {module_class.__name__}: {reason}") from error
    check(slots(published_rules(module), shapes), shapes, checkpoint.header, checkpoint.source)
    return Prepared(module, shapes, checkpoint)


def _component(path, subfolder):
    """(folder or file to read, its config or None).  Raises InputError with a hint."""
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return path, None
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or config.get("model_type") or KINDS[subfolder]
        if kind != KINDS[subfolder]:
            raise InputError(f"{path}: holds {kind}, must hold {KINDS[subfolder]}: is this the right folder?")
        return path, config
    if (path / subfolder).is_dir():
        raise InputError(f"{path}: is a whole pipeline; pass {path / subfolder}, or use load_pipeline")
    return path, None


def load_sana(path, **overrides):
    """A Linear-DiT from a diffusers `transformer/` folder or one .safetensors file.

    Args:
      path: folder with config.json and weights (sharded or not), or a file; without a config the
        structure is inferred from names and shapes.
      **overrides: fields of `Sana`, e.g. `dtype="bf16"`, `cross_heads=8`, `position_scale=2.0`.
    Returns:
      (Sana, params): `sana.apply({"params": params}, x, t, states, mask)`.
    Raises:
      InputError: wrong folder, config or override.  CheckpointError: weights that do not fit.
    """
    return _prepare_sana(path, **overrides).read()


def _prepare_sana(path, **overrides):
    folder, config = _component(path, "transformer")
    source = str(folder / "config.json")
    fields = sana_names.config_fields(config, source) if config is not None else None
    checkpoint = open_checkpoint(folder)
    if fields is None:
        fields = sana_names.infer_fields(checkpoint.header, overrides)
    return _prepare(Sana, fields, overrides, checkpoint)


def load_dc_ae(path, **overrides):
    """A DC-AE from a diffusers `vae/` folder or one .safetensors file; see `load_sana`.

    Returns:
      (DCAE, params): `dc_ae.apply({"params": params}, images, method="encode")`, and "decode".
    """
    return _prepare_dc_ae(path, **overrides).read()


def _prepare_dc_ae(path, **overrides):
    folder, config = _component(path, "vae")
    fields = dc_ae_names.config_fields(config) if config is not None else None
    checkpoint = open_checkpoint(folder)
    if fields is None:
        fields = dc_ae_names.infer_fields(checkpoint.header)
    return _prepare(DCAE, fields, overrides, checkpoint)


def load_gemma2(path, **overrides):
    """A Gemma-2 decoder from a transformers folder (with or without its language-model head).

    Returns:
      (Gemma2, params): `gemma2.apply({"params": params}, ids, mask) -> states`.
    """
    return _prepare_gemma2(path, **overrides).read()


def _prepare_gemma2(path, **overrides):
    folder, config = _component(path, "text_encoder")
    if config is None:
        raise InputError(f"{folder}: config.json is absent; Gemma-2's heads cannot be told from its weights")
    fields = gemma2_names.config_fields(config, str(folder / "config.json"))
    checkpoint = open_checkpoint(folder, stems=("model",), rename=gemma2_names.rename)
    return _prepare(Gemma2, fields, overrides, gemma2_names.without_unused(checkpoint))


def find_model(model, revision=None):
    """The local folder of a model: `model` itself, or the files of a Hugging Face repository."""
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model={model!r}: must be a path or a Hugging Face id, not a {type(model).__name__}")
    folder = pathlib.Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise InputError(f"model={str(model)!r}: must be a folder in diffusers layout, or a Hugging Face id (owner/name)")
    import huggingface_hub

    patterns = ["model_index.json", EXTRAS, "*/*.json", "*/*.safetensors", "tokenizer/*"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(str(model), revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # the hub raises many kinds; each becomes one line that names the model
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model={str(model)!r}: not a local folder, and the download failed: {detail}") from error


SCHEDULERS = {  # keys of scheduler_config.json that change the pictures: the values we can follow
    "_class_name": ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    "prediction_type": ("flow_prediction",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "use_flow_sigmas": (True,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "thresholding": (False,),
    "euler_at_final": (False,),
    "num_train_timesteps": (1000,),
}


def read_flow_shift(folder):
    """The flow shift of a scheduler folder, or None without one.

    Raises InputError: a scheduler that neither of our samplers follows.  Warns of Euler's, since the
    sampler is chosen by the caller.
    """
    path = pathlib.Path(folder) / "scheduler_config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    for key, allowed in SCHEDULERS.items():
        require_choice(f"{path}: {key}", config.get(key, allowed[0]), allowed)
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        warnings.warn(f"{path}: these weights came with Euler; sampler='flow-euler' follows it", stacklevel=3)
    shift = config.get("flow_shift", config.get("shift"))
    return require_positive(f"{path}: flow_shift", shift, float, none=True)


def _read_extras(path):
    """sana_jax.json as a dict, empty without one.  Raises InputError."""
    extras = read_json(path) if path.is_file() else {}
    if "stack" in extras:
        require_choice(f"{path}: stack", extras["stack"], tuple(STACKS))
    words = extras.get("complex_human_instruction") or ""
    if not isinstance(words, str) and not (isinstance(words, list) and all(isinstance(w, str) for w in words)):
        raise InputError(f"{path}: complex_human_instruction={words!r}: must be a string or a list of strings")
    return extras


def load_pipeline(model, *, dtype="auto", stack="auto", revision=None):
    """A whole pipeline from a folder in diffusers layout.

    Args:
      model: the folder, or a Hugging Face id (owner/name).
      dtype: of the transformer: "auto", a name (fp32, bf16, fp16, ...) or a jnp dtype.  "auto" is
        the published dtype of a known repository name, else that of the stored weights.  The text
        encoder and the autoencoder follow, with bfloat16 in place of float16, which they overflow.
      stack: "auto" (sana_jax.json, else "diffusers"), "diffusers", "nvlabs" or a `Stack`.
      revision: branch, tag or commit of a Hugging Face id.
    Returns:
      A `Pipeline`.
    Raises:
      InputError, CheckpointError: one message that names what does not fit.
    """
    auto = isinstance(dtype, str) and dtype == "auto"
    if not auto:
        dtype = precision.parse(dtype)
    if not isinstance(stack, Stack):
        require_choice("stack", stack, ("auto", *STACKS))
    folder = find_model(model, revision)
    index = folder / "model_index.json"
    if not index.is_file():
        hint = "; this is a component folder" if (folder / "config.json").is_file() else ""
        raise InputError(f"{folder}: has no model_index.json, is not a pipeline in diffusers layout{hint}")
    kind = read_json(index).get("_class_name")
    require_choice(f"{index}: _class_name", kind, ("SanaPipeline", "SanaPAGPipeline"))
    extras = _read_extras(folder / EXTRAS)

    name = str(model).rstrip("/").split("/")[-1]
    main = precision.published(name) if auto else dtype
    main_dtype = {} if main is None else {"dtype": main}

    def other(component):  # text encoder and autoencoder
        chosen = dtype
        if auto:
            found = open_checkpoint(folder / component)
            chosen = precision.stored(found.dtypes, found.source)
        return {"dtype": precision.without_float16(chosen)}

    flow_shift = read_flow_shift(folder / "scheduler")
    tokenizer = text.load_tokenizer(folder / "tokenizer")
    prepared = [  # all of them before the first weight is read
        _prepare_sana(folder / "transformer", **main_dtype),
        _prepare_dc_ae(folder / "vae", **other("vae")),
        _prepare_gemma2(folder / "text_encoder", **other("text_encoder")),
    ]
    sana, dc_ae, gemma2 = (part.read() for part in prepared)
    encoder = TextEncoder(*gemma2, tokenizer, extras.get("complex_human_instruction"))
    if stack == "auto":
        stack = extras.get("stack", "diffusers")
    return Pipeline(sana, dc_ae, encoder, stack=stack, flow_shift=flow_shift)
