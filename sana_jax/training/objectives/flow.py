"""The rectified-flow loss of SANA, docs/numerics.md 5.

Shapes: b rows, h w latent grid, c channels, m caption tokens, d channels of their states.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import flow
from sana_jax.errors import InputError
from sana_jax.programs import apply, encode_program, text_program
from sana_jax.training.objectives.terms import Terms


@dataclasses.dataclass(frozen=True)
class Flow:
    """mean over h w c of (v - (noise - x0))^2; no weight in time but the density of the times.

    Attributes:
      shift: of the noise levels; 3, and 6 at 4K.
      logit_mean, logit_std: the numbers of the levels are logit-normal.
      caption_dropout: share of rows whose text states become those of the empty caption.
      dropped_mask: what such a row attends to.  "caption": as many tokens as its own caption has, as
        published and as the stack "nvlabs" samples; "empty": the empty caption's one token, as diffusers'
        negative prompt does.
      scaling_factor: of the autoencoder whose latents these are.
    """

    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    caption_dropout: float = 0.1
    dropped_mask: Literal["caption", "empty"] = "caption"
    scaling_factor: float = 0.41407

    reads = ("latent", "image", "states", "texts")

    def frozen_needed(self, names):
        """Of "dc_ae" and "text", what a batch with these entries still has to go through.

        Raises InputError: there are no texts.
        """
        if not {"ids", "states"} & set(names):
            raise InputError("frozen.text='': these data hold captions and no text states, or neither; name a text encoder, or cache them")
        return {"dc_ae"} - ({"dc_ae"} if "latent" in names else set()) | ({"text"} if "ids" in names else set())

    def load(self):
        return {}, []

    def __call__(self, model, frozen, params, batch, keys):
        """Terms of a batch with image or latent, and ids and ids_mask or states and mask.

        Raises InputError (when traced): a model that embeds guidance; an autoencoder with another
        scaling factor.
        """
        if model.guidance_embed:
            raise InputError("model.guidance_embed=True: such a network (Sprint) is distilled, not trained with Flow")
        x0 = jax.lax.stop_gradient(self.latents(frozen, batch))
        states, mask = jax.lax.stop_gradient(text_states(frozen, batch))
        number, noise, dropped = self.draw(keys, x0.shape[1:])
        if self.caption_dropout:
            states = jnp.where(dropped[:, None, None], self.null(frozen, states), states)
            if self.dropped_mask == "empty":  # without instruction, so that BOS is all it has
                mask = jnp.where(dropped[:, None], jnp.arange(mask.shape[1]) == 0, mask)

        sigma, time = (jnp.asarray(table)[number] for table in flow.levels(self.shift))
        velocity = apply(model, params, flow.interpolate(x0, noise, sigma), time, states, mask)
        error = velocity.astype(jnp.float32) - flow.target(x0, noise)
        return Terms(jnp.mean(error * error, axis=(1, 2, 3)), batch["weight"], {"sigma": sigma})

    def draw(self, keys, shape):
        """All that is random, by row: (number of the noise level [b], noise [b *shape], dropped [b])."""

        def row(key):
            noise_key, drop_key = (jax.random.fold_in(key, i) for i in (1, 2))
            noise = jax.random.normal(noise_key, shape)
            return noise, jax.random.bernoulli(drop_key, self.caption_dropout)

        number = flow.sample_times(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys), self.logit_mean, self.logit_std)
        return number, *jax.vmap(row)(keys)

    def latents(self, frozen, batch):
        """[b h w c] float32 in model space."""
        if "latent" in batch:
            return batch["latent"].astype(jnp.float32) * self.scaling_factor
        dc_ae = frozen.modules["dc_ae"]
        if dc_ae.scaling_factor != self.scaling_factor:
            raise InputError(
                f"objective.scaling_factor={self.scaling_factor}: the autoencoder's is {dc_ae.scaling_factor}"
            )
        return encode_program(frozen.params["dc_ae"], signed(batch["image"]), dc_ae=dc_ae)

    def null(self, frozen, states):
        """[m d] for these states [b m d]."""
        if "null" not in frozen.params:
            raise InputError(f"objective.caption_dropout={self.caption_dropout}: needs the states of the empty caption")
        null, m = frozen.params["null"], states.shape[1]
        if null.shape[0] < m or null.shape[1] != states.shape[2]:
            raise InputError(f"null caption {null.shape}: too small for text states {states.shape[1:]}")
        return null[:m].astype(states.dtype)


def signed(image):
    """uint8 [b H W 3] -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def text_states(frozen, batch):
    """(states [b m d], mask [b m]) of a batch: the cached ones, or the text encoder's.

    Of ids [b M], the first and the last m - 1 positions are selected (`text.tokenize`), where m is the
    length of the empty caption's states.
    """
    if "states" in batch:
        return batch["states"], batch["mask"]
    ids, valid = batch["ids"], batch["ids_mask"]
    total, length = ids.shape[1], frozen.params["null"].shape[0]
    selection = np.r_[0, total - length + 1 : total]
    mask = valid[:, selection]
    prefix = frozen.params.get("prefix")
    if prefix is not None:  # all texts begin with it: it is encoded already
        start = prefix.keys.shape[2]
        if start != selection[1]:
            raise InputError(f"prefix of {start} tokens: the selected positions begin at {selection[1]}")
        ids, valid, selection = ids[:, start:], valid[:, start:], np.arange(length - 1)
    gemma2 = frozen.modules["text"]
    states, _ = text_program(frozen.params["text"], ids, valid, selection, prefix, gemma2=gemma2)
    return states, mask
