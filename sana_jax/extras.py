"""sana_jax.json, our own file in a pipeline folder: what diffusers' layout cannot say.

    {"stack": "nvlabs", "complex_human_instruction": "", "max_sequence_length": 48, "steps": 20,
     "guidance_scale": 3.0, "dtype": "float32", "vocabulary": ["a", "above", "blue", ...]}

Each field may be absent, and is a default that an argument of the caller overrides: whose pictures to
match (`stacks`), the text before every prompt ("" for none), the prompt tokens that count, how to
sample, what to compute in (weights may be stored in less), and the words that the model was trained with.
"""

import pathlib
import warnings

from sana_jax import precision, text
from sana_jax.checkpoints.read import read_json
from sana_jax.checkpoints.write import write_json
from sana_jax.errors import InputError, require_choice
from sana_jax.requests import check_request
from sana_jax.stacks import STACKS

FILE = "sana_jax.json"
SAMPLING = ("steps", "guidance_scale", "max_sequence_length")  # arguments of `Pipeline.generate`


def _check_instruction(value):
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(w, str) for w in value)):
        raise InputError(f"complex_human_instruction={value!r}: must be a string or a list of strings")


def _check_vocabulary(value):
    if not isinstance(value, list) or not value:
        raise InputError(f"vocabulary={value!r}: must be a list of words")
    for i, word in enumerate(value):
        if not isinstance(word, str) or text.words(word) != [word]:
            raise InputError(f"vocabulary[{i}]={word!r}: must be one word, of lower-case letters and digits alone")


CHECKS = {
    "stack": lambda value: require_choice("stack", value, tuple(STACKS)),
    "complex_human_instruction": _check_instruction,
    "vocabulary": _check_vocabulary,
    "dtype": precision.parse,
    **{name: lambda value, name=name: check_request(**{name: value}) for name in SAMPLING},
}


def read(folder):
    """{field: value} of a pipeline folder's file, {} without one; null is as good as absent.

    A field that is none of these, perhaps of a later version, is left out with a warning.
    Raises InputError: a wrong value.
    """
    path = pathlib.Path(folder) / FILE
    found = read_json(path) if path.is_file() else {}
    if unknown := sorted(found.keys() - CHECKS):
        warnings.warn(f"{path}: {', '.join(unknown)}: not known here, and left out", stacklevel=2)
    found = {name: found[name] for name in found if name in CHECKS and found[name] is not None}
    try:
        check(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return found


def write(folder, said):
    """Writes {field: value}; None is left out.  Raises InputError as `read` would."""
    said = {name: value for name, value in said.items() if value is not None}
    check(said)
    write_json(pathlib.Path(folder) / FILE, said)


def check(said):
    """Raises InputError for a field that is none of these, or a wrong value."""
    for name, value in said.items():
        CHECKS[require_choice("field", name, tuple(CHECKS))](value)
