"""From modules with parameters to the folders that they are published in; see `loading`."""

import dataclasses
import os
import pathlib
import shutil
import tempfile

import flax.traverse_util
import numpy as np

from sana_jax.checkpoints import dc_ae as dc_ae_names
from sana_jax.checkpoints import gemma2 as gemma2_names
from sana_jax.checkpoints import sana as sana_names
from sana_jax.checkpoints.rules import to_torch
from sana_jax.checkpoints.write import umask, write_json, write_safetensors
from sana_jax.errors import InputError
from sana_jax.loading import EXTRAS, published_rules
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.sana import Sana
from sana_jax.stacks import STACKS

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


def component_config(module):
    """config.json of a module's published class."""
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}
    if isinstance(module, Sana):
        return sana_names.to_config(fields)
    if isinstance(module, DCAE):
        return dc_ae_names.to_config(fields)
    return gemma2_names.to_config({k: v for k, v in fields.items() if k not in ("parent", "name", "dtype", "param_dtype")})


def save_component(folder, stem, module, params):
    """Writes config.json and `stem`.safetensors as diffusers and transformers read them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {
        path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    write_json(folder / "config.json", component_config(module))
    write_safetensors(folder, stem, to_torch(published_rules(module), leaves))


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
