"""The `parameters` text that the A1111 family of tools writes into PNG files and reads from them.

    prompt
    Negative prompt: ...
    Steps: 20, Sampler: flow-dpm-solver, CFG scale: 4.5, Seed: 1, Size: 1024x1024, Model: ...
"""

import json
import pathlib
import re

from sana_jax import bundled
from sana_jax.errors import InputError

NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
SAMPLERS = {"euler": "flow-euler"}  # other tools' names of ours
SETTINGS = {  # their word: (ours, how it is written)
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
}


def _quoted(value):
    """A value as these tools write it: as a JSON string where a comma would end it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def write(record):
    """The text of a record (see `records.make`)."""
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"{NEGATIVE} {record['negative_prompt']}")
    settings = {
        "Steps": record["steps"],
        "Sampler": record["sampler"],
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["model_sha256"][:10],
        "Model": pathlib.PurePath(record["loading"]["model"] or f"sana_jax-{bundled.NAME}").name,
        "Version": f"sana_jax {record['versions']['sana_jax']}",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items())])


def read(text, path, samplers):
    """({setting: value}, [what of it has no meaning here]) of such a text.

    Raises InputError: a setting that we have is not a number.
    """
    *lines, last = text.strip().split("\n")
    pairs = dict(PAIR.findall(last))
    if "Steps" not in pairs or len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE)
    settings = {"prompt": "\n".join(lines[:start]).strip(), "negative_prompt": negative.strip()}
    for theirs, (ours, kind) in SETTINGS.items():
        if theirs in pairs:
            try:
                settings[ours] = kind(pairs.pop(theirs))
            except ValueError as error:
                raise InputError(f"{path}: its {theirs} is no number ({error})") from error
    if "Size" in pairs:
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", pairs.pop("Size").strip())
        if not size:
            raise InputError(f"{path}: its Size must be <width>x<height>")
        settings["width"], settings["height"] = map(int, size.groups())
    if "Sampler" in pairs:
        name = pairs["Sampler"].strip().lower()
        if (name := SAMPLERS.get(name, name)) in samplers:
            settings["sampler"] = name
            del pairs["Sampler"]
    return settings, [f"{key}: {value.strip()}" for key, value in pairs.items()]
