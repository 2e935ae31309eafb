"""Which files of a model a run reads: what the hub fetches, and what a fingerprint covers.

Files are named relative to the model, with slashes.  A model is a pipeline in diffusers layout
(model_index.json and a folder per part) or one component (config.json and weights side by side,
Gemma-2 with its tokenizer beside them).
"""

import pathlib

from sana_jax.checkpoints.read import STEMS, choose_variant, read_json, variants
from sana_jax.errors import CheckpointError, InputError, require_choice

PARTS = {  # part of a pipeline: the folders that belong to it
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "tokenizer"),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")  # never fetched or read unless named one by one


def names_in(folder):
    """Every file below a local folder, relative and with slashes."""
    folder = pathlib.Path(folder)
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def component_folders(names, source, part=None):
    """The folders that hold weights, "" for a component at the top level.

    Raises InputError: neither a pipeline nor a component, or no such part.
    """
    if part is not None:
        require_choice("part", part, tuple(PARTS))
    if "model_index.json" in names:
        return list(PARTS) if part is None else [part]
    if "config.json" in names:
        return [""]
    pickles = sorted(n for n in names if n.endswith(PICKLES))
    if pickles:
        raise InputError(
            f"{source}: has no weights in safetensors format, only pickles, which are read if they are named "
            f"one by one: {', '.join(f'hf://{source}/{n}' for n in pickles[:3])}{', ...' if pickles[3:] else ''}"
        )
    raise InputError(f"{source}: has neither model_index.json nor config.json, is no model in diffusers layout")


def small_files(names, source, part=None):
    """Configurations, tokenizer and weight indices: all that is read besides weights, sorted."""
    folders = component_folders(names, source, part)
    if folders == [""]:
        tokenizers, wanted = [""], ["config.json"]
    else:
        tokenizers = ["tokenizer/"] if "text_encoder" in folders else []
        wanted = ["model_index.json", *(f"{folder}/config.json" for folder in folders)]
        if part is None:
            wanted += ["sana_jax.json", "scheduler/scheduler_config.json"]
    for folder in tokenizers:
        wanted += [folder + name for name in TOKENIZER]
        if folder + "tokenizer.json" not in names:  # which the sentencepiece model only repeats
            wanted.append(folder + "tokenizer.model")
    return sorted(name for name in wanted if name in names)


def weight_index(names, folder, source, wanted=None, variant=None):
    """The one weight file, or the one index, of a component that a run reads.

    Args:
      names: all files of the model.
      folder: as `component_folders` gives it.
      wanted: a preferred dtype, see `choose_variant`.
      variant: the variant that must be there ("bf16", "fp16", ...); None leaves it to `wanted`.
    Raises InputError: no weights in safetensors format, or no such variant.
    """
    prefix = f"{folder}/" if folder else ""
    inside = {n.removeprefix(prefix) for n in names if n.startswith(prefix) and "/" not in n.removeprefix(prefix)}
    source = f"{source}: {folder}" if folder else source
    available = variants(inside)
    if not available and (pickles := sorted(n for n in inside if n.endswith(PICKLES))):
        raise InputError(f"{source}: only pickles ({', '.join(pickles[:3])}), need weights in safetensors format")
    if variant is None:
        variant = choose_variant(available, wanted, source=source)
    elif variant not in available:
        listed = ", ".join(sorted(v or "plain" for v in available)) or "none"
        raise InputError(f"{source}: variant={variant!r} is not there; variants here: {listed}")
    infix = f".{variant}" if variant else ""
    for stem in STEMS:  # the order of checkpoints.read.find_files
        for name in (f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors"):
            if name in inside:
                return prefix + name
    raise AssertionError(f"{variant} is among {available} and has no file")


def shards(index_path, index_name):
    """The weight files that an index names, relative to the model.  Raises InputError."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must be an object with a file for each tensor")
    folder = index_name.rpartition("/")[0]
    for shard in weight_map.values():  # a shard name never leads out of the folder
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: shard {shard!r} must be the plain name of a .safetensors file")
    return sorted(f"{folder}/{shard}".lstrip("/") for shard in set(weight_map.values()))


def files_read(folder, wanted=None, variant=None, part=None):
    """All files that a run reads of a local model folder (or of a part of it), relative, sorted.  Raises InputError."""
    folder = pathlib.Path(folder)
    names, source = names_in(folder), str(folder)
    found = small_files(names, source, part)
    for component in component_folders(names, source, part):
        name = weight_index(names, component, source, wanted, variant)
        found.append(name)
        if name.endswith(".json"):
            found += shards(folder / name, name)
    return sorted(found)
