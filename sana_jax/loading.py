"""A whole pipeline, from a folder as diffusers publishes it or from parts.

    pipeline = load_pipeline()                      # the bundled one, which knows shapes
    pipeline = load_pipeline("folder")
    pipeline = load_pipeline("Sana_1600M_1024px.pth", dc_ae="dc-ae-f32c32-sana-1.0", text="gemma-2-2b-it")

The layout of a folder is that of diffusers: model_index.json, scheduler/, tokenizer/, text_encoder/,
transformer/, vae/.  What it cannot say (which instruction, which stack, ...) stands in sana_jax.json, see `extras`.
"""

import os
import pathlib

from sana_jax import bundled, extras, memory, ops, precision, schedulers
from sana_jax.checkpoints import sana as sana_format
from sana_jax.checkpoints.pickles import SUFFIXES
from sana_jax.checkpoints.read import read_json
from sana_jax.components import load_dc_ae as load_dc_ae
from sana_jax.components import load_gemma2 as load_gemma2
from sana_jax.components import load_sana as load_sana
from sana_jax.components import prepare_dc_ae, prepare_gemma2, prepare_sana
from sana_jax.components import published_rules as published_rules
from sana_jax.errors import InputError, require_choice
from sana_jax.hub.download import find_model as find_model
from sana_jax.hub.names import parse
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.stacks import STACKS, Stack
from sana_jax.text import Vocabulary, load_tokenizer

PARTS = {"dc_ae": "vae", "text": "text_encoder"}  # argument of load_pipeline: folder of a pipeline


def _is_component(path):
    """Whether a path is one part of a pipeline by itself: a weight file, or a folder with its config."""
    if path.is_file():
        return path.suffix in (".safetensors", *SUFFIXES)
    return (path / "config.json").is_file() and not (path / "model_index.json").is_file()


def _part(argument, given, find):
    """The path of a part: what `given` is, or that part of the pipeline that it is."""
    path = find(given, part=PARTS[argument])
    inner = path / PARTS[argument]
    return inner if (path / "model_index.json").is_file() or (inner.is_dir() and not _is_component(path)) else path


def _paths(model, find, given):
    """({"transformer", "vae", "text_encoder", "tokenizer": path}, the pipeline folder or None).

    Raises InputError: neither a pipeline folder nor all of its parts.
    """
    path = find(model)
    folder = None if _is_component(path) else path
    if folder is None:
        paths = {"transformer": path}
        if missing := [f"{name}=" for name, value in given.items() if value is None]:
            what = "is a file" if path.is_file() else "has no model_index.json, is not a pipeline in diffusers layout; this is a component folder"
            raise InputError(
                f"{path}: {what}; a transformer alone needs {' and '.join(missing)} too (dc_ae= a DC-AE folder or file, "
                "text= a Gemma-2 folder with its tokenizer, either a pipeline folder to take it from)"
            )
    elif not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: has no model_index.json, is not a pipeline in diffusers layout")
    else:
        paths = {name: folder / name for name in ("transformer", "vae", "text_encoder", "tokenizer")}
    if given["dc_ae"] is not None:
        paths["vae"] = _part("dc_ae", given["dc_ae"], find)
    if given["text"] is not None:
        paths["text_encoder"] = encoder = _part("text", given["text"], find)
        beside = encoder.parent / "tokenizer"
        paths["tokenizer"] = beside if encoder.name == "text_encoder" and beside.is_dir() else encoder
    return paths, folder


def load_pipeline(
    model=None, *, dtype="auto", stack="auto", revision=None, variant=None, dc_ae=None, text=None, mesh=None,
    transformer=None, kernels="auto",
):  # fmt: skip
    """A whole pipeline from a folder in diffusers layout, or from its parts.

    Args:
      model: the folder; a Hugging Face id or short name (see `hub.download.find_model`); or a transformer alone
        (NVlabs' .pth, a .safetensors file, a component folder), which needs the two parts below.  None is
        the bundled model.
      dtype: of the transformer: "auto", a name (fp32, bf16, fp16, ...) or a jnp dtype.  "auto" is what
        sana_jax.json says, else the published dtype of a known repository name, else that of the stored
        weights.  The text encoder and the autoencoder follow, with bfloat16 in place of float16, which they overflow.
      stack: "auto" (sana_jax.json, else "nvlabs" for weights in NVlabs' names, else "diffusers"),
        "diffusers", "nvlabs" or a `Stack`.
      revision: branch, tag or commit of a Hugging Face id.
      variant: of the weight files ("fp16", "bf16"); None chooses for the dtype, see
        `checkpoints.read.choose_variant`.
      dc_ae: an autoencoder instead of the folder's: a folder or file in diffusers' or efficientvit's
        names, or a pipeline whose vae/ is taken.
      text: a text encoder instead of the folder's: a Gemma-2 folder with its tokenizer beside the
        weights, or a pipeline whose text_encoder/ and tokenizer/ are taken.
      mesh: devices to lay the parameters over, see `sharding.make_mesh`.
      transformer: further arguments of `components.load_sana`, for what a single file does not tell, e.g.
        {"sample_size": 64, "position_scale": 1.0} or {"entry": "state_dict_ema"}.
      kernels: how the operations of `ops` run: "auto", or one of ops.KERNELS, which works or raises.
    Returns:
      A `Pipeline`.
    Raises:
      InputError, CheckpointError: one message that names what does not fit.
    """
    ops.require_runnable(kernels)
    model = bundled.require() if model is None else model
    prepared, build = prepare_pipeline(
        model, dtype=dtype, stack=stack, revision=revision, variant=variant, dc_ae=dc_ae, text=text, transformer=transformer,
        kernels=kernels,
    )  # fmt: skip
    memory.require_memory(sum(part.bytes_held(mesh) for part in prepared), model, mesh and mesh.devices.flat)
    return build(*(part.read(mesh) for part in prepared))


def prepare_pipeline(
    model, *, dtype="auto", stack="auto", revision=None, variant=None, dc_ae=None, text=None,
    as_stored=False, transformer=None, kernels="auto",
):  # fmt: skip
    """`load_pipeline` up to the point where weights are read.

    `as_stored`: "auto" is what the files hold and nothing else.
    Returns:
      ([transformer, autoencoder, text encoder], each a `Prepared`; their (module, params) -> Pipeline).
    """
    auto = isinstance(dtype, str) and dtype == "auto"
    if not auto:
        dtype = precision.parse(dtype)
    if not isinstance(stack, Stack):
        require_choice("stack", stack, ("auto", *STACKS))

    def find(what, part=None):
        own = {"revision": revision, "variant": variant} if part is None else {"part": part}
        return pathlib.Path(find_model(what, wanted=precision.short(dtype), **own))

    paths, folder = _paths(model, find, {"dc_ae": dc_ae, "text": text})
    said, flow_shift = {}, None
    if folder is not None:
        index = folder / "model_index.json"
        kind = read_json(index).get("_class_name")
        require_choice(f"{index}: _class_name", kind, tuple(schedulers.PIPELINES))
        said, flow_shift = extras.read(folder), schedulers.read_flow_shift(folder / "scheduler")

    if auto and not as_stored and "dtype" in said:
        auto, dtype = False, precision.parse(said["dtype"])
    name = str(model) if os.path.exists(model) else parse(model, revision).repo
    published = precision.published(name.rstrip("/").split("/")[-1]) if auto and not as_stored else None

    def follow(prepare, path, variant, runs_in, **how):
        found = prepare(path, variant=variant, dtype=dtype if auto else runs_in(dtype), **how)
        final = runs_in(found.module.dtype)
        return found._replace(module=found.module.clone(dtype=final, param_dtype=final))

    other = (lambda own: own) if as_stored and auto else precision.without_float16
    tokenizer = load_tokenizer(paths["tokenizer"])
    prepared = [  # all of them before the first weight is read
        follow(prepare_sana, paths["transformer"], variant, lambda own: published or own, published=published, **transformer or {}),
        follow(prepare_dc_ae, paths["vae"], variant if dc_ae is None else None, other),
        follow(prepare_gemma2, paths["text_encoder"], variant if text is None else None, other),
    ]
    prepared[:2] = [part._replace(module=part.module.clone(kernels=kernels)) for part in prepared[:2]]
    if folder is not None:
        schedulers.check_pipeline_class(index, kind, prepared[0].module)
    if stack == "auto":
        original = sana_format.is_nvlabs(prepared[0].checkpoint.header)
        stack = said.get("stack", "nvlabs" if original else "diffusers")
    vocabulary = None
    if "vocabulary" in said and text is None:
        own = (bundled.OWNER, bundled.ADVICE) if bundled.is_bundled(folder) else ()
        vocabulary = Vocabulary(frozenset(said["vocabulary"]), *own)
    defaults = {name: said[name] for name in extras.SAMPLING if name in said}

    def build(sana, dc_ae, gemma2):
        encoder = TextEncoder(*gemma2, tokenizer, said.get("complex_human_instruction"), vocabulary)
        return Pipeline(sana, dc_ae, encoder, stack=stack, flow_shift=flow_shift, defaults=defaults)

    build(*((part.module, {}) for part in prepared))  # parts that do not belong together are refused here
    return prepared, build
