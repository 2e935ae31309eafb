"""From published folders to modules with parameters, and back.

    sana, params = load_sana("folder/transformer")
    pipeline = load_pipeline("folder");  pipeline.save("copy")

The layout is that of diffusers: model_index.json, scheduler/, tokenizer/, text_encoder/,
transformer/, vae/.  What it cannot say (which instruction and which stack) stands in sana_jax.json.
"""

import dataclasses
import math
import os
import pathlib
import re
import shutil
import tempfile

import flax.traverse_util
import jax
import numpy as np

from sana_jax import precision, text
from sana_jax.checkpoints import dc_ae as dc_ae_names
from sana_jax.checkpoints import gemma2 as gemma2_names
from sana_jax.checkpoints import sana as sana_names
from sana_jax.checkpoints.read import open_checkpoint, read_json
from sana_jax.checkpoints.rules import to_flax, to_torch
from sana_jax.checkpoints.write import umask, write_json, write_safetensors
from sana_jax.errors import InputError, nearest, require_choice
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.stacks import STACKS, Stack

EXTRAS = "sana_jax.json"  # our own file in a pipeline folder
KINDS = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "text_encoder": "gemma2"}
COMPONENTS = {  # model_index.json of a pipeline that we write
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
}


def parameter_shapes(module):
    """{path: shape} of a module's parameters, without computing any."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def _rules(module):
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


def _build(module_class, fields, overrides, checkpoint):
    """The module of these fields, dtypes settled, and its parameters from the checkpoint."""
    names = [f.name for f in dataclasses.fields(module_class) if f.name not in ("parent", "name")]
    for name in overrides:
        if name not in names:
            raise InputError(f"{name}={overrides[name]!r}: {module_class.__name__} has no such field{nearest(name, names)}")
    auto = [k for k in ("dtype", "param_dtype") if isinstance(overrides.get(k), str) and overrides[k] == "auto"]
    fields = fields | {k: v for k, v in overrides.items() if k not in auto}
    default = precision.stored(checkpoint.dtypes, checkpoint.source)
    fields["param_dtype"] = precision.parse(fields.get("param_dtype", fields.get("dtype", default)))
    fields["dtype"] = precision.parse(fields.get("dtype", fields["param_dtype"]))
    module = module_class(**fields)
    leaves = to_flax(
        _rules(module),
        parameter_shapes(module),
        checkpoint.header,
        checkpoint.tensors(),
        np.dtype(module.param_dtype),
        checkpoint.source,
    )
    # One leaf at a time, so that an accelerator's copy and the host's do not both grow; on a CPU
    # the array itself is taken over.
    params = {}
    for path in list(leaves):
        params[path] = jax.device_put(leaves.pop(path))
    return module, flax.traverse_util.unflatten_dict(params, sep="/")


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
            raise InputError(f"{path}: holds a {kind}, must hold a {KINDS[subfolder]}: is this the right folder?")
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
    folder, config = _component(path, "transformer")
    source = str(folder / "config.json")
    fields = sana_names.config_fields(config, source) if config is not None else None
    checkpoint = open_checkpoint(folder)
    if fields is None:
        fields = sana_names.infer_fields(checkpoint.header, overrides)
    return _build(Sana, fields, overrides, checkpoint)


def load_dc_ae(path, **overrides):
    """A DC-AE from a diffusers `vae/` folder or one .safetensors file; see `load_sana`.

    Returns:
      (DCAE, params): `dc_ae.apply({"params": params}, images, method="encode")`, and "decode".
    """
    folder, config = _component(path, "vae")
    fields = dc_ae_names.diffusers_config(config) if config is not None else None
    checkpoint = open_checkpoint(folder)
    if fields is None:
        fields = dc_ae_names.infer_fields(checkpoint.header)
    return _build(DCAE, fields, overrides, checkpoint)


def load_gemma2(path, **overrides):
    """A Gemma-2 decoder from a transformers folder (with or without its language-model head).

    Returns:
      (Gemma2, params): `gemma2.apply({"params": params}, ids, mask) -> states`.
    """
    folder, config = _component(path, "text_encoder")
    if config is None:
        raise InputError(f"{folder}: config.json is absent; Gemma-2's heads cannot be told from its weights")
    fields = gemma2_names.config_fields(config, str(folder / "config.json"))
    checkpoint = open_checkpoint(folder, stems=("model",), rename=gemma2_names.rename)
    return _build(Gemma2, fields, overrides, gemma2_names.without_unused(checkpoint))


def find_model(model, revision=None):
    """The local folder of a model: `model` itself, or the files of a Hugging Face repository."""
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


def read_flow_shift(folder):
    """The flow shift of a scheduler folder, or None without one.  Raises InputError."""
    path = pathlib.Path(folder) / "scheduler_config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise InputError(f"{path}: prediction_type={config['prediction_type']!r}, must be 'flow_prediction'")
    shift = config.get("flow_shift", config.get("shift"))
    if shift is not None and not (isinstance(shift, (int, float)) and 0 < shift < math.inf):
        raise InputError(f"{path}: flow_shift={shift!r}, must be a positive number")
    return shift


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
        if not auto:
            return {"dtype": precision.without_float16(dtype)}
        stems = ("diffusion_pytorch_model", "model")
        source = folder / component
        return {"dtype": precision.without_float16(precision.stored(open_checkpoint(source, stems).dtypes, source))}

    flow_shift = read_flow_shift(folder / "scheduler")
    tokenizer = text.load_tokenizer(folder / "tokenizer")
    sana = load_sana(folder / "transformer", **main_dtype)
    dc_ae = load_dc_ae(folder / "vae", **other("vae"))
    gemma2 = load_gemma2(folder / "text_encoder", **other("text_encoder"))
    encoder = TextEncoder(*gemma2, tokenizer, extras.get("complex_human_instruction"))
    if stack == "auto":
        stack = extras.get("stack", "diffusers")
    return Pipeline(sana, dc_ae, encoder, stack=stack, flow_shift=flow_shift)


def _config(module):
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}
    if isinstance(module, Sana):
        return sana_names.to_config(fields)
    if isinstance(module, DCAE):
        return dc_ae_names.to_diffusers_config(fields)
    return gemma2_names.to_config({k: v for k, v in fields.items() if k not in ("parent", "name", "dtype", "param_dtype")})


def save_component(folder, stem, module, params):
    """Writes config.json and `stem`.safetensors as diffusers and transformers read them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {
        path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    write_json(folder / "config.json", _config(module))
    write_safetensors(folder, stem, to_torch(_rules(module), leaves))


def save_pipeline(pipeline, folder):
    """Writes the folder that `load_pipeline` and diffusers' SanaPipeline read.

    Everything is written to a neighbour that takes the name at the end: `folder` is whole or absent.
    Raises InputError: the folder exists and is not empty, or cannot be written, or there is no text
    encoder to write.
    """
    folder = pathlib.Path(folder).absolute()
    if pipeline.text is None:
        raise InputError("text=None: a pipeline folder needs a text encoder and a tokenizer")
    if pipeline.stack not in STACKS.values():
        raise InputError(f"stack={pipeline.stack.name!r} with changed fields: a folder can only name one of {', '.join(STACKS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; nothing was written")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        encoder = pipeline.text
        save_component(partial / "transformer", "diffusion_pytorch_model", *pipeline.sana)
        save_component(partial / "vae", "diffusion_pytorch_model", *pipeline.dc_ae)
        save_component(partial / "text_encoder", "model", encoder.gemma2, encoder.params)
        encoder.tokenizer.save_pretrained(partial / "tokenizer")
        (partial / "scheduler").mkdir()
        write_json(
            partial / "scheduler" / "scheduler_config.json", SCHEDULER | {"flow_shift": pipeline.flow_shift}
        )
        index = COMPONENTS | {"tokenizer": ["transformers", type(encoder.tokenizer).__name__]}
        write_json(partial / "model_index.json", {"_class_name": "SanaPipeline"} | index)
        extras = {"stack": pipeline.stack.name, "complex_human_instruction": encoder.instruction}
        write_json(partial / EXTRAS, {k: v for k, v in extras.items() if v is not None})
        partial.chmod(0o777 & ~umask())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, say
            raise InputError(f"{folder}: cannot be written ({error}); nothing was written") from error
        raise
