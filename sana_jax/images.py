"""PNG files that say how they were made: `parameters`, which many tools read, and `sana_jax`, JSON."""

import json
import os
import pathlib
import tempfile

from PIL import Image, PngImagePlugin

from sana_jax.errors import InputError


def parameters_text(record):
    """The `parameters` text of the A1111 family of tools, from a record of arguments."""
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    settings = {
        "Steps": record["steps"],
        "Sampler": record["sampler"],
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": pathlib.PurePath(record["model"]).name,
        "Version": f"sana_jax {record['versions']['sana_jax']}",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])


def save_png(path, image, record):
    """Writes uint8 [H W 3] and the record of how it was made; the file is whole or absent.

    Raises InputError: the path cannot be written.
    """
    path = pathlib.Path(path)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters_text(record))
    text.add_itxt("sana_jax", json.dumps(record, sort_keys=True, ensure_ascii=False))
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            Image.fromarray(image).save(partial, format="PNG", pnginfo=text)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"output={str(path)!r}: cannot be written ({error.strerror or error})") from error


def read_record(path):
    """The record of a picture that `save_png` wrote.  Raises InputError: none in there."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return json.loads(image.text["sana_jax"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a PNG that sana_jax wrote ({type(error).__name__}: {error})") from error


def output_paths(output, count, seed):
    """Paths of `count` pictures, checked to be writable now rather than after the work.

    Nothing is left behind: a folder that is not there yet is made with the first picture.

    `output` is a .png file (numbered when there are several), a folder, or None for outputs/.
    Files in a folder take the next free number: `<n>_<seed>.png`.
    Raises InputError: another suffix, or no permission.
    """
    target = pathlib.Path("outputs" if output is None else output)
    single = target.suffix.lower() == ".png" and not target.is_dir()
    if target.suffix and not single and not target.is_dir():
        raise InputError(f"output={str(output)!r}: must end in .png, or be a folder")
    folder = target.parent if single else target
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"output={str(target)!r}: cannot be written ({error.strerror})") from error
    if single:
        names = [target.name] if count == 1 else [f"{target.stem}-{i}{target.suffix}" for i in range(count)]
        return [folder / name for name in names]
    taken = [int(n) for p in folder.glob("*_*.png") if (n := p.name.split("_")[0]).isdigit()]
    first = max(taken, default=-1) + 1
    return [folder / f"{first + i:05d}_{seed}.png" for i in range(count)]
