"""What is compared, and on which inputs; everything is a function of the command line alone."""

import dataclasses
import pathlib
import warnings

import jax.numpy as jnp
import numpy as np

from sana_jax import components, extras, schedulers, text
from sana_jax.checkpoints.read import read_json
from sana_jax.errors import InputError, require_choice, require_range
from sana_jax.pipeline import Pipeline, TextEncoder
from sana_jax.resolution import PATCH
from sana_jax.stacks import DIFFUSERS

PARTS = {  # folder -> what prepares its module and checkpoint
    "transformer": components.prepare_sana,
    "vae": components.prepare_dc_ae,
    "text_encoder": components.prepare_gemma2,
}
RUNGS = ("gemma", "block", "dit", "dc-ae", "solver", "pipeline")
SAMPLERS = {  # class of a scheduler folder -> the sampler of ours that follows it, its usual steps
    "DPMSolverMultistepScheduler": ("flow-dpm-solver", 20),
    "FlowMatchEulerDiscreteScheduler": ("flow-euler", 20),
    "SCMScheduler": ("scm", 2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the ladder.  `model` is ours to load, `reference` PyTorch's; often the same folder.

    `modules` are ours by folder name, without weights; `steps` and `size` are those of the picture.
    """

    model: pathlib.Path
    reference: pathlib.Path
    modules: dict
    stored: dict
    flow_shift: float | None
    scheduler: str
    instruction: text.Instruction
    prompt: str
    size: tuple
    steps: int
    rungs: tuple
    bfloat16: bool
    guidance: float = 4.5

    @property
    def sampler(self):
        return SAMPLERS[self.scheduler][0]

    @property
    def sprint(self):
        return self.modules["transformer"].guidance_embed

    @property
    def grid(self):
        return tuple(side // PATCH for side in self.size)

    def wants(self, *rungs):
        return any(rung in self.rungs for rung in rungs)

    def load(self, part, dtype=jnp.float32):
        """(module, params) of ours."""
        return PARTS[part](self.model / part, dtype=dtype, param_dtype=dtype).read()

    def pipeline(self, dtype=jnp.float32, **params):
        """A Pipeline of ours that holds only these parts' parameters, by folder name."""
        modules = {part: m.clone(dtype=dtype, param_dtype=dtype) for part, m in self.modules.items()}
        encoder = None
        if "text_encoder" in params:
            tokenizer = text.load_tokenizer(self.model / "tokenizer")
            encoder = TextEncoder(modules["text_encoder"], params["text_encoder"], tokenizer)
        parts = ((modules[part], params.get(part)) for part in ("transformer", "vae"))
        return Pipeline(*parts, encoder, stack="diffusers", flow_shift=self.flow_shift)

    # --- Inputs.  They do not depend on the model but for its widths.

    def noise(self, count, seed):
        channels = self.modules["transformer"].latent_channels
        return np.random.default_rng(seed).normal(size=(count, *self.grid, channels)).astype("f")

    def times(self):
        """t [3] of the whole-transformer lines, and the guidance input [3] of a SANA-Sprint."""
        if self.sprint:
            return np.float32([1.0, 0.5, 0.2]), np.float32([0.45, 0.1, 1.0])
        return np.float32([999, 499, 136]), None

    def picture(self):
        """[1 H W 3] in [-1, 1]: smooth colours, edges, and noise in one quarter."""
        height, width = self.size
        y, x = np.mgrid[0:height, 0:width].astype("f")
        waves = [np.sin(x / 23 + y / 37), np.cos(y / 11 - x / 53), np.sign(np.sin(x / 19) * np.sin(y / 29))]
        image = 0.8 * np.stack(waves, axis=-1)
        corner = image[: height // 2, : width // 2]
        corner += 0.2 * np.random.default_rng(5).uniform(-1, 1, corner.shape)
        return image[None].astype("f")


def find(model, revision=None):
    """The local folder of a path, a Hugging Face id or a short name; see `hub.download.find_model`."""
    from sana_jax.hub.download import find_model

    return find_model(model, revision)


def make(model, reference, *, prompt, size, steps, rungs, bfloat16):
    """The Case of two local pipeline folders.

    Raises InputError: no such folder, a structure that the two do not share, or a bad argument; headers
    of all weights are checked.
    """
    for folder in (model, reference):
        check_folder(folder)
    height, width = size
    for name, side in (("height", height), ("width", width)):
        require_range(f"size: {name}", side, 2 * PATCH, 4096)
        if side % PATCH:
            raise InputError(f"size: {name}={side}: must be a multiple of {PATCH}; nearest valid {max(2, round(side / PATCH)) * PATCH}")
    modules, stored = {}, {}
    for part, prepare in PARTS.items():
        prepared = prepare(model / part, dtype=jnp.float32, param_dtype=jnp.float32)
        modules[part], stored[part] = prepared.module, sorted(prepared.checkpoint.dtypes)
        if reference != model:
            theirs = prepare(reference / part, dtype=jnp.float32, param_dtype=jnp.float32).module
            require_same(part, prepared.module, theirs)
    scheduler = scheduler_class(reference)
    if (own := scheduler_class(model)) != scheduler:
        raise InputError(f"scheduler: _class_name is {own!r} in the model and {scheduler!r} in the reference")
    default = SAMPLERS[scheduler][1]
    steps = default if steps is None else steps
    require_range("steps", steps, 1, 1000)
    schedulers.check_pipeline_class(
        model / "model_index.json", read_json(model / "model_index.json")["_class_name"], modules["transformer"]
    )
    with warnings.catch_warnings():  # Case.sampler follows Euler
        warnings.filterwarnings("ignore", ".*these weights came with Euler")
        flow_shift = schedulers.read_flow_shift(model / "scheduler")
    return Case(
        model=model,
        reference=reference,
        modules=modules,
        stored=stored,
        flow_shift=flow_shift,
        scheduler=scheduler,
        instruction=text.find_instruction("auto", DIFFUSERS, extras.read(model).get("complex_human_instruction")),
        prompt=prompt,
        size=(height, width),
        steps=steps,
        rungs=rungs,
        bfloat16=bfloat16,
    )


def check_folder(folder):
    """Raises InputError unless `folder` is a pipeline in diffusers layout with all that is needed."""
    if folder.is_file():
        raise InputError(f"{folder}: is a file, must be a pipeline folder; python -m sana_jax.convert {folder} DIR --dc-ae X --text Y makes one")
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder}: has no model_index.json, is not a pipeline in diffusers layout")
    kind = read_json(index).get("_class_name")
    require_choice(f"{index}: _class_name", kind, tuple(schedulers.PIPELINES))
    for part in (*PARTS, "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: has no {part}/, which the comparison needs")


def scheduler_class(folder):
    """The class that a pipeline folder's scheduler names.  Raises InputError: one we cannot follow."""
    path = folder / "scheduler" / "scheduler_config.json"
    return require_choice(f"{path}: _class_name", read_json(path).get("_class_name"), tuple(SAMPLERS))


def require_same(part, ours, theirs):
    """Raises InputError where a field of the two modules differs."""
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in ("parent", "name") and pair[0] != pair[1]:
            raise InputError(f"{part}: {field.name} is {pair[0]!r} in the model and {pair[1]!r} in the reference: not one structure")
