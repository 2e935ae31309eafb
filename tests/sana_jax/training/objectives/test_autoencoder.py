"""The reconstruction loss and all of its gradients against torch autograd through diffusers' AutoencoderDC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.checkpoints import dc_ae as names
from sana_jax.errors import InputError
from sana_jax.models.dc_ae import DCAE
from sana_jax.training.objectives import Autoencoder, Frozen
from sana_jax.training.optimizer import STATISTICS
from sana_jax.training.similarity import window
from tests import dc_ae_toys, gradients, peers

PLAIN = DCAE(
    widths=(8, 16, 32), latent_channels=8, encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1), head_dim=16,
    encoder_attention=(None, None, (5,)), decoder_attention=(None, None, (5,)),
)  # fmt: skip
NORMED = PLAIN.clone(  # as the `in` and `mix` models: BatchNorm, ReLU, rearrangement, nothing at stage 0
    encoder_depths=(0, 1, 1), decoder_depths=(0, 2, 1),
    rearrange_down=True, rearrange_up=True, decoder_relu=(0, 1), decoder_batch_norm=(0, 1),
)  # fmt: skip
LOSS = Autoencoder(l2=0.7, ssim=0.3, lpips=0.0)
SHAPES = {"linear": (2, 16, 24), "quadratic": (2, 12, 12)}  # of images, by their attention in the last stage


def images(shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def ours(objective, module, params, image):
    def loss(params):
        rows = {"image": image, "weight": jnp.ones(len(image))}
        terms = objective(module, Frozen({}, {}), params, rows, None)
        return terms.loss.mean(), terms

    return jax.value_and_grad(loss, has_aux=True)(params)


def torch_ssim(a, b):
    """The published formula, of values from 0 to 1, with torch's own convolution; images in [-1, 1]."""
    import torch

    a, b = (a + 1) / 2, (b + 1) / 2
    kernel = torch.tensor(np.outer(window(), window()))[None, None].repeat(3, 1, 1, 1)

    def mean(x):
        return torch.nn.functional.conv2d(x, kernel, groups=3)

    m, n = mean(a), mean(b)
    va, vb, cov = mean(a * a) - m * m, mean(b * b) - n * n, mean(a * b) - m * n
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * m * n + c1) * (2 * cov + c2) / ((m * m + n * n + c1) * (va + vb + c2))).mean(dim=(1, 2, 3))


def split(tree):
    """(what gradients move, the statistics of BatchNorm)."""
    flat = flatten_dict(tree, sep="/")
    return tuple(unflatten_dict({p: g for p, g in flat.items() if bool(STATISTICS.fullmatch(p)) == s}, sep="/") for s in (False, True))


@pytest.mark.parity
@pytest.mark.parametrize("module, shape", [(PLAIN, "linear"), (NORMED, "quadratic")])
def test_loss_and_gradients(module, shape):
    import torch

    image = images(SHAPES[shape])
    peer = dc_ae_toys.make_peer(module).requires_grad_(True)
    params = dc_ae_toys.to_params(module, peer)
    x = torch.tensor(image).float().permute(0, 3, 1, 2) / 127.5 - 1
    out = peer.decode(peer.encode(x).latent).sample
    loss = (out - x).abs().mean() + 0.7 * ((out - x) ** 2).mean() + 0.3 * (1 - torch_ssim(out, x).mean())
    table = names.diffusers_rules(dc_ae_toys.fields_of(module))
    constants = [name for name in peer.state_dict() if "running_" in name]
    assert bool(constants) == (module is NORMED)
    expected = gradients.torch_gradients(peer, loss, module, table, constants)

    (found, terms), grads = ours(LOSS, module, params, image)
    assert abs(found - loss.item()) <= 1e-5 * loss.item()
    moving, still = split(grads)
    theirs, _ = split(expected)
    assert len(jax.tree.leaves(still)) == len(constants) and not any(map(np.any, jax.tree.leaves(still)))
    assert gradients.worst(moving, theirs) <= gradients.BOUND
    mse = ((out.clamp(-1, 1) - x) ** 2).mean(dim=(1, 2, 3)).detach().numpy()
    np.testing.assert_allclose(terms.extra["psnr"], 10 * np.log10(4 / mse), rtol=1e-5)

    (other, _), wrong = ours(LOSS, module, params, image[:, ::-1])  # control: upside down
    assert abs(other - loss.item()) > 1e-4 * loss.item()
    assert gradients.worst(split(wrong)[0], theirs) > 10 * gradients.BOUND


def test_a_perfect_reconstruction():
    class Identity:
        dtype = jnp.float32

        def apply(self, variables, image, method):
            return image

    rows = {"image": images((2, 16, 16)), "weight": np.float32([1, 0])}
    terms = LOSS(Identity(), Frozen({}, {}), {}, rows, None)
    np.testing.assert_allclose(terms.loss, 0, atol=1e-6)
    np.testing.assert_allclose(terms.extra["psnr"], 10 * np.log10(4e10), rtol=1e-6)
    np.testing.assert_array_equal(terms.weight, [1, 0])


def test_lpips_without_weights_is_said_and_left_out():
    assert Autoencoder().load() == ({}, ["objective.lpips_weights names no file: LPIPS is left out of the loss"])
    assert Autoencoder(lpips=0.0).load() == ({}, [])
    with pytest.raises(InputError, match="nowhere.safetensors"):
        Autoencoder(lpips_weights="nowhere.safetensors").load()


def test_needs_nothing_frozen():
    assert Autoencoder().frozen_needed({"image"}) == set()
    assert peers.rms(images((1, 12, 12))) > 0
