"""What a picture is made of, as a dictionary that travels in its PNG, and the way back.

A record holds the settings of the picture, the whole batch that it was painted in (other neighbours
could round differently), how the model was loaded, and what must be the same for the same bits.
"""

import json
from typing import NamedTuple

from sana_jax import images, pipeline, programs
from sana_jax.cli import a1111
from sana_jax.cli.prompt_files import bad_text
from sana_jax.errors import InputError, require_range
from sana_jax.hub.folders import PICKLES

FORMAT = 1
CHUNK, TEXT, SHEET = "sana_jax", "parameters", "sana_jax_sheet"  # names of text chunks
LARGEST_BATCH = 1024

SETTINGS = {  # what makes a picture, and what holds where nobody says; None is the model's own
    "prompt": None,
    "negative_prompt": "",
    "seed": 0,
    "index": 0,  # the image with this number among those of its seed
    "height": None,
    "width": None,
    "steps": None,
    "sampler": None,
    "guidance_scale": None,
    "guidance_interval": [0.0, 1.0],
    "flow_shift": None,
    "pag_scale": 0.0,
    "pag_layers": None,
    "pag_adaptive_scale": 0.0,
    "max_sequence_length": None,
    "init_image": None,  # path of the picture that it starts from
    "init_image_sha256": None,
    "strength": None,
}
WORDS = ("prompt", "negative_prompt", "init_image", "init_image_sha256")
LOADING = {  # arguments of `load_pipeline`, and the instruction, as they were given
    "model": None,  # the bundled one
    "revision": None,
    "variant": None,
    "dc_ae": None,
    "text": None,
    "dtype": "auto",
    "stack": "auto",
    "kernels": "auto",
    "chi": "auto",
}
MODEL = ("stack", "dtype", "model_sha256", "chi_sha256")  # two pictures of one run agree in these
MACHINE = ("sana_jax", "jax", "jaxlib", "python", "device")
NAMES = (*MODEL, *MACHINE, "init_image_sha256")
BATCH = ("position", "prompts", "negative_prompts", "indices")


class Recipe(NamedTuple):
    """What a PNG says of itself."""

    settings: dict
    loading: dict
    batch: dict | None  # None: painted by another program
    identity: dict  # {name of MODEL or MACHINE: value}


def check(settings):
    """Raises InputError for a setting that is wrong for every model."""
    for name in WORDS:
        value = settings[name]
        if not isinstance(value, str) and not (value is None and SETTINGS[name] is None and name != "prompt"):
            raise InputError(f"{name}={value!r}: must be a string")
    for name in ("prompt", "negative_prompt"):
        if reason := bad_text(settings[name]):
            raise InputError(f"{name}: {reason}")
    require_range("index", settings["index"], 0, 2**31 - 1)
    if settings["strength"] is not None and settings["init_image"] is None:
        raise InputError(f"strength={settings['strength']!r}: is that of --image, and there is none")
    pipeline.check_request(**{k: v for k, v in settings.items() if k not in (*WORDS, "index") and v is not None})


def make(settings, batch, loading, identity, **more):
    """The record of a picture; `settings` and `identity` are complete, `batch` has the keys of BATCH."""
    machine = {name: identity[name] for name in MACHINE if name != "device"}
    kept = {name: identity[name] for name in (*MODEL, "device")}
    return {"format": FORMAT, **settings, "batch": batch, "loading": loading, **kept, "versions": machine, **more}


def texts(record):
    """The text chunks of a picture's PNG."""
    return {TEXT: a1111.write(record), CHUNK: json.dumps(record, sort_keys=True, ensure_ascii=False)}


def sheet_texts(prompt, axes, names):
    """The text chunk of a contact sheet's PNG."""
    described = {"format": FORMAT, "prompt": prompt, "grid": axes, "pictures": names}
    return {SHEET: json.dumps(described, ensure_ascii=False)}


def read(path):
    """(Recipe, what has no meaning here) of a PNG.  Raises InputError: it does not say, or nonsense."""
    found = images.read_texts(path, (CHUNK, TEXT, SHEET))
    if CHUNK in found:
        return _recipe(_parse(found[CHUNK], path), path), []
    if SHEET in found:
        names = _parse(found[SHEET], path).get("pictures")
        raise InputError(f"{path}: is a contact sheet; give one of its pictures: {names}")
    if TEXT not in found:
        raise InputError(f"{path}: does not say how it was made, has no text {CHUNK!r} or {TEXT!r}")
    settings, unknown = a1111.read(found[TEXT], path, tuple(programs.SAMPLERS))
    settings = SETTINGS | settings
    _checked(settings, path)
    return Recipe(settings, dict(LOADING), None, {}), unknown


def _parse(text, path):
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its record is not readable as JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: its record must be a JSON object, is {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise InputError(f"{path}: its record has format={record.get('format')!r}, must have {FORMAT}")
    return record


def _checked(settings, path):
    try:
        check(settings)
    except InputError as error:
        raise InputError(f"{path}: its record is wrong: {error}") from error


def _recipe(record, path):
    """The parts of a record, each of the right type.  Raises InputError."""

    def require(holds, name, what):
        if not holds:
            raise InputError(f"{path}: its record is wrong: {name} must be {what}")

    def texts(values):
        return isinstance(values, list) and len(values) <= LARGEST_BATCH and not any(bad_text(v) for v in values)

    settings = {name: record.get(name, default) for name, default in SETTINGS.items()}
    _checked(settings, path)
    loading, batch, versions = (record.get(name) for name in ("loading", "batch", "versions"))
    for name, value in (("loading", loading), ("batch", batch), ("versions", versions)):
        require(isinstance(value, dict), name, "an object")
    loading = {name: loading.get(name, default) for name, default in LOADING.items()}
    for name, value in loading.items():
        require(isinstance(value, str) or value is None and LOADING[name] is None, f"loading.{name}", "a string")
    require(set(batch) == set(BATCH), "batch", f"an object with {', '.join(BATCH)}")
    indices, prompts, position = batch["indices"], batch["prompts"], batch["position"]
    count = len(indices) if isinstance(indices, list) else 0
    numbers = 0 < count <= LARGEST_BATCH and all(type(index) is int and 0 <= index < 2**31 for index in indices)
    require(numbers, "batch.indices", f"a list of 1 to {LARGEST_BATCH} numbers")
    require(texts(prompts) and len(prompts) in (1, count), "batch.prompts", "a list of one string, or one for each index")
    require(
        texts(batch["negative_prompts"]) and len(batch["negative_prompts"]) == len(prompts),
        "batch.negative_prompts", "a list of as many strings as batch.prompts",
    )  # fmt: skip
    require(type(position) is int and 0 <= position < count, "batch.position", f"in [0, {count - 1}]")
    own = position if len(prompts) == count else 0
    there = prompts[own], batch["negative_prompts"][own], indices[position]
    require(there == tuple(settings[k] for k in ("prompt", "negative_prompt", "index")), "batch", "that of this picture")
    identity = {**{name: record.get(name) for name in (*MODEL, "device")}, **versions}
    identity = {name: identity.get(name) for name in (*MODEL, *MACHINE)}
    for name, value in identity.items():
        require(isinstance(value, str), name, "a string")
    return Recipe(settings, loading, batch, identity)


def difference(recipe, settings, identity):
    """The first of what makes two pictures of one prompts file differ: (name, there, here), or None."""
    for name in SETTINGS:
        if name != "init_image" and recipe.settings[name] != settings[name]:  # a path says less than a sha256
            return name, recipe.settings[name], settings[name]
    for name in MODEL:
        if recipe.identity.get(name) != identity[name]:
            return name, recipe.identity.get(name), identity[name]
    return None


def changed(recipe, all_settings, identity):
    """How pictures of these settings differ from the recorded one, for people; "" for not at all."""
    if len(all_settings) > 1:
        return f"a variation in {len(all_settings)} pictures"
    (settings,) = all_settings
    # The path of a picture to begin with says nothing that its sha256 does not.
    pairs = [(name, recipe.settings[name], settings[name]) for name in SETTINGS if name != "init_image"]
    pairs += [(name, recipe.identity[name], identity[name]) for name in MODEL if recipe.identity]
    differ = [f"{name} {there!r} -> {here!r}" for name, there, here in pairs if there != here]
    return f"a variation: {', '.join(differ)}" if differ else ""


def refuse_pickles(recipe, given, path):
    """Raises InputError where a picture, and not the user, names a pickle to be read."""
    for name in ("model", "dc_ae", "text"):
        value = recipe.loading[name] or ""
        if name not in given and value.lower().endswith(PICKLES):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{name}={value!r}: is a pickle that {path} names; pass {flag} yourself if you trust that file")


def require_same(recipe, identity, allowed, path):
    """Raises InputError for what keeps a recorded picture from being painted bit for bit.

    `allowed` are names of MODEL and MACHINE for which that is fine.
    """
    for name in (*MODEL, *MACHINE):
        if recipe.identity and recipe.identity[name] != identity[name] and name not in allowed:
            raise InputError(
                f"{name}={identity[name]!r}: {path} was painted with {recipe.identity[name]!r}, so that its bits "
                f"cannot be promised; --allow-mismatch {name} goes on"
            )
