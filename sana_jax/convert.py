"""Rewrites a checkpoint in another project's format, bit for bit.

    python -m sana_jax.convert SRC DIR [--to diffusers|nvlabs|efficientvit]

SRC is told by the names of its tensors: a pipeline folder, or one part (a folder, a .safetensors file,
or a pickled .pth, which is read as `checkpoints/pickles.py` says).  DIR must be new or empty and is
whole or absent in the end.  A transformer with --dc-ae and --text becomes a whole pipeline.
Exit status: 0, or 2 with one line that says what is wrong.
"""

import pathlib
import shutil
import sys
import warnings

from sana_jax import extras, memory, precision, saving
from sana_jax.checkpoints import dc_ae as dc_ae_format
from sana_jax.checkpoints import sana as sana_format
from sana_jax.checkpoints.read import read_json
from sana_jax.checkpoints.write import write_json
from sana_jax.components import open_weights, prepare_dc_ae, prepare_gemma2, prepare_sana
from sana_jax.cli.parser import Parser
from sana_jax.errors import InputError, require_choice, require_positive
from sana_jax.loading import find_model, prepare_pipeline

FORMATS = {  # what SRC can be: the formats that it is published in
    "pipeline": ("diffusers",),
    "transformer": ("diffusers", "nvlabs"),
    "autoencoder": ("diffusers", "efficientvit"),
    "text encoder": ("diffusers",),
}
STEMS = {"transformer": "diffusion_pytorch_model", "autoencoder": "diffusion_pytorch_model", "text encoder": "model"}


def is_transformer(header):
    return sana_format.is_nvlabs(header) or sana_format.is_diffusers(header)


def recognise(path, variant=None, entry="state_dict"):
    """(what a path is, a key of FORMATS; its open Checkpoint, None of a pipeline).  Raises InputError."""
    if (path / "model_index.json").is_file():
        return "pipeline", None
    checkpoint = open_weights(path, variant=variant, entry=entry)
    header = checkpoint.header
    if is_transformer(header):
        return "transformer", checkpoint
    if dc_ae_format.is_efficientvit(header) or any(n.startswith("decoder.up_blocks.") for n in header):
        return "autoencoder", checkpoint
    if {"embed_tokens.weight", "model.embed_tokens.weight"} & header.keys():
        return "text encoder", checkpoint
    checkpoint.close()
    names = ", ".join(list(header)[:3])
    raise InputError(f"{path}: neither a SANA transformer, a DC-AE, a Gemma-2 nor a pipeline; its tensors are {names}, ...")


def convert(
    source, target, *, to="diffusers", dtype="auto", dc_ae=None, text=None, size=None, cross_heads=None,
    variant=None, entry="state_dict", report=print,
):  # fmt: skip
    """Reads `source` and writes the folder `target`.

    Args:
      to: "diffusers", "nvlabs" (a transformer, as a .pth) or "efficientvit" (an autoencoder).
      dtype: "auto" keeps what is stored, of each part (where a part mixes dtypes: the widest).
      dc_ae, text: parts, see `loading.load_pipeline`; a pipeline is written.
      size: 512, 1024, 2048 or 4096 pixels, of a transformer whose file does not tell.
      cross_heads: of a transformer alone, of a width that was never published.
      variant, entry: see `components.load_sana`.
      report: is called with each line of what was read, left out and written.
    Raises:
      InputError, CheckpointError: nothing was written.
    """
    require_choice("to", to, sorted({name for names in FORMATS.values() for name in names}))
    if size is not None:
        require_choice("size", size, tuple(sana_format.SIZES))
    require_positive("cross_heads", cross_heads, none=True)
    if dtype != "auto":
        dtype = precision.parse(dtype)
    saving.require_new(target)  # before the work
    path = pathlib.Path(find_model(source, wanted=precision.short(dtype), variant=variant))
    kind, checkpoint = recognise(path, variant, entry)
    if dc_ae is not None or text is not None:
        if kind not in ("pipeline", "transformer"):
            raise InputError(f"{path}: is a DC-AE or a Gemma-2; dc_ae= and text= complete a transformer or a pipeline")
        kind = "pipeline"
    if to not in FORMATS[kind]:
        allowed = " or ".join(FORMATS[kind])
        raise InputError(f"to={to!r}: {path} ({kind}) can be written as {allowed}" + "; or convert its parts by themselves" * (kind == "pipeline"))
    fields = (sana_format.SIZES[size] if size else {}) | ({} if cross_heads is None else {"cross_heads": cross_heads})
    if fields and not (checkpoint is not None and is_transformer(checkpoint.header)):
        raise InputError(f"{', '.join(f'{k}={v!r}' for k, v in fields.items())}: {path} is no transformer alone")
    transformer = {"checkpoint": checkpoint, **fields}
    if kind == "pipeline":
        prepared, build = prepare_pipeline(
            path, dtype=dtype, variant=variant, dc_ae=dc_ae, text=text, as_stored=True, transformer=transformer
        )  # fmt: skip
    elif kind == "transformer":
        prepared = [prepare_sana(path, dtype=dtype, **transformer)]
    elif kind == "autoencoder":
        prepared = [prepare_dc_ae(path, checkpoint=checkpoint, dtype=dtype)]
    else:
        prepared = [prepare_gemma2(path, variant=variant, dtype=dtype)]
    for part in prepared:
        _say_what_is_read(part, report)
    memory.require_memory(sum(part.bytes_held() for part in prepared), source)
    with saving.new_folder(target) as folder:
        parts = [part.read_on_host() for part in prepared]
        if kind == "pipeline":
            saving.write_pipeline(build(*parts), folder)
            if (path / "model_index.json").is_file():
                _keep_sampler(path, folder)
                extras.write(folder, extras.read(path) | extras.read(folder))
        elif to == "diffusers":
            saving.save_component(folder, STEMS[kind], *parts[0])
        else:
            saving.save_original(folder, *parts[0])
    files = sorted(p for p in pathlib.Path(target).rglob("*") if p.is_file())
    for file in files:
        report(f"written: {file}, {file.stat().st_size / 1e6:.1f} MB")


def _keep_sampler(source, folder):
    """The pipeline class and the scheduler that a pipeline folder came with, in place of our own choice."""
    config = source / "scheduler" / "scheduler_config.json"
    index = read_json(source / "model_index.json")
    kept = {key: index[key] for key in ("_class_name", "scheduler") if key in index and config.is_file()}
    write_json(folder / "model_index.json", read_json(folder / "model_index.json") | kept)
    if config.is_file():
        shutil.copyfile(config, folder / "scheduler" / "scheduler_config.json")


def _say_what_is_read(part, report):
    checkpoint = part.checkpoint
    dtype = precision.short(part.module.param_dtype)
    stored = ", ".join(sorted(checkpoint.dtypes))
    report(f"read: {checkpoint.source}: {type(part.module).__name__}, {len(checkpoint.header)} tensors of {stored}, to {dtype}")
    for name in checkpoint.dropped:
        report(f"left out: {name}: {sana_format.NVLABS_DROPPED.get(name, 'no result depends on it')}")
    if checkpoint.ignored:
        report(f"left out: everything beside the weights: {', '.join(checkpoint.ignored)}")


def parse_arguments(argv):
    parser = Parser(prog="python -m sana_jax.convert", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SRC", help="pipeline folder, component folder, .safetensors or .pth; or a Hugging Face id")
    add("target", metavar="DIR", help="a folder that is not there yet, or empty")
    add("--to", default="diffusers", help="diffusers (default), nvlabs (a transformer) or efficientvit (an autoencoder)")
    add("--dtype", default="auto", help="fp32, bf16 or fp16; what is stored if left out")
    add("--dc-ae", metavar="X", help="autoencoder (folder or file), or a pipeline with one: makes a whole pipeline")
    add("--text", metavar="Y", help="Gemma-2 folder with its tokenizer, or a pipeline with one")
    add("--size", type=int, metavar="PIXELS", help="512, 1024, 2048 or 4096, where a transformer's file does not tell")
    add("--cross-heads", type=int, metavar="N", help="of a transformer of unpublished width, where a file does not tell")
    add("--variant", help="fp16, bf16, ...: which weight files of a folder")
    add("--entry", default="state_dict", help="of a .pth: where its weights are, e.g. state_dict_ema")
    return parser.parse_args(argv)


def main(argv=None):
    args = vars(parse_arguments(argv))
    warnings.showwarning = lambda message, *_, **__: print(f"sana_jax.convert: warning: {message}", file=sys.stderr)
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes alone are asked of it
    try:
        convert(args.pop("source"), args.pop("target"), **args)
    except InputError as error:
        print(f"sana_jax.convert: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
