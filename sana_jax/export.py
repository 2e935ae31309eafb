"""Writes what a run has learned as a folder that sample.py, diffusers and transformers read.

    python -m sana_jax.export RUN DIR [--raw] [--step N] [--dtype bf16] [--dc-ae X] [--text Y]
                              [--default guidance_scale=3 ...]

Of a flow run the folder is a whole pipeline: the transformer with the autoencoder and the text encoder
that it was trained with, and what a caller need not say, since the run does: the instruction, the
tokens of a prompt, steps and guidance scale of its previews, the words of its captions.  Of any other
run it is that component alone, a language model with its tokenizer.  DIR must be new or empty and is
whole or absent in the end.
Exit status: 0, or 2 with one line that says what is wrong.
"""

import json
import shutil
import sys
from typing import NamedTuple

import jax
import numpy as np

from sana_jax import extras, precision, saving
from sana_jax.cli.parser import Parser
from sana_jax.data import vocabulary
from sana_jax.errors import InputError
from sana_jax.experiment import Frozen
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.stacks import DIFFUSERS, NVLABS
from sana_jax.text import load_tokenizer
from sana_jax.training import frozen, initialise
from sana_jax.training.reading import DamagedError


def export(run_dir, target, *, ema=True, step=None, dtype="auto", dc_ae=None, text=None, default=()):
    """Writes the folder `target` from the run in `run_dir`.

    Args:
      ema: the moving average, of a run that keeps one; False is the parameters themselves.
      step: of a checkpoint; None is the newest.
      dtype: of the written weights; "auto" is that of the parameters, float32 as a rule.
      dc_ae, text: in place of the run's own `frozen.dc_ae` and `frozen.text`.
      default: "NAME=VALUE", fields of `extras` in place of the run's own.
    Raises:
      InputError: nothing was written.
    """
    saving.require_new(target)
    chosen = dict(map(_field, default))
    extras.check(chosen)
    if not initialise.is_run(run_dir):
        raise InputError(f"{run_dir}: is no folder of a run, it has no checkpoints/")
    config = initialise.run_config(run_dir)
    given = {name: str(path) for name, path in {"dc_ae": dc_ae, "text": text}.items() if path}
    kept = {name: config["frozen"][name] for name in ("dc_ae", "text", "chi")}
    run = Run(initialise.run_model(run_dir), Frozen(**kept | given), str(run_dir))
    trained = _cast(run.model, initialise.read_run(run_dir, ema, step), dtype)
    if isinstance(run.model, Sana):
        pipeline = _pipeline(run, trained, config["objective"], dtype)
        with saving.new_folder(target) as folder:
            saving.write_pipeline(pipeline, folder)
            extras.write(folder, extras.read(folder) | _said(run, config) | chosen)
        return
    if chosen:
        raise InputError(f"default={list(default)!r}: of a pipeline alone, and this run trains a {type(run.model).__name__}")
    with saving.new_folder(target) as folder:
        if isinstance(run.model, DCAE):
            saving.save_component(folder, "diffusion_pytorch_model", *trained)
        else:
            saving.save_component(folder, "model", *trained)
            tokenizer = frozen.tokenizer_folder(run)
            load_tokenizer(tokenizer).save_pretrained(folder)
            if (tokenizer / vocabulary.FILE).is_file():
                shutil.copyfile(tokenizer / vocabulary.FILE, folder / vocabulary.FILE)


def _field(text):
    """(name, value) of NAME=VALUE; a value is JSON, or a word."""
    name, _, value = text.partition("=")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def _said(run, config):
    """The fields of `extras` that a flow run decides."""
    preview, tokenizer = config.get("preview") or {}, frozen.tokenizer_folder(run)
    return {
        "max_sequence_length": (config.get("data") or {}).get("tokens"),
        "steps": preview.get("steps"),
        "guidance_scale": preview.get("guidance_scale"),
        "vocabulary": vocabulary.read_words(tokenizer) or _words_of_pipeline(tokenizer.parent),
    }


def _words_of_pipeline(folder):
    """The words in the sana_jax.json of a pipeline, whose tokenizer has none beside it; None where there are none."""
    return extras.read(folder).get("vocabulary") if (folder / "model_index.json").is_file() else None


class Run(NamedTuple):
    """Of an experiment, what says where its tokenizer is."""

    model: object
    frozen: Frozen
    workdir: str


def _pipeline(run, sana, objective, dtype):
    """The Pipeline that samples as the transformer was trained: prompts, masks and times as NVlabs has them.

    Where dropped captions had the mask of the empty one, so has the unconditional half: that is diffusers'
    stack, which differs by rounding otherwise (docs/numerics.md 1.5) and lower-cases prompts.
    """
    for name in ("dc_ae", "text"):
        if not getattr(run.frozen, name):
            raise InputError(f"frozen.{name}: the run names none; --{name.replace('_', '-')} says which goes with it")
    dc_ae = _cast(*_read(run.frozen.dc_ae, DCAE), dtype)
    gemma2 = _cast(*_read(run.frozen.text, Gemma2), dtype)
    encoder = TextEncoder(*gemma2, load_tokenizer(frozen.tokenizer_folder(run)), frozen.instruction(run))
    stack = DIFFUSERS if objective.get("dropped_mask") == "empty" else NVLABS
    return Pipeline(sana, dc_ae, encoder, stack=stack, flow_shift=objective["shift"])


def _read(source, cls):
    module, read = initialise.open_weights(source, cls)
    return module, read(None)


def _cast(module, params, dtype):
    if dtype == "auto":
        return module, params
    kind = precision.parse(dtype)
    return module.clone(dtype=kind, param_dtype=kind), jax.tree.map(lambda leaf: leaf.astype(np.dtype(kind)), params)


def parse_arguments(argv):
    parser = Parser(prog="python -m sana_jax.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="the workdir of a run")
    add("target", metavar="DIR", help="a folder that is not there yet, or empty")
    add("--raw", dest="ema", action="store_false", help="the parameters themselves, not their moving average")
    add("--step", type=int, metavar="N", help="of a checkpoint; the newest if left out")
    add("--dtype", default="auto", help="fp32, bf16 or fp16; that of the parameters if left out")
    add("--dc-ae", metavar="X", help="an autoencoder in place of the one that the run used, or if it used none")
    add("--text", metavar="Y", help="the same for the text encoder and its tokenizer")
    add("--default", action="append", default=[], metavar="NAME=VALUE",
        help=f"what holds where nobody says, in sana_jax.json: {', '.join(extras.CHECKS)}")
    return parser.parse_args(argv)


def main(argv=None):
    args = vars(parse_arguments(argv))
    jax.config.update("jax_platforms", "cpu")  # shapes alone are asked of it
    try:
        export(args.pop("run_dir"), args.pop("target"), **args)
    except (InputError, DamagedError) as error:
        print(f"sana_jax.export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
