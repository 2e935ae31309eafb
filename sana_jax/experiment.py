"""An experiment is one value: what is trained, on what, how, where.  `train.py` reads nothing else.

    config = load("configs/sana_1600m_512.py", ["workdir=runs/a", "--optim.lr=2e-5"])

A config file is Python that binds `config` to an `Experiment`; see `configs/`.  No device is touched
here, so that a mistake costs a second.
"""

import dataclasses
import pathlib
import re
import runpy
import traceback
from typing import Literal, Protocol, runtime_checkable

from sana_jax import experiment_checks
from sana_jax import overrides as dotted
from sana_jax.data import sources
from sana_jax.data.captions import Captions
from sana_jax.errors import InputError, nearest
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.training.distributed import Distributed
from sana_jax.training.objectives import Autoencoder, Flow, LanguageModel
from sana_jax.training.optimizer import CAME, AdamW, Muon

STAGE = experiment_checks.STAGE


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that says where records are; `open` gives the reader of them (docs/data.md)."""

    def open(self): ...


@dataclasses.dataclass(frozen=True)
class Data:
    """What the rows of a batch are made of.

    source: Folder, Tar, ArrayRecord, Cached, Synthetic or Shapes of `sana_jax.data`.
    batch: rows of the global batch.
    size: pixels of a side, or of a square of the same area where `buckets` is true.
    buckets: pictures keep the nearest of the published aspect ratios; or they become the nearest of sizes that are
      given, ((height, width), ...), and then `size` is that of pictures that do not tell theirs, and of previews.
    captions: how one of several captions is chosen.
    tokens: of a caption, BOS included.
    workers, threads: processes of a host that read and decode, and threads in each (or in the one).
    buffer: batches read ahead.
    bad_share: the run stops when more of the last `bad_window` records were bad.
    """

    source: Source
    batch: int
    size: int = 512
    buckets: bool | tuple[tuple[int, int], ...] = True
    captions: Captions = Captions()
    tokens: int = 300
    workers: int = 0
    threads: int = 4
    buffer: int = 4
    bad_share: float = 0.01
    bad_window: int = 10_000


@dataclasses.dataclass(frozen=True)
class Optim:
    """How parameters move.

    rule: AdamW(...), CAME(...) or Muon(...) of `training.optimizer`.
    lr, lr_rule, base_batch: the rate; "sqrt" multiplies it by sqrt(batch / base_batch), "linear" by the quotient.
    warmup: steps in which the rate rises from 0.
    decay: "constant", or "cosine" to 0 at the last step.
    clip: norm that gradients are clipped to.
    accumulate: parts that a batch is cut into, one after the other.
    ema: decay of the moving average of the parameters, None for none.
    freeze, no_decay: patterns of whole paths, whose parameters stay as they are, or have no weight decay.
    max_skips_in_row: steps with a loss or gradient that is not finite, before the run stops.
    """

    rule: AdamW | CAME | Muon
    lr: float = 1e-4
    lr_rule: Literal["none", "sqrt", "linear"] = "none"
    base_batch: int = 256
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip: float | None = 0.1
    accumulate: int = 1
    ema: float | None = None
    freeze: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ()
    max_skips_in_row: int = 3


@dataclasses.dataclass(frozen=True)
class Init:
    """Where the parameters of a new run come from; see `training.initialise`.

    weights: "" (the published random initialisation), a run's folder, or a published folder, file or name.
    ema: of a run with a moving average, take that.
    grow: keep the first `grow` blocks of a shallower model; the others begin as the identity.
    """

    weights: str = ""
    ema: bool = True
    grow: int | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What is used and not trained: folders, files or published names, "" for none.

    dc_ae: the autoencoder of live images, and of previews.
    text: the text encoder with its tokenizer, of live captions and of previews.
    chi: the instruction before every caption: "auto", "none" or a text, see `text.find_instruction`.
    """

    dc_ae: str = ""
    text: str = ""
    chi: str = "auto"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of `sharding.AXES`; -1 is what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Saved every so many steps; the newest `keep` stay, and every `keep_every`-th step."""

    every: int = 500
    keep: int = 3
    keep_every: int | None = None


@dataclasses.dataclass(frozen=True)
class Log:
    """A line every so many steps; `tensorboard` where it is installed."""

    every: int = 20
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Preview:
    """Pictures every so many steps, 0 for none; of the same prompts and noise each time."""

    every: int = 500
    prompts: tuple[str, ...] = ()
    size: int | None = None  # pixels; None is the data's
    steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reliability:
    """When to give up.

    hang_seconds: without a step, all stacks are printed; after twice that the run ends.
    stop_on_failed_save: a checkpoint that cannot be written ends the run, instead of a message.
    """

    hang_seconds: float = 1800.0
    stop_on_failed_save: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, or several `stages` in the folders `workdir`/name.

    `model` is a Linen module, `objective` a dataclass of `training.objectives`; the rest is above.
    """

    model: Sana | DCAE | Gemma2 | None = None
    objective: Flow | Autoencoder | LanguageModel | None = None
    data: Data | None = None
    optim: Optim | None = None
    steps: int = 0
    init: Init = Init()
    frozen: Frozen = Frozen()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    preview: Preview = Preview()
    reliability: Reliability = Reliability()
    distributed: Distributed = Distributed()
    seed: int = 0
    name: str = ""
    workdir: str = ""
    stages: tuple = ()


def load(path, arguments=(), *, run=False):
    """The Experiment of a config file with overrides such as "optim.lr=2e-5" or "--data.batch=64".

    Of one with stages, "flow.optim.lr=2e-5" is for the stage "flow", and "stage=flow" takes it alone.
    Args:
      run: it is going to be trained here: it needs a workdir, and its files must exist.
    Raises:
      InputError: all that is wrong, one problem a line.
    """
    config = read_file(path)
    order = [stage.name for stage in config.stages]
    values, problems = dotted.split(arguments)
    config, more = override(config, values)
    problems += more
    settled = []
    for stage in config.stages or (config,):
        lead = f"{stage.name}." if order else ""
        stage, more = dotted.settle(stage, lead)
        if not more:  # of values of the wrong kind nothing else can be said
            earlier = order[: order.index(stage.name)] if order else []
            more = [lead + line for line in experiment_checks.problems(stage, run, earlier)]
        problems += more
        settled.append(stage)
    config = dataclasses.replace(config, stages=tuple(settled)) if config.stages else settled[0]
    problems += experiment_checks.workdir(config.workdir) if run else []
    _raise(path, problems)
    return _with_folders(config)


def load_one(path, arguments=()):
    """`load` where one experiment is wanted: of several stages "stage=flow" chooses one.  Raises InputError."""
    config = load(path, arguments)
    if len(config.stages) > 1:
        raise InputError(f"{path}: has several stages; choose one with stage=NAME: {', '.join(s.name for s in config.stages)}")
    return config.stages[0] if config.stages else config


def read_file(path):
    """`config` of a Python file.  Raises InputError."""
    path = pathlib.Path(path)
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("*.py"))]
        raise InputError(f"{path}: no such config file{nearest(path, there)}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(_explain(path, error)) from error
    if not isinstance(config, Experiment):
        raise InputError(f"{path}: must bind `config` to an Experiment, is {type(config).__name__}")
    names = [stage.name if isinstance(stage, Experiment) else "" for stage in config.stages]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{path}: stages must be Experiments with names of their own, are {names}")
    return dataclasses.replace(config, name=config.name or path.stem)


def derived(file, base, changes):
    """The experiment of the config `base` beside `file` with {dotted name: value} in place of its own."""
    path = pathlib.Path(file).with_name(f"{base}.py")
    config, problems = override(dataclasses.replace(read_file(path), name=""), changes)
    _raise(f"changes of {path.name}", problems)
    return config


def override(config, values):
    """`overrides.override`, with stages by their names, and with a path, "data.source=DIR", for a source."""
    values, problems = dict(values), []
    for name in [name for name in values if f".{name}".endswith(".data.source")]:
        if isinstance(values[name], str):
            try:
                values[name] = sources.guess(values[name])
            except InputError as error:
                problems.append(f"{name}={error}")
                del values[name]
    if not config.stages:
        config, more = dotted.override(config, values)
        return config, problems + more
    stages = {stage.name: stage for stage in config.stages}
    chosen = values.pop("stage", None)
    if chosen is not None and chosen not in stages:
        problems.append(f"stage={chosen!r}: must be one of {', '.join(stages)}{nearest(chosen, stages)}")
    for name, value in values.items():
        stage, _, rest = name.partition(".")
        if stage in stages and rest:
            stages[stage], more = dotted.override(stages[stage], {rest: value})
        elif name == "workdir":
            config, more = dotted.override(config, {name: value})
        else:
            more = [f"{name}: begins with none of the stages {', '.join(stages)}{nearest(stage, stages)}"]
        problems += more
    kept = tuple(stage for name, stage in stages.items() if chosen in (None, name))
    return dataclasses.replace(config, stages=kept or config.stages), problems


def _with_folders(config):
    """Stages with workdirs, and "stage:name" replaced by the workdir of that stage."""
    def folder(text):
        return str(pathlib.Path(config.workdir, text.removeprefix(STAGE))) if text.startswith(STAGE) else text

    def placed(stage):
        frozen = {f.name: folder(getattr(stage.frozen, f.name)) for f in dataclasses.fields(Frozen)}
        return dataclasses.replace(
            stage,
            workdir=folder(STAGE + stage.name) if config.workdir else stage.workdir,
            init=dataclasses.replace(stage.init, weights=folder(stage.init.weights)),
            frozen=Frozen(**frozen),
        )

    return dataclasses.replace(config, stages=tuple(map(placed, config.stages)))


def _explain(path, error):
    """One line about what running a config file raised."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {error.msg}"
    frames = [(f, n) for f, n in traceback.walk_tb(error.__traceback__) if f.f_code.co_filename == str(path)]
    where = f"{path}, line {frames[-1][1]}" if frames else str(path)
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown and frames:
        name, field = unknown.groups()
        cls = frames[-1][0].f_globals.get(name) or globals().get(name)
        known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        return f"{where}: {name} has no field {field!r}{nearest(field, known)}"
    return f"{where}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _raise(where, problems):
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise InputError("\n  ".join([f"{where}: {count}", *problems]))


def describe(config):
    """The experiment as JSON values, for config.json."""
    return dotted.describe(config)


# What may be another when a run goes on; anything else makes it another run.
MAY_CHANGE = (
    r"(checkpoint|distributed|frozen|init|log|mesh|preview|reliability)\..*",
    r"name|steps|workdir",
    r"data\.(bad_share|bad_window|buffer|threads|workers)",
    r"data\.source\.path",  # a checkpoint knows the data by their fingerprint
    r"model\.(kernels|remat|scaling_factor|unroll)",  # what a loss does not see: an autoencoder's is measured behind it
    r"optim\.(accumulate|base_batch|clip|decay|lr|lr_rule|max_skips_in_row|no_decay|warmup)",
)


def changes(old, new):
    """What differs between the `describe` of the run in a folder and the experiment that goes on there.

    Returns:
      Lines for the log, "optim.lr: 0.0001 -> 2e-05".  A field that an older version did not know is no hindrance.
    Raises:
      InputError: a field that a run keeps for life, such as model, data.batch, data.source and seed.
    """
    old, new = dict(_leaves(old)), dict(_leaves(describe(new)))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    lines = {name: f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names}
    kept = [line for name, line in lines.items() if name in old and not any(re.fullmatch(p, name) for p in MAY_CHANGE)]
    if kept:
        raise InputError(
            "\n  ".join(["this run cannot go on with another value of", *kept])
            + "\n  Start a new one in another workdir; init.weights takes this one's parameters along."
        )
    return list(lines.values())


def _leaves(value, prefix=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value
