"""SSIM against its formula in float64, one window at a time."""

import jax
import numpy as np
import pytest

from sana_jax.errors import InputError
from sana_jax.training.similarity import ssim


def reference(a, b, peak):
    """Wang et al., equation 13, at every place of an 11 x 11 Gaussian window of deviation 1.5."""
    y, x = np.mgrid[-5:6, -5:6]
    weight = np.exp(-(x**2 + y**2) / 4.5)
    weight = (weight / weight.sum())[:, :, None]
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    scores = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            p, q = (np.float64(image[top : top + 11, left : left + 11]) for image in (a, b))
            mean_p, mean_q = (weight * p).sum((0, 1)), (weight * q).sum((0, 1))
            var_p, var_q = (weight * (p - mean_p) ** 2).sum((0, 1)), (weight * (q - mean_q) ** 2).sum((0, 1))
            cov = (weight * (p - mean_p) * (q - mean_q)).sum((0, 1))
            above = (2 * mean_p * mean_q + c1) * (2 * cov + c2)
            scores.append(above / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return np.mean(scores)


def pair(height=17, width=14, noise=0.2, rows=2):
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(rows, height, width, 3)).astype(np.float32)
    return a, (a + noise * rng.normal(size=a.shape)).astype(np.float32)


@pytest.mark.parametrize("peak, noise", [(1.0, 0.2), (2.0, 0.05), (255.0, 0.5)])
def test_against_the_formula(peak, noise):
    a, b = pair(noise=noise)
    a, b = peak * a, peak * b
    expected = [reference(p, q, peak) for p, q in zip(a, b)]
    np.testing.assert_allclose(jax.jit(ssim, static_argnums=2)(a, b, peak), expected, atol=2e-5)
    assert 0.1 < expected[0] < 0.999
    assert abs(ssim(a, b, 3 * peak)[0] - expected[0]) > 2e-4


def test_equal_images_even_where_flat():
    a = np.concatenate([pair()[0], np.zeros((1, 17, 14, 3), np.float32), np.ones((1, 17, 14, 3), np.float32)])
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: ssim(x, a).sum()))(a)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() < 1e-3


def test_too_small():
    with pytest.raises(InputError, match="at least 11 x 11"):
        ssim(*pair(height=10))
