"""The model in the box: a small trained SANA that knows shapes and nothing else.

`shapes/` beside this file is a pipeline folder like any other, with a MODEL_CARD.md.  `load_pipeline()`
and sample.py use it where no model is named.
"""

import importlib.resources
import pathlib

from sana_jax.errors import InputError

NAME = "shapes"
OWNER = "the bundled model"  # whose vocabulary a warning about a word speaks of, and what it advises
ADVICE = "for anything but shapes use --model MODEL, or load_pipeline(MODEL)"
NO_MODEL = (
    "model: none given and this installation has none bundled; pass --model with a folder in diffusers layout or a "
    "Hugging Face id, e.g. Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
)


def folder():
    """The full path of the bundled pipeline folder, None where this installation has none."""
    found = pathlib.Path(str(importlib.resources.files(__name__)), NAME).resolve()
    return found if (found / "model_index.json").is_file() else None


def require():
    """`folder()`.  Raises InputError without one."""
    found = folder()
    if found is None:
        raise InputError(NO_MODEL)
    return found


def is_bundled(path):
    """Whether a path is the bundled folder, however it is spelled."""
    return folder() is not None and pathlib.Path(path).resolve() == folder()
