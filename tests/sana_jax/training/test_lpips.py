"""LPIPS: torch's own convolutions as reference, and the files that it is read from."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax.checkpoints.write import write_safetensors
from sana_jax.errors import InputError
from sana_jax.training import lpips
from sana_jax.training.lpips import LPIPS, PLACES
from sana_jax.training.objectives import Autoencoder, Frozen
from tests import peers

WIDTHS = ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8))  # VGG-16 but for its 15 million numbers
TOY = LPIPS(WIDTHS)


@functools.cache
def tensors():
    """{name: array} in lpips' names, with what else its file holds."""
    rng, inner, out = np.random.default_rng(0), 3, {}
    widths = [w for block in WIDTHS for w in block]
    ends = np.cumsum([len(block) for block in WIDTHS])
    for i, (place, width) in enumerate(zip(PLACES, widths)):
        block = int(np.searchsorted(ends, i, side="right")) + 1
        out[f"net.slice{block}.{place}.weight"] = rng.normal(size=(width, inner, 3, 3)).astype("f") * (2 / (9 * inner)) ** 0.5
        out[f"net.slice{block}.{place}.bias"] = 0.1 * rng.normal(size=width).astype("f")
        inner = width
    for k, block in enumerate(WIDTHS):
        out[f"lin{k}.model.1.weight"] = out[f"lins.{k}.model.1.weight"] = rng.uniform(size=(1, block[-1], 1, 1)).astype("f")
    return out | {"scaling_layer.shift": np.zeros((1, 3, 1, 1), "f"), "scaling_layer.scale": np.ones((1, 3, 1, 1), "f")}


@pytest.fixture
def file(tmp_path):
    write_safetensors(tmp_path, "lpips", tensors().items())
    return tmp_path / "lpips.safetensors"


def images(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 35, 32, 3)).astype("f")


@jax.jit
def distance_and_gradient(params, a, b):
    def total(a):
        distance = TOY.apply({"params": params}, a, b)
        return distance.sum(), distance

    return jax.value_and_grad(total, has_aux=True)(a)


def torch_lpips(a, b):
    """The published definition, [b]; NCHW tensors in [-1, 1]."""
    import torch
    from torch.nn import functional as F

    weights = {lpips.rename(name): torch.tensor(array) for name, array in tensors().items()}

    def features(x):
        shift, scale = (torch.tensor(v)[None, :, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        x, number = (x - shift) / scale, 0
        for k, block in enumerate(WIDTHS):
            x = F.max_pool2d(x, 2) if k else x
            for _ in block:
                name = f"features.{PLACES[number]}"
                x, number = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)), number + 1
            yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)

    parts = [
        F.conv2d((p - q) ** 2, weights[f"lin{k}.model.1.weight"]).mean(dim=(1, 2, 3))
        for k, (p, q) in enumerate(zip(features(a), features(b)))
    ]
    return sum(parts)


@pytest.mark.parity
def test_distance_and_gradient(file):
    import torch

    params = lpips.load(file, TOY)
    a, b = images(1), images(2)
    (_, ours), gradient = distance_and_gradient(params, a, b)
    x = torch.tensor(np.moveaxis(a, -1, 1)).requires_grad_(True)
    theirs = torch_lpips(x, torch.tensor(np.moveaxis(b, -1, 1)))
    theirs.sum().backward()
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5)
    expected = np.moveaxis(x.grad.numpy(), 1, -1)
    assert peers.rms(gradient - expected) <= 5e-5 * peers.rms(expected)
    (_, other), _ = distance_and_gradient(params, a, b[::-1])
    assert abs(other[0] - theirs[0].item()) > 1e-3


def test_equal_images_and_regions_without_features(file):
    """A feature vector of zeros has no direction; its gradient must not be NaN."""
    params = jax.tree.map(np.zeros_like, lpips.load(file, TOY))
    (value, _), gradient = distance_and_gradient(params, images(1), images(2))
    assert value == 0 and not np.any(gradient)


def test_torchvision_names(file, tmp_path):
    renamed = {lpips.rename(name): array for name, array in tensors().items() if not name.startswith("lins.")}
    write_safetensors(tmp_path, "other", (renamed | {"classifier.0.bias": np.zeros(3, "f")}).items())
    expected, found = (flatten_dict(lpips.load(path, TOY), sep="/") for path in (file, tmp_path / "other.safetensors"))
    assert expected.keys() == found.keys() and len(found) == 31
    assert all(np.array_equal(found[p], expected[p]) for p in found)


def test_a_file_that_does_not_fit(tmp_path):
    names = {name: array for name, array in tensors().items() if name != "lin3.model.1.weight"}
    write_safetensors(tmp_path, "part", (names | {"lin5.model.1.weight": np.zeros((1, 8, 1, 1), "f")}).items())
    with pytest.raises(InputError, match="(?s)missing.*lin3.model.1.weight.*not part of this model.*lin5.model.1.weight"):
        lpips.load(tmp_path / "part.safetensors", TOY)


def test_it_is_part_of_the_loss(file, monkeypatch):
    from sana_jax.training.objectives import autoencoder

    monkeypatch.setattr(autoencoder, "NETWORK", TOY)
    params, a, b = lpips.load(file, TOY), np.uint8(127.5 * (images(1) + 1)), images(2)

    class Fixed:
        dtype = b.dtype

        def apply(self, variables, image, method):
            return b

    rows = {"image": a, "weight": np.ones(2, "f")}
    loss = Autoencoder(lpips=0.5, ssim=0.0)
    without, with_it = (loss(Fixed(), Frozen({}, given), {}, rows, None) for given in ({}, {"lpips": params}))
    (_, distance), _ = distance_and_gradient(params, b, a / np.float32(127.5) - 1)
    np.testing.assert_allclose(with_it.loss - without.loss, 0.5 * distance, rtol=1e-4)
    np.testing.assert_allclose(with_it.extra["lpips"], distance, rtol=1e-5)
