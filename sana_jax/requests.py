"""What a caller may ask of a pipeline: every rule is checked here, before any device work.

`check_request` holds the rules that no model changes, `plan` those that depend on one.
"""

import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np

from sana_jax.errors import InputError, require_choice, require_range
from sana_jax.programs import SAMPLERS, Perturbation
from sana_jax.resolution import PATCH, check_size
from sana_jax.sampling import scm

OUTPUTS = ("uint8", "float", "latent")
EVERYWHERE = (0.0, 1.0)
STRENGTH = 0.6  # of img2img, as diffusers has it


def defaults(module):
    """What holds of `generate` where neither the caller nor the folder of `module`, a Sana, says: as published."""
    return {"steps": 2 if module.guidance_embed else 20, "guidance_scale": 4.5, "max_sequence_length": 300}


def filled(arguments, own):
    """The arguments with a model's `own` defaults where they are None."""
    return arguments | {name: own[name] for name in own.keys() & arguments.keys() if arguments[name] is None}


def strings(field, value):
    """str or list of str -> list of str; raises InputError naming the entry."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"{field}={value!r}: must be a string or a non-empty list of strings")
    for i, entry in enumerate(values):
        if not isinstance(entry, str):
            raise InputError(f"{field}[{i}]={entry!r}: must be a string, is {type(entry).__name__}")
    return list(values)


def _check_interval(value):
    if len(np.shape(value)) != 1 or len(value) != 2:
        raise InputError(f"guidance_interval={value!r}: must be two numbers, (low, high)")
    require_range("guidance_interval[0]", value[0], 0, 1, float)
    require_range("guidance_interval[1]", value[1], value[0], 1, float)


def _check_layers(value):
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"pag_layers={value!r}: must be a non-empty list of layers, counted from 0")
    for i, layer in enumerate(value):
        require_range(f"pag_layers[{i}]", layer, 0, 999)


def _check_strength(value):
    require_range("strength", value, 0, 1, float)
    if value == 0:
        raise InputError("strength=0: leaves the image as it is and nothing to paint; must be more, up to 1")


def _check_image(value):
    array = np.asarray(value)
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"image: shape {array.shape}, must be [H, W, 3] or [images, H, W, 3]")
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if array.dtype != np.uint8 and not floating:
        raise InputError(f"image: {array.dtype}, must be uint8 or floating point in [0, 1]")
    if floating and not ((array >= 0) & (array <= 1)).all():
        raise InputError("image: floating point must be in [0, 1], is not everywhere; x / 2 + 0.5 for [-1, 1]")


def _check_on_step(value):
    if not callable(value):
        raise InputError(f"on_step={value!r}: must be a function of (step, steps)")


def _check_first_image(value):
    for number in value if isinstance(value, (list, tuple)) else [value]:
        require_range("first_image", number, 0, 2**31)


def image_numbers(first_image, count):
    """[count] numbers of images: from first_image on, or the very numbers that it lists.  Raises InputError."""
    if not isinstance(first_image, (list, tuple)):
        return np.arange(first_image, first_image + count)
    if len(first_image) != count:
        raise InputError(f"first_image: lists {len(first_image)} numbers for {count} images")
    return np.asarray(first_image)


def _unless_none(check):
    return lambda value: value is None or check(value)


CHECKS = {  # arguments of `generate` whose rule does not depend on the model
    "steps": _unless_none(lambda v: require_range("steps", v, 1, 1000)),
    "guidance_scale": _unless_none(lambda v: require_range("guidance_scale", v, 0, 100, float)),
    "num_images": lambda v: require_range("num_images", v, 1, 4096),
    "seed": lambda v: require_range("seed", v, 0, 2**32 - 1),
    "first_image": _check_first_image,
    "sampler": _unless_none(lambda v: require_choice("sampler", v, tuple(SAMPLERS))),
    "flow_shift": _unless_none(lambda v: require_range("flow_shift", v, 0.01, 100, float)),
    "max_sequence_length": _unless_none(lambda v: require_range("max_sequence_length", v, 2, 4096)),
    "output": lambda v: require_choice("output", v, OUTPUTS),
    "bin_resolution": lambda v: require_choice("bin_resolution", v, (True, False)),
    "guidance_interval": _check_interval,
    "height": _unless_none(lambda v: check_size(v, PATCH)),
    "width": _unless_none(lambda v: check_size(PATCH, v)),
    "pag_scale": lambda v: require_range("pag_scale", v, 0, 100, float),
    "pag_layers": _unless_none(_check_layers),
    "pag_adaptive_scale": lambda v: require_range("pag_adaptive_scale", v, 0, 100, float),
    "image": _unless_none(_check_image),
    "strength": _unless_none(_check_strength),
    "on_step": _unless_none(_check_on_step),
}


def check_request(**arguments):
    """Raises InputError for any of these arguments of `generate` that is wrong for every model."""
    for name, value in arguments.items():
        CHECKS[name](value)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one model samples: `traced` and `static` are the arguments of `programs.denoise`."""

    traced: tuple
    static: dict

    @property
    def steps(self):
        """Network evaluations that remain, fewer than asked for behind an image."""
        return len(self.traced[0].t)


def plan(
    module, stack, default_shift, *, sampler, steps, guidance_scale, guidance_interval, flow_shift,
    pag_scale, pag_layers, pag_adaptive_scale, strength=None, guided=False,
):  # fmt: skip
    """The `Plan` of these arguments of `generate`, which `check_request` has passed and `filled` completed.

    Args:
      module, stack: the Sana and the Stack that it follows.
      default_shift: the flow shift where `flow_shift` is None.
      strength: of an image to begin with, or None without one.
      guided: whether there is something to guide away from; a scale up to 1 still means no guidance.
    Raises:
      InputError: what this model cannot do.
    """
    sprint = module.guidance_embed
    sampler = sampler or ("scm" if sprint else "flow-dpm-solver")
    if sprint and sampler != "scm":
        raise InputError(f"sampler={sampler!r}: this is a SANA-Sprint transformer, which only 'scm' samples")
    if sampler == "scm" and not sprint:
        others = " or ".join(repr(name) for name in SAMPLERS if name != "scm")
        raise InputError(f"sampler='scm': only samples SANA-Sprint transformers; this one takes {others}")
    interval = tuple(float(edge) for edge in guidance_interval)
    if sprint:
        for name, value, plain in (
            ("flow_shift", flow_shift, None), ("guidance_interval", interval, EVERYWHERE), ("pag_scale", pag_scale, 0)
        ):  # fmt: skip
            if value != plain:
                raise InputError(f"{name}={value!r}: has no meaning for SANA-Sprint; leave it out")
    if strength is not None and not sprint:
        raise InputError(f"image: only sampler='scm' of SANA-Sprint begins with an image, not {sampler!r}")
    if sampler == "scm":
        schedule = scm.schedule(steps, scm.first_step(steps, 1.0 if strength is None else strength))
    else:
        schedule = SAMPLERS[sampler][0](steps, default_shift if flow_shift is None else float(flow_shift))
    pag = _perturbation(module, stack, pag_scale, pag_layers, pag_adaptive_scale)
    low, high = interval
    open_interval = np.float32(low), np.float32(high if high < 1 else np.inf)  # Euler begins at 1 itself
    traced = schedule, np.float32(guidance_scale), open_interval, pag
    guided = guided and not sprint and guidance_scale > 1
    limited = interval != EVERYWHERE and (guided or pag is not None)
    return Plan(traced, {"sampler": sampler, "guided": guided, "limited": limited})


def _perturbation(module, stack, scale, layers, decay):
    """The `Perturbation` of these pag_* arguments, or None.  Raises InputError, warns where none acts."""
    if scale == 0:
        for name, value in (("pag_layers", layers), ("pag_adaptive_scale", decay or None)):
            if value is not None:
                raise InputError(f"{name}={value!r}: acts only with pag_scale, which is 0")
        return None
    if scale <= stack.pag_above:
        problem = f"stack {stack.name!r} perturbs above {stack.pag_above:g} only; no layer is perturbed"
        warnings.warn(f"pag_scale={scale}: {problem}", stacklevel=5)
        return None
    layers = stack.pag_layers if layers is None else tuple(layers)
    if max(layers) >= module.depth:
        raise InputError(f"pag_layers={layers}: this transformer has layers 0 to {module.depth - 1}")
    chosen = np.isin(np.arange(module.depth), layers)
    return Perturbation(np.float32(scale), chosen, np.float32(decay))


def numbers(field, value, shape, words):
    """A finite float32 array of this shape, in which None is any length.  Raises InputError."""
    try:
        array = jnp.asarray(value, jnp.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field}: must be an array of numbers, is a {type(value).__name__}") from error
    if array.ndim != len(shape) or any(want not in (None, have) for have, want in zip(array.shape, shape)):
        shown = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"{field}: shape {array.shape}, must be ({shown}) = {words}")
    if not bool(jnp.isfinite(array).all()):
        raise InputError(f"{field}: must be finite, hold NaN or infinity")
    return array


def caption(prefix, states, mask, width, like=None):
    """(states [b m d], mask [b m] bool), one caption repeated for all of `like`.  Raises InputError."""
    states, mask = jnp.asarray(states), jnp.asarray(mask)
    if states.ndim != 3 or states.shape[-1] != width:
        raise InputError(f"{prefix}states: shape {states.shape}, must be [batch, tokens, {width}]")
    if like is not None and states.shape[0] == 1:
        states = jnp.repeat(states, like.shape[0], axis=0)
    if like is not None and states.shape != like.shape:
        raise InputError(f"{prefix}states: shape {states.shape}, must be {like.shape} like states, or one of the batch")
    if mask.ndim == 2 and mask.shape[0] == 1:
        mask = jnp.repeat(mask, states.shape[0], axis=0)
    if mask.shape != states.shape[:2]:
        raise InputError(f"{prefix}mask: shape {mask.shape}, must be {states.shape[:2]} = [batch, tokens]")
    return states, mask.astype(bool)
