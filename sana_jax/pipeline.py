"""Prompt to picture.

    prompt --tokenize--> ids --Gemma2--> states
    seed --normal, one key per image--> x_1
    x_0 = flow_dpm_solver(classifier_free(sana.velocity), x_1)      one scan; or scm(sana.velocity, x_1)
    image = resize(dc_ae.decode(x_0 / s))                           one jit with the line above

Shapes: b images, m caption tokens, d channels of the text encoder, h w latent grid, H W pixels.
"""

import dataclasses
import functools
import warnings

import jax.numpy as jnp
import numpy as np

from sana_jax import diagnose, programs, requests, text
from sana_jax.errors import InputError, NonFiniteError, require_choice
from sana_jax.models.gemma2 import Gemma2
from sana_jax.progress import listening
from sana_jax.requests import EVERYWHERE, STRENGTH, image_numbers, strings
from sana_jax.requests import check_request as check_request
from sana_jax.resolution import PATCH, painted_size
from sana_jax.stacks import STACKS, Stack

REMEMBERED = 8  # encoded texts, a megabyte or two each


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A Gemma-2 with its parameters and tokenizer; the instruction and the `text.Vocabulary` that came with the weights."""

    gemma2: Gemma2
    params: dict
    tokenizer: object
    instruction: str | None = None
    vocabulary: text.Vocabulary | None = None


class Pipeline:
    """A transformer, an autoencoder and a text encoder, with the habits of one inference stack.

    Attributes:
      sana, dc_ae: (module, params).
      text: a `TextEncoder` (or the tuple of its fields), or None: then `generate` and `encode_prompt` are not available.
      stack: a `Stack`; its fields are set on `sana`.
      flow_shift: the default of `generate`.
      defaults: those of its steps, guidance_scale and max_sequence_length.
    """

    def __init__(self, sana, dc_ae, text=None, stack="diffusers", *, flow_shift=None, defaults=None):
        """Args: as the attributes; `stack` may be a name.  The stack's flow shift comes first, then
        `flow_shift`, which is the checkpoint's, then the published 3, or 6 at 4K; `defaults` may hold
        some of them, the others are as published."""
        if not isinstance(stack, Stack):
            stack = STACKS[require_choice("stack", stack, tuple(STACKS))]
        if isinstance(text, tuple):
            text = TextEncoder(*text)
        module, params = sana
        if dc_ae[0].compression != PATCH:
            raise InputError(
                f"compression={dc_ae[0].compression} of the autoencoder: SANA's transformers were trained on "
                f"latents of {PATCH} x {PATCH} pixels; this autoencoder works by itself, with load_dc_ae"
            )
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
        self.sana = module.clone(**stack.sana_fields(module.guidance_embed)), params
        self.dc_ae, self.text, self.stack = dc_ae, text, stack
        published = 6.0 if module.sample_size >= 128 else 3.0
        self.flow_shift = float(stack.flow_shift or flow_shift or published)
        check_request(**(defaults or {}))
        self.defaults = requests.defaults(module) | (defaults or {})
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

    def encode_prompt(self, prompts, *, chi="auto", max_sequence_length=None):
        """Text encoder states of prompts, positive ones: a negative prompt takes chi="none".

        Args:
          prompts: str or list of b str.
          chi: "auto", "none" or the joined instruction; the prompt follows it with nothing between.
          max_sequence_length: m; longer prompts are cut, with a warning.  None is the model's.
        Returns:
          (states [b m d], mask [b m] bool).
        Raises:
          InputError: no text encoder, or a bad argument.  NonFiniteError: names the first bad layer.
        """
        check_request(max_sequence_length=max_sequence_length)
        length = max_sequence_length or self.defaults["max_sequence_length"]
        tokens = self._tokenize(strings("prompts", prompts), self.instruction(chi).text, length)
        return self._states(tokens), jnp.asarray(tokens.selected_mask)

    def _tokenize(self, prompts, instruction, length, field="prompts"):
        encoder = self._text_encoder()
        prompts = [text.clean(prompt, self.stack) for prompt in prompts]
        if encoder.vocabulary:
            for i, prompt in enumerate(prompts):
                if remark := encoder.vocabulary.remark(prompt, asked=field == "prompts"):
                    warnings.warn(f"{field}[{i}]: {remark}", stacklevel=4)
            prompts = [prompt.lower() for prompt in prompts]
        return text.tokenize(encoder.tokenizer, prompts, instruction, length)

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
        self, states, mask, negative_states=None, negative_mask=None, latents=None, *, steps=None,
        guidance_scale=None, sampler=None, flow_shift=None, guidance_interval=EVERYWHERE, pag_scale=0.0,
        pag_layers=None, pag_adaptive_scale=0.0, step_noise=None, on_step=None,
    ):  # fmt: skip
        """Noise to latents.

        Args:
          states, mask: [b m d], [b m] bool of the prompts.
          negative_states, negative_mask: the same for the unconditional half, one for all or one for
            each; without states there is no guidance, without a mask, and always in the stack
            "nvlabs", the prompts' own mask is used.
          latents: [b h w c], the noise.
          step_noise: [steps b h w c], the noise of each step; sampler "scm" needs it.
          others: as in `generate`.
        Returns:
          [b h w c] float32 in model space.
        Raises:
          InputError: a bad argument.  NonFiniteError: names the first bad block.
        """
        sampling = dict(
            steps=steps, guidance_scale=guidance_scale, sampler=sampler, flow_shift=flow_shift,
            guidance_interval=guidance_interval, pag_scale=pag_scale, pag_layers=pag_layers,
            pag_adaptive_scale=pag_adaptive_scale,
        )  # fmt: skip
        check_request(**sampling, on_step=on_step)
        module, params = self.sana
        if latents is None:
            raise InputError("latents=None: denoise needs the noise, [b h w c]")
        states, mask = requests.caption("", states, mask, module.caption_width)
        plan = self._plan(**sampling, guided=negative_states is not None)
        if module.guidance_embed and negative_states is not None:
            raise InputError("negative_states: SANA-Sprint has no unconditional half; leave them out")
        conditions = states, mask, None, None
        if plan.static["guided"]:
            if negative_mask is None or self.stack.negative_uses_prompt_mask:
                negative_mask = mask
            negative = requests.caption("negative_", negative_states, negative_mask, module.caption_width, like=states)
            conditions = states, mask, *negative
        latents = self._latents(latents, states.shape[0])
        step_noise = self._step_noise(plan, step_noise, latents.shape)
        if plan.static["sampler"] == "scm" and step_noise is None:
            raise InputError(f"step_noise=None: sampler 'scm' needs noise for each step, [{plan.steps}, b, h, w, c]")
        arguments = *plan.traced, step_noise
        with listening(on_step, plan.steps) as listener:
            out = programs.denoise_program(
                params, conditions, latents, *arguments, sana=module, listener=listener, **plan.static
            )
            finite = bool(jnp.isfinite(out).all())
        if not finite:
            diagnose.explain_denoise(module, params, programs.denoise, (conditions, latents, *arguments), plan.static)
        return out

    def _plan(self, **arguments):
        arguments = requests.filled(arguments, self.defaults)
        return requests.plan(self.sana[0], self.stack, self.flow_shift, **arguments)

    def _latents(self, latents, count=None, grid=(None, None)):
        """The given latents as float32 [count, *grid, c]; None is any.  Raises InputError."""
        shape = (count, *grid, self.sana[0].latent_channels)
        return requests.numbers("latents", latents, shape, "[images, height / 32, width / 32, channels]")

    def _step_noise(self, plan, given, shape):
        """The given noise as float32 [steps, *shape], or None.  Raises InputError."""
        if given is None:
            return None
        if plan.static["sampler"] != "scm":
            raise InputError(f"step_noise: sampler {plan.static['sampler']!r} draws none; only 'scm' does")
        words = "[steps, images, height / 32, width / 32, channels]"
        return requests.numbers("step_noise", given, (plan.steps, *shape), words)

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
        self, prompts, *, negative_prompts="", height=None, width=None, steps=None, guidance_scale=None,
        num_images=1, seed=0, latents=None, sampler=None, flow_shift=None, chi="auto",
        max_sequence_length=None, bin_resolution=True, output="uint8", guidance_interval=EVERYWHERE,
        first_image=0, pag_scale=0.0, pag_layers=None, pag_adaptive_scale=0.0, image=None,
        strength=None, step_noise=None, on_step=None,
    ):  # fmt: skip
        """Pictures of prompts.

        Args:
          prompts: str or list of str.
          negative_prompts: str for all, or one for each prompt; never gets an instruction.  SANA-Sprint
            has no use for them.
          height, width: pixels; None is the size that the model was trained on.
          steps: network evaluations per image (two halves each, with guidance).  None, here and in the
            next and `max_sequence_length`, is the model's: what its folder says, else 20, and 2 for
            SANA-Sprint, which was made for 1 to 4.
          guidance_scale: w in v_u + w (v_c - v_u); up to 1 means no guidance and half the work.
            SANA-Sprint is told it instead.  Published: 4.5.
          num_images: per prompt.
          seed: image i of the call starts from noise keyed (seed, first_image + i), whatever the batch.
          latents: [b h w c], the noise itself, at the painted size, in place of `seed`.
          sampler: "flow-dpm-solver" (second order), "flow-euler", or "scm", which is for SANA-Sprint
            alone; None is the model's.
          flow_shift: None is the checkpoint's.
          chi: the instruction before each prompt: "auto", "none" or its joined text.
          max_sequence_length: prompt tokens that the transformer sees; the rest is cut.  Published: 300.
          bin_resolution: paint at the published size of the nearest aspect ratio, then resize and
            crop; else height and width must be multiples of 32.
          output: "uint8" [b H W 3]; "float", the same in [0, 1]; "latent" [b h w c] in model space.
          guidance_interval: noise levels (low, high) between which guidance, of both kinds, acts; not
            at them, except that 1 takes in the first step.
          first_image: lets one long job be cut into several calls; a list has the number of each image.
          pag_scale: s of perturbed-attention guidance, + s (v_c - v_p): half as much work again, or
            twice as much without guidance_scale; 0 is none.
          pag_layers: where v_p has no self-attention, counted from 0; None is the stack's.
          pag_adaptive_scale: a in s <- max(s - a (1000 - t), 0).
          image: [H W 3], or one for each prompt, uint8 or float in [0, 1], to begin with (SANA-Sprint):
            its centre, in the shape that is painted.
          strength: in (0, 1], how much of the image is painted over; None is 0.6.
          step_noise: [steps b h w c], the noise of each step of "scm", in place of `seed`.
          on_step: called with (step, steps) as each evaluation begins, step from 0, and with
            (steps, steps) at the end.  The first call with one compiles another program.
        Returns:
          A numpy array with leading axis len(prompts) * num_images, all images of prompt 0 first.
        Raises:
          InputError: a bad argument, before any device work.
          NonFiniteError: NaN or infinity; the message names the first block that made one.
        """
        prompts = strings("prompts", prompts)
        negatives = strings("negative_prompts", negative_prompts)
        if not isinstance(negative_prompts, str) and len(negatives) != len(prompts):
            raise InputError(f"negative_prompts: {len(negatives)} entries for {len(prompts)} prompts; pass one string, or one each")
        (module, params), (dc_ae, dc_ae_params) = self.sana, self.dc_ae
        side = module.sample_size * PATCH
        height, width = (side if value is None else value for value in (height, width))
        sampling = dict(
            steps=steps, guidance_scale=guidance_scale, sampler=sampler, flow_shift=flow_shift,
            guidance_interval=guidance_interval, pag_scale=pag_scale, pag_layers=pag_layers,
            pag_adaptive_scale=pag_adaptive_scale, strength=strength,
        )  # fmt: skip
        check_request(
            **sampling, num_images=num_images, seed=seed, max_sequence_length=max_sequence_length,
            output=output, height=height, width=width, first_image=first_image,
            bin_resolution=bin_resolution, image=image, on_step=on_step,
        )  # fmt: skip
        if image is None and strength is not None:
            raise InputError(f"strength={strength!r}: is that of an image to begin with, and none is given")
        if image is not None:
            image, sampling["strength"] = np.asarray(image), STRENGTH if strength is None else strength
            image = image if image.ndim == 4 else image[None]
            if len(image) not in (1, len(prompts)):
                raise InputError(f"image: {len(image)} images for {len(prompts)} prompts; pass one for all, or one each")
        if module.guidance_embed and any(negatives):
            raise InputError("negative_prompts: SANA-Sprint has no unconditional half to take one; leave it empty")
        plan = self._plan(**sampling, guided=True)
        painted = painted_size(height, width, module.sample_size, bin_resolution)
        grid, count = tuple(side // PATCH for side in painted), len(prompts) * num_images
        indices, data = image_numbers(first_image, count), None
        shape = (*grid, module.latent_channels)
        if latents is not None:
            latents = self._latents(latents, count, grid)
        step_noise = self._step_noise(plan, step_noise, (count, *shape))
        negatives = negatives if plan.static["guided"] else None
        length = max_sequence_length or self.defaults["max_sequence_length"]
        conditions = self._conditions(prompts, negatives, self.instruction(chi).text, length, num_images)
        if latents is None:
            latents = programs.initial_latents(np.uint32(seed), indices, shape)
        if plan.static["sampler"] == "scm" and step_noise is None:
            step_noise = programs.step_noise(np.uint32(seed), indices, plan.steps, shape)
        if image is not None:
            data = self.encode(programs.fit_image(image, height=painted[0], width=painted[1]))
            if not bool(jnp.isfinite(data).all()):
                raise NonFiniteError(f"autoencoder: the encoded image is not finite in {jnp.dtype(dc_ae.dtype).name}")
            data = jnp.repeat(data, count // len(data), axis=0)
        arguments = *plan.traced, step_noise, data
        with listening(on_step, plan.steps) as listener:
            out, finite = programs.paint_program(
                {"sana": params, "dc_ae": dc_ae_params}, conditions, latents, *arguments,
                sana=module, dc_ae=dc_ae, size=(height, width), output=output, listener=listener, **plan.static,
            )  # fmt: skip
            finite = np.asarray(finite)
        if not finite[:, 0].all():
            diagnose.explain_denoise(module, params, programs.denoise, (conditions, latents, *arguments), plan.static)
        if not finite.all():
            latents = programs.denoise_program(params, conditions, latents, *arguments, sana=module, **plan.static)
            diagnose.explain_decode(dc_ae, dc_ae_params, functools.partial(programs.decode, dc_ae), latents)
        return np.asarray(out)

    def _conditions(self, prompts, negatives, instruction, length, num_images):
        """Encodes and repeats: (states, mask, negative states, negative mask), all of one text bucket.

        States beyond the longest prompt are hidden by the mask, so a smaller array of them gives the
        same picture; its length is one of few, and so is the number of programs.
        """
        positive = self._tokenize(prompts, instruction, length)
        tokens = [positive] if negatives is None else [positive, self._tokenize(negatives, "", length, "negative_prompts")]
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
