"""The reconstruction loss of DC-AE (https://arxiv.org/abs/2410.10733, 3.3): no adversary, no KL term."""

import dataclasses

import jax.numpy as jnp

from sana_jax.programs import apply
from sana_jax.training import lpips
from sana_jax.training.objectives.flow import signed
from sana_jax.training.objectives.terms import Terms
from sana_jax.training.similarity import ssim

NETWORK = lpips.LPIPS()


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """l1 |x' - x| + l2 |x' - x|^2 + ssim (1 - SSIM) + lpips LPIPS, each the mean over an image in [-1, 1].

    Attributes:
      l1, l2, ssim, lpips: weights; a part of weight 0 is not computed.  From nothing, absolute errors are
        content with what most pixels of a region are, a background, where squared ones see what stands on it.
      lpips_weights: file of `training.lpips`.  Without one LPIPS is left out, and the log says so.
    Stages that train a part only (latent adaptation, decoder) are experiments with `optim.freeze`.
    """

    l1: float = 1.0
    l2: float = 0.0
    ssim: float = 0.1
    lpips: float = 0.1
    lpips_weights: str = ""

    reads = ("image",)

    def frozen_needed(self, names):
        return set()

    def load(self):
        """Raises InputError: `lpips_weights` cannot be read or does not fit."""
        if not self.lpips:
            return {}, []
        if not self.lpips_weights:
            return {}, ["objective.lpips_weights names no file: LPIPS is left out of the loss"]
        return {"lpips": lpips.load(self.lpips_weights)}, []

    def __call__(self, model, frozen, params, batch, keys):
        """Terms of a batch with `image`; extra: the parts of the loss, and PSNR in dB of the clipped image."""
        image = signed(batch["image"])
        out = apply(model, params, image).astype(jnp.float32)
        axes = (1, 2, 3)
        extra = {"l1": jnp.mean(jnp.abs(out - image), axis=axes)}
        loss = self.l1 * extra["l1"]
        if self.l2:
            extra["l2"] = jnp.mean(jnp.square(out - image), axis=axes)
            loss = loss + self.l2 * extra["l2"]
        if self.ssim:
            extra["ssim"] = ssim(out + 1, image + 1, peak=2.0)  # it compares ratios of means, from black at 0
            loss = loss + self.ssim * (1 - extra["ssim"])
        if "lpips" in frozen.params:
            extra["lpips"] = NETWORK.apply({"params": frozen.params["lpips"]}, out, image)
            loss = loss + self.lpips * extra["lpips"]
        error = jnp.mean(jnp.square(jnp.clip(out, -1, 1) - image), axis=axes)
        extra["psnr"] = 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))
        return Terms(loss, batch["weight"], extra)
