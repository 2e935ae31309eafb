"""What can be said against an experiment before any device is asked: one line for each problem."""

import math
import pathlib
import re

import jax.numpy as jnp

from sana_jax.data.folder import Folder
from sana_jax.data.synthetic import Synthetic
from sana_jax.data.tar import Tar
from sana_jax.errors import InputError, nearest
from sana_jax.hub import names
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes
from sana_jax.resolution import PATCH
from sana_jax.training.objectives import Autoencoder, Flow, LanguageModel

LARGEST = 2**14  # pixels of a side
POSITIVE, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
RANGES = {  # field: (least, greatest); None is always fine where the annotation allows it
    "steps": (1, 2**31 - 1),
    "seed": (0, 2**31 - 1),
    "data.batch": (1, 2**20),
    "data.size": (1, LARGEST),
    "data.tokens": (2, 4096),
    "data.workers": (0, 1024),
    "data.threads": (1, 1024),
    "data.buffer": (1, 4096),
    "data.bad_share": (0, 1),
    "data.bad_window": (1, math.inf),
    "optim.lr": (POSITIVE, 1),
    "optim.base_batch": (1, math.inf),
    "optim.warmup": (0, math.inf),
    "optim.clip": (POSITIVE, math.inf),
    "optim.accumulate": (1, math.inf),
    "optim.ema": (0, BELOW_1),
    "optim.max_skips_in_row": (1, math.inf),
    "optim.rule.b1": (0, BELOW_1),
    "optim.rule.b2": (0, BELOW_1),
    "optim.rule.b3": (0, BELOW_1),
    "optim.rule.beta": (0, BELOW_1),
    "optim.rule.rms": (POSITIVE, math.inf),
    "optim.rule.weight_decay": (0, math.inf),
    "objective.shift": (POSITIVE, math.inf),
    "objective.logit_std": (POSITIVE, math.inf),
    "objective.caption_dropout": (0, 1),
    "objective.recall": (0, math.inf),
    "objective.scaling_factor": (POSITIVE, math.inf),
    "objective.l1": (0, math.inf),
    "objective.ssim": (0, math.inf),
    "objective.lpips": (0, math.inf),
    "init.grow": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "checkpoint.keep_every": (1, math.inf),
    "log.every": (1, math.inf),
    "preview.every": (0, math.inf),
    "preview.size": (1, LARGEST),
    "preview.steps": (1, 1000),
    "preview.seed": (0, 2**31 - 1),
    "reliability.hang_seconds": (POSITIVE, math.inf),
}
MODELS = {Flow: Sana, Autoencoder: DCAE, LanguageModel: Gemma2}
BUCKETED = (512, 1024, 2048, 4096)  # pixels that `resolution.bins` knows
STAGE = "stage:"  # before the name of a stage, stands for the folder of its run


def problems(config, run, earlier=()):
    """All problems of one experiment, or of one stage.

    Args:
      run: files must exist, see `experiment.load`.
      earlier: names of the stages before it.
    """
    if needed := [name for name in ("model", "objective", "data", "optim") if getattr(config, name) is None]:
        return [f"{name}: is not given" for name in needed]
    found = [*_ranges(config), *_mesh(config), *_batch(config), *_model(config), *_start(config), *_needs(config)]
    return found + list(_files(config, run, earlier))


def workdir(path):
    """What is wrong with the folder of a run."""
    if not path:
        return ["workdir: is not given; workdir=runs/NAME says where the run is kept"]
    return [f"workdir={path!r}: is a file, must be a folder or a new name"] if pathlib.Path(path).is_file() else []


def _ranges(config):
    for name, (low, high) in RANGES.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None and not low <= value <= high:
            least = "more than 0" if low is POSITIVE else f"at least {low}"
            yield f"{name}={value!r}: must be {least}" + (f" and at most {high}" if high < math.inf else "")


def _mesh(config):
    axes = {name: getattr(config.mesh, name) for name in ("data", "fsdp", "tensor")}
    for name, size in axes.items():
        if size != -1 and size < 1:
            yield f"mesh.{name}={size}: must be at least 1, or -1 for what is left"
    if list(axes.values()).count(-1) > 1:
        yield f"mesh: only one of {', '.join(f'{n}={s}' for n, s in axes.items())} can be what is left"


def _batch(config):
    data, cut = config.data, config.optim.accumulate
    if data.batch >= 1 and cut >= 1 and data.batch % cut:
        yield f"optim.accumulate={cut}: must divide data.batch={data.batch}"
    if isinstance(config.objective, LanguageModel):
        return  # no pictures
    sizes = [data.size] if data.size else []
    step = config.model.compression if isinstance(config.model, DCAE) else PATCH
    sizes += [config.preview.size] if config.preview.size else []
    for name, size in zip(("data.size", "preview.size"), sizes):
        if size % step:
            yield f"{name}={size}: must be a multiple of {step}, the pixels of a latent; nearest {_near_multiple(size, step)}"
    if data.buckets is True and data.size not in BUCKETED:
        yield (
            f"data.buckets=True: aspect ratios are published for data.size of {', '.join(map(str, BUCKETED))}, "
            f"not {data.size}; data.buckets=false takes squares, ((height, width), ...) sizes of your own"
        )
    if isinstance(data.buckets, tuple):
        if not data.buckets or len(set(data.buckets)) < len(data.buckets):
            yield f"data.buckets={data.buckets!r}: must be false, true, or different sizes, ((height, width), ...)"
        for side in sorted({side for shape in data.buckets for side in shape}):
            if not 0 < side <= LARGEST or side % step:
                near = _near_multiple(min(side, LARGEST), step)
                yield f"data.buckets: side {side}: must be a multiple of {step}, the pixels of a latent, up to {LARGEST}; nearest {near}"


def _near_multiple(size, step):
    return max(step, round(size / step) * step)


def _model(config):
    model, objective = config.model, config.objective
    if not isinstance(objective, tuple(MODELS)):
        yield f"objective: is a {type(objective).__name__}, must be one of {', '.join(o.__name__ for o in MODELS)}"
    elif not isinstance(model, kind := next(model for own, model in MODELS.items() if isinstance(objective, own))):
        wanted = kind.__name__
        yield f"objective: {type(objective).__name__} trains a {wanted}, model is a {type(model).__name__}"
    elif isinstance(objective, LanguageModel) and objective.recall >= model.width:
        yield f"objective.recall={objective.recall}: must be less than model.width={model.width}"
    if jnp.dtype(model.param_dtype) != jnp.float32:
        yield f"model.param_dtype={jnp.dtype(model.param_dtype).name}: must be float32, small updates are lost in less; dtype is what computes"
    try:
        paths = list(parameter_shapes(model))
    except InputError as error:
        yield f"model.{error}"
        return
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        yield f"model: cannot be built: {str(error).partition(chr(10))[0]}"
        return
    for field in ("freeze", "no_decay"):
        for pattern in getattr(config.optim, field):
            try:
                if not any(re.fullmatch(pattern, path) for path in paths):
                    yield f"optim.{field}: {pattern!r} matches no parameter{nearest(pattern, paths)}"
            except re.error as error:
                yield f"optim.{field}: {pattern!r} is no pattern ({error})"
    frozen = [any(re.fullmatch(p, path) for p in config.optim.freeze if _is_pattern(p)) for path in paths]
    if all(frozen):
        yield "optim.freeze: leaves nothing to train"


def _is_pattern(text):
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def _start(config):
    init, depth = config.init, getattr(config.model, "depth", None)
    if init.grow is not None:
        if not isinstance(config.model, Sana):
            yield f"init.grow={init.grow}: only a Sana grows, model is a {type(config.model).__name__}"
        elif init.grow >= depth:
            yield f"init.grow={init.grow}: must be less than model.depth={depth}"
        if not init.weights:
            yield f"init.grow={init.grow}: needs init.weights to grow from"
    for i, prompt in enumerate(config.preview.prompts):
        if not prompt.strip():
            yield f"preview.prompts[{i}]={prompt!r}: is empty"


def _needs(config):
    """The networks that are not trained, where it is certain that they are needed."""
    if not isinstance(config.objective, Flow):
        return
    source = config.data.source
    live = isinstance(source, (Folder, Tar, Synthetic)) and not getattr(source, "features", False)
    seen = config.preview.every > 0
    needs = {"dc_ae": (live, seen), "text": (live, seen and config.preview.prompts)}
    for name, (data, preview) in needs.items():
        if (data or preview) and not getattr(config.frozen, name):
            why = "data.source has none of its features" if data else "previews need it; preview.every=0 for none"
            yield f"frozen.{name}: is not given, and {why}"


def _files(config, run, earlier):
    frozen = config.frozen
    models = {"init.weights": config.init.weights, "frozen.dc_ae": frozen.dc_ae, "frozen.text": frozen.text}
    for name, text in models.items():
        if text.startswith(STAGE):
            if text.removeprefix(STAGE) not in earlier:
                words = ", ".join(earlier) or "of which there is none"
                yield f"{name}={text!r}: must name one of the stages before this one, {words}"
        elif run and text and not pathlib.Path(text).exists():
            try:
                names.parse(text)
            except InputError as error:
                yield f"{name}={text!r}: {str(error).partition(': ')[2]}"
    if run:
        files = {"data.source.path": getattr(config.data.source, "path", "")}
        files["objective.lpips_weights"] = getattr(config.objective, "lpips_weights", "")
        for name, text in files.items():
            if text and not pathlib.Path(text).exists():
                yield f"{name}={str(text)!r}: no such file or folder"
