"""Prompt to picture.

    prompt --tokenize--> ids --Gemma2--> states
    seed --normal, one key per image--> x_1
    x_0 = flow_dpm_solver(classifier_free(sana.velocity), x_1)      one scan
    image = resize(dc_ae.decode(x_0 / s))                           one jit with the line above

Shapes: b images, m caption tokens, d channels of the text encoder, h w latent grid, H W pixels.
"""

import dataclasses
import functools
import warnings

import jax.numpy as jnp
import numpy as np

from sana_jax import diagnose, programs, text
from sana_jax.errors import InputError, require_choice, require_range
from sana_jax.models.gemma2 import Gemma2
from sana_jax.programs import SAMPLERS
from sana_jax.resolution import PATCH, check_size, painted_size
from sana_jax.stacks import STACKS, Stack

OUTPUTS = ("uint8", "float", "latent")
EVERYWHERE = (0.0, 1.0)
REMEMBERED = 8  # encoded texts, a megabyte or two each


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A Gemma-2 with its parameters and tokenizer, and the instruction that came with the weights."""

    gemma2: Gemma2
    params: dict
    tokenizer: object
    instruction: str | None = None


def _strings(field, value):
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


CHECKS = {  # arguments of `generate` whose rule does not depend on the model
    "steps": lambda v: require_range("steps", v, 1, 1000),
    "guidance_scale": lambda v: require_range("guidance_scale", v, 0, 100, float),
    "num_images": lambda v: require_range("num_images", v, 1, 4096),
    "seed": lambda v: require_range("seed", v, 0, 2**32 - 1),
    "first_image": lambda v: require_range("first_image", v, 0, 2**31),
    "sampler": lambda v: require_choice("sampler", v, tuple(SAMPLERS)),
    "flow_shift": lambda v: v is None or require_range("flow_shift", v, 0.01, 100, float),
    "max_sequence_length": lambda v: require_range("max_sequence_length", v, 2, 4096),
    "output": lambda v: require_choice("output", v, OUTPUTS),
    "bin_resolution": lambda v: require_choice("bin_resolution", v, (True, False)),
    "guidance_interval": _check_interval,
    "height": lambda v: v is None or check_size(v, PATCH),
    "width": lambda v: v is None or check_size(PATCH, v),
}


def check_request(**arguments):
    """Raises InputError for any of these arguments of `generate` that is wrong for every model."""
    for name, value in arguments.items():
        CHECKS[name](value)


class Pipeline:
    """A transformer, an autoencoder and a text encoder, with the habits of one inference stack.

    Attributes:
      sana, dc_ae: (module, params).
      text: a `TextEncoder` (or the tuple of its fields), or None: then `generate` and `encode_prompt` are not available.
      stack: a `Stack`; its fields are set on `sana`.
      flow_shift: the default of `generate`.
    """

    def __init__(self, sana, dc_ae, text=None, stack="diffusers", *, flow_shift=None):
        """Args: as the attributes; `stack` may be a name.  The stack's flow shift comes first, then
        `flow_shift`, which is the checkpoint's, then the published 3, or 6 at 4K."""
        if not isinstance(stack, Stack):
            stack = STACKS[require_choice("stack", stack, tuple(STACKS))]
        if isinstance(text, tuple):
            text = TextEncoder(*text)
        module, params = sana
        if module.guidance_embed:
            raise InputError("guidance_embed=True: this is a SANA-Sprint transformer, which Flow-DPM-Solver does not sample")
        if module.latent_channels != dc_ae[0].latent_channels:
            raise InputError(
                f"latent_channels={module.latent_channels} of the transformer and "
                f"{dc_ae[0].latent_channels} of the autoencoder differ: they do not belong together"
            )
        if text is not None and text.gemma2.width != module.caption_width:
            raise InputError(
                f"caption_width={module.caption_width} of the transformer and width "
                f"{text.gemma2.width} of the text encoder differ: they do not belong together"
            )
        self.sana = module.clone(**stack.sana_fields()), params
        self.dc_ae, self.text, self.stack = dc_ae, text, stack
        published = 6.0 if module.sample_size >= 128 else 3.0
        self.flow_shift = float(stack.flow_shift or flow_shift or published)
        self._prefixes, self._texts = {}, {}  # what the text encoder made of recent tokens

    def save(self, folder):
        """Writes the folder that `load_pipeline` and diffusers read; see `saving.save_pipeline`."""
        from sana_jax.saving import save_pipeline

        save_pipeline(self, folder)

    def instruction(self, chi="auto"):
        """The `text.Instruction` that prompts get: chi is "auto", "none" or the joined text.

        Warns where "auto" finds only the words that stand in for the published ones.
        """
        found = text.find_instruction(chi, self.stack, self._text_encoder().instruction)
        if found.text == text.OWN_WORDS:
            warnings.warn(f"instruction: {found.source}; pictures differ from the published ones", stacklevel=3)
        return found

    def _text_encoder(self):
        if self.text is None:
            raise InputError("text=None: this pipeline has no text encoder; use denoise and decode, or pass text=")
        return self.text

    def encode_prompt(self, prompts, *, chi="auto", max_sequence_length=300):
        """Text encoder states of prompts, positive ones: a negative prompt takes chi="none".

        Args:
          prompts: str or list of b str.
          chi: "auto", "none" or the joined instruction; the prompt follows it with nothing between.
          max_sequence_length: m; longer prompts are cut, with a warning.
        Returns:
          (states [b m d], mask [b m] bool).
        Raises:
          InputError: no text encoder, or a bad argument.  NonFiniteError: names the first bad layer.
        """
        check_request(max_sequence_length=max_sequence_length)
        tokens = self._tokenize(_strings("prompts", prompts), self.instruction(chi).text, max_sequence_length)
        return self._states(tokens), jnp.asarray(tokens.selected_mask)

    def _tokenize(self, prompts, instruction, length):
        prompts = [text.clean(prompt, self.stack) for prompt in prompts]
        return text.tokenize(self._text_encoder().tokenizer, prompts, instruction, length)

    def _states(self, tokens):
        """Selected states of the text encoder; the last few texts and instructions are remembered."""
        key = tokens.ids.tobytes(), tokens.mask.tobytes(), tokens.selection.tobytes()
        if key in self._texts:
            return self._texts[key]
        encoder, prefix, rest = self._text_encoder(), None, tokens
        module, params = encoder.gemma2, encoder.params
        head, behind = text.split_instruction(tokens) or (np.zeros((1, 0)), None)
        if head.shape[1] > 1:
            rest, start = behind, head.tobytes()
            if start not in self._prefixes:
                self._prefixes = {start: programs.prefix_program(params, head, gemma2=module)}
            prefix = self._prefixes[start]
        states, finite = programs.text_program(
            params, rest.ids, rest.mask, rest.selection, prefix, gemma2=module
        )
        if not finite:
            diagnose.explain_text(module, params, tokens.ids, tokens.mask)
        self._texts = dict(list(self._texts.items())[-REMEMBERED + 1 :]) | {key: states}
        return states

    def denoise(
        self, states, mask, negative_states=None, negative_mask=None, latents=None, *, steps=20,
        guidance_scale=4.5, sampler="flow-dpm-solver", flow_shift=None, guidance_interval=EVERYWHERE,
    ):  # fmt: skip
        """Noise to latents.

        Args:
          states, mask: [b m d], [b m] bool of the prompts.
          negative_states, negative_mask: the same for the unconditional half, one for all or one for
            each; without states there is no guidance, without a mask, and always in the stack
            "nvlabs", the prompts' own mask is used.
          latents: [b h w c], the noise.
          steps, guidance_scale, sampler, flow_shift, guidance_interval: as in `generate`.
        Returns:
          [b h w c] float32 in model space.
        Raises:
          InputError: a bad argument.  NonFiniteError: names the first bad block.
        """
        check_request(
            steps=steps, guidance_scale=guidance_scale, sampler=sampler, flow_shift=flow_shift,
            guidance_interval=guidance_interval,
        )  # fmt: skip
        module, params = self.sana
        if latents is None:
            raise InputError("latents=None: denoise needs the noise, [b h w c]")
        states, mask = self._caption("", states, mask)
        guided = guidance_scale > 1 and negative_states is not None
        conditions = states, mask, None, None
        if guided:
            if negative_mask is None or self.stack.negative_uses_prompt_mask:
                negative_mask = mask
            conditions = states, mask, *self._caption("negative_", negative_states, negative_mask, like=states)
        latents = self._latents(latents, states.shape[0])
        arguments, static = self._arguments(steps, guidance_scale, sampler, flow_shift, guidance_interval, guided)
        out = programs.denoise_program(params, conditions, latents, *arguments, sana=module, **static)
        if not bool(jnp.isfinite(out).all()):
            diagnose.explain_denoise(module, params, programs.denoise, (conditions, latents, *arguments), static)
        return out

    def _caption(self, prefix, states, mask, like=None):
        """(states [b m d], mask [b m] bool), one caption repeated for all of `like`.  Raises InputError."""
        width = self.sana[0].caption_width
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

    def _arguments(self, steps, scale, sampler, flow_shift, interval, guided):
        shift = self.flow_shift if flow_shift is None else float(flow_shift)
        schedule = SAMPLERS[sampler][0](steps, shift)
        limited = tuple(interval) != EVERYWHERE
        traced = schedule, np.float32(scale), tuple(np.float32(e) for e in interval)
        return traced, {"sampler": sampler, "guided": guided, "limited": limited}

    def _latents(self, latents, count=None, grid=None):
        """The given latents as float32 [count, *grid, c]; None is any.  Raises InputError."""
        try:
            latents = jnp.asarray(latents, jnp.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"latents: must be an array of numbers, is a {type(latents).__name__}") from error
        given = latents.shape if latents.ndim == 4 else ("b", "h", "w", None)
        shape = (given[0] if count is None else count, *(grid or given[1:3]), self.sana[0].latent_channels)
        if latents.shape != shape:
            raise InputError(f"latents: shape {latents.shape}, must be {shape} = [images, height / 32, width / 32, channels]")
        if not bool(jnp.isfinite(latents).all()):
            raise InputError("latents: must be finite, hold NaN or infinity")
        return latents

    def decode(self, latents):
        """Model-space latents [b h w c] -> images [b H W 3] float32, clipped to [-1, 1].

        Raises InputError: wrong shape, or not finite.  NonFiniteError: names the first bad layer.
        """
        module, params = self.dc_ae
        latents = self._latents(latents)
        images, finite = programs.decode_program(params, latents, dc_ae=module)
        if not finite:
            diagnose.explain_decode(module, params, functools.partial(programs.decode, module), latents)
        return images

    def encode(self, images):
        """Images [b H W 3] in [-1, 1] -> model-space latents [b h w c] float32.

        Raises InputError: not floating point in [-1, 1], or H or W not a multiple of 32.
        """
        module, params = self.dc_ae
        images = jnp.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating) or not bool((jnp.abs(images) <= 1).all()):
            raise InputError(f"images: {images.dtype}, must be floating point in [-1, 1]: x / 127.5 - 1 for uint8")
        return programs.encode_program(params, images, dc_ae=module)

    def generate(
        self, prompts, *, negative_prompts="", height=None, width=None, steps=20, guidance_scale=4.5,
        num_images=1, seed=0, latents=None, sampler="flow-dpm-solver", flow_shift=None, chi="auto",
        max_sequence_length=300, bin_resolution=True, output="uint8", guidance_interval=EVERYWHERE,
        first_image=0,
    ):  # fmt: skip
        """Pictures of prompts.

        Args:
          prompts: str or list of str.
          negative_prompts: str for all, or one for each prompt; never gets an instruction.
          height, width: pixels; None is the size that the model was trained on.
          steps: network evaluations per image (two halves each, with guidance).
          guidance_scale: w in v_u + w (v_c - v_u); up to 1 means no guidance and half the work.
          num_images: per prompt.
          seed: image i of the call starts from noise keyed (seed, first_image + i), whatever the batch.
          latents: [b h w c], the noise itself, at the painted size, in place of `seed`.
          sampler: "flow-dpm-solver" (second order) or "flow-euler".
          flow_shift: None is the checkpoint's.
          chi: the instruction before each prompt: "auto", "none" or its joined text.
          max_sequence_length: prompt tokens that the transformer sees; the rest is cut.
          bin_resolution: paint at the published size of the nearest aspect ratio, then resize and
            crop; else height and width must be multiples of 32.
          output: "uint8" [b H W 3]; "float", the same in [0, 1]; "latent" [b h w c] in model space.
          guidance_interval: noise levels (low, high) between which guidance acts.
          first_image: lets one long job be cut into several calls.
        Returns:
          A numpy array with leading axis len(prompts) * num_images, all images of prompt 0 first.
        Raises:
          InputError: a bad argument, before any device work.
          NonFiniteError: NaN or infinity; the message names the first block that made one.
        """
        prompts = _strings("prompts", prompts)
        negatives = _strings("negative_prompts", negative_prompts)
        if not isinstance(negative_prompts, str) and len(negatives) != len(prompts):
            raise InputError(f"negative_prompts: {len(negatives)} entries for {len(prompts)} prompts; pass one string, or one each")
        (module, params), (dc_ae, dc_ae_params) = self.sana, self.dc_ae
        side = module.sample_size * PATCH
        height, width = (side if value is None else value for value in (height, width))
        check_request(
            steps=steps, guidance_scale=guidance_scale, num_images=num_images, seed=seed, sampler=sampler,
            flow_shift=flow_shift, max_sequence_length=max_sequence_length, output=output,
            guidance_interval=guidance_interval, height=height, width=width, first_image=first_image, bin_resolution=bin_resolution,
        )  # fmt: skip
        painted = painted_size(height, width, module.sample_size, bin_resolution)
        grid, count = tuple(side // PATCH for side in painted), len(prompts) * num_images
        if latents is not None:
            latents = self._latents(latents, count, grid)
        guided = guidance_scale > 1
        conditions = self._conditions(
            prompts, negatives if guided else None, self.instruction(chi).text, max_sequence_length, num_images
        )
        if latents is None:
            latents = programs.initial_latents(np.uint32(seed), np.arange(first_image, first_image + count), (*grid, module.latent_channels))
        arguments, static = self._arguments(steps, guidance_scale, sampler, flow_shift, guidance_interval, guided)
        out, finite = programs.paint_program(
            {"sana": params, "dc_ae": dc_ae_params}, conditions, latents, *arguments,
            sana=module, dc_ae=dc_ae, size=(height, width), output=output, **static,
        )  # fmt: skip
        finite = np.asarray(finite)
        if not finite[:, 0].all():
            diagnose.explain_denoise(module, params, programs.denoise, (conditions, latents, *arguments), static)
        if not finite.all():
            latents = programs.denoise_program(params, conditions, latents, *arguments, sana=module, **static)
            diagnose.explain_decode(dc_ae, dc_ae_params, functools.partial(programs.decode, dc_ae), latents)
        return np.asarray(out)

    def _conditions(self, prompts, negatives, instruction, length, num_images):
        """Encodes and repeats: (states, mask, negative states, negative mask), all of one text bucket.

        States beyond the longest prompt are hidden by the mask, so a smaller array of them gives the
        same picture; its length is one of few, and so is the number of programs.
        """
        positive = self._tokenize(prompts, instruction, length)
        tokens = [positive] if negatives is None else [positive, self._tokenize(negatives, "", length)]
        bucket = text.text_bucket(np.concatenate([t.selected_mask.sum(axis=1) for t in tokens]), length)
        tokens = [text.trim(t, bucket) for t in tokens]
        arrays = []
        for t in tokens:
            states, mask = self._states(t), jnp.asarray(t.selected_mask)
            repeats = len(prompts) * num_images // states.shape[0]
            arrays += [jnp.repeat(states, repeats, axis=0), jnp.repeat(mask, repeats, axis=0)]
        if negatives is None:
            return (*arrays, None, None)
        if self.stack.negative_uses_prompt_mask:  # `denoise` has the same line for its callers
            arrays[3] = arrays[1]
        return tuple(arrays)
