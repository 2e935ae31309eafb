"""From modules with parameters to the folders that they are published in; see `loading`."""

import contextlib
import os
import pathlib
import shutil
import tempfile

import flax.traverse_util
import numpy as np

from sana_jax import extras, requests, schedulers
from sana_jax.checkpoints import dc_ae as dc_ae_names
from sana_jax.checkpoints import gemma2 as gemma2_names
from sana_jax.checkpoints import sana as sana_names
from sana_jax.checkpoints.rules import to_torch
from sana_jax.checkpoints.write import umask, write_json, write_safetensors
from sana_jax.components import fields_of, published_rules
from sana_jax.errors import InputError
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.sana import Sana
from sana_jax.stacks import STACKS

COMPONENTS = {  # model_index.json of a pipeline that we write
    "text_encoder": ["transformers", "Gemma2Model"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def component_config(module):
    """config.json of a module's published class."""
    fields = fields_of(module)
    if isinstance(module, Sana):
        return sana_names.to_config(fields)
    if isinstance(module, DCAE):
        return dc_ae_names.to_config(fields)
    return gemma2_names.to_config({k: v for k, v in fields.items() if k not in ("parent", "name", "dtype", "param_dtype")})


def save_component(folder, stem, module, params):
    """Writes config.json and `stem`.safetensors as diffusers and transformers read them."""
    write_json(_made(folder) / "config.json", component_config(module))
    write_safetensors(folder, stem, published_tensors(module, params))


def save_original(folder, module, params):
    """Writes an autoencoder as efficientvit publishes it, a transformer as NVlabs does (needs torch).

    NVlabs' file has no config; its name holds the resolution, which its weights do not tell.
    """
    folder = _made(folder)
    if isinstance(module, DCAE):
        write_json(folder / "config.json", dc_ae_names.efficientvit_config(fields_of(module)))
        write_safetensors(folder, "model", published_tensors(module, params, original=True))
        return
    state = {name: _torch_tensor(array) for name, array in published_tensors(module, params, original=True)}
    import torch

    file = folder / sana_names.nvlabs_file_name(fields_of(module))
    try:
        torch.save({"state_dict": state}, file)
    except RuntimeError as error:  # so torch calls a full disk
        raise OSError(f"{file.name}: {str(error).splitlines()[0]}") from error


def published_tensors(module, params, original=False):
    """Yields (name, array) of a module's parameters, see `components.published_rules`."""
    leaves = {
        path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    rules = published_rules(module, original)
    return dc_ae_names.with_counters(rules, to_torch(rules, leaves))


def _made(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _torch_tensor(array):
    try:
        import torch
    except ImportError as error:
        raise InputError("to='nvlabs': a .pth file is written by torch, which is not installed (the extra `parity`)") from error

    if array.dtype.name == "bfloat16":  # of which torch and numpy only know the bits in common
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def require_new(folder):
    """Raises InputError if `folder` is anything but absent or an empty folder; returns its full path."""
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; nothing was written")
    return folder


@contextlib.contextmanager
def new_folder(folder):
    """A temporary neighbour that takes the name at the end: `folder` is whole or absent.

    Raises InputError: the folder exists and is not empty, or cannot be written.
    """
    folder = require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield partial
        partial.chmod(0o777 & ~umask())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, say
            raise InputError(f"{folder}: cannot be written ({error}); nothing was written") from error
        raise


def save_pipeline(pipeline, folder):
    """Writes the folder that `load_pipeline` and diffusers' SanaPipeline read, whole or not at all.

    Raises InputError: the folder exists and is not empty, or cannot be written, or there is no text
    encoder to write.
    """
    if pipeline.text is None:
        raise InputError("text=None: a pipeline folder needs a text encoder and a tokenizer")
    if pipeline.stack not in STACKS.values():
        raise InputError(f"stack={pipeline.stack.name!r} with changed fields: a folder can only name one of {', '.join(STACKS)}")
    with new_folder(folder) as partial:
        write_pipeline(pipeline, partial)


def write_pipeline(pipeline, folder):
    """The files of `save_pipeline`, into a folder that is there."""
    encoder = pipeline.text
    save_component(folder / "transformer", "diffusion_pytorch_model", *pipeline.sana)
    save_component(folder / "vae", "diffusion_pytorch_model", *pipeline.dc_ae)
    save_component(folder / "text_encoder", "model", encoder.gemma2, encoder.params)
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    config = schedulers.scheduler_config(pipeline.sana[0], pipeline.flow_shift)
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    index = COMPONENTS | {"tokenizer": ["transformers", type(encoder.tokenizer).__name__]}
    write_json(folder / "model_index.json", schedulers.pipeline_entries(pipeline.sana[0]) | index)
    published = requests.defaults(pipeline.sana[0])
    said = {
        "stack": pipeline.stack.name,
        "complex_human_instruction": encoder.instruction,
        **{name: value for name, value in pipeline.defaults.items() if value != published[name]},
        "vocabulary": encoder.vocabulary and sorted(encoder.vocabulary.words),
    }
    extras.write(folder, said)
