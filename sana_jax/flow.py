"""Rectified flow as SANA is trained with it (docs/numerics.md 5; https://arxiv.org/abs/2410.10629, 2.3).

    x_sigma = (1 - sigma) x_0 + sigma noise,   the network learns v = noise - x_0

Noise levels come from a grid of 1000: a number between 0 and 999 is drawn, then shifted towards noise.
Shapes: b batch, h w latent grid, c channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 1000


def shift_sigma(sigma, shift):
    """s sigma / (1 + (s - 1) sigma): large pictures need more noise to lose as much (float or array)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@functools.cache
def levels(shift):
    """(sigma float32, network time float32), [1000] each: what number i of the grid stands for.

    In float64 and in the published order, 1 - beta with beta evenly from 1 to 0.001: the time is
    truncated, and so it matters on which side of an integer 1000 sigma falls.
    """
    sigma = shift_sigma(1 - np.linspace(1.0, 0.001, LEVELS), shift)
    return sigma.astype(np.float32), np.trunc(LEVELS * sigma).astype(np.float32)


def sample_times(keys, mean=0.0, std=1.0):
    """PRNG keys [b] -> numbers of the grid [b] int32: floor(1000 sigmoid(mean + std N(0, 1)))."""
    normal = jax.vmap(jax.random.normal)(keys)
    number = jnp.floor(LEVELS * jax.nn.sigmoid(mean + std * normal)).astype(jnp.int32)
    return jnp.minimum(number, LEVELS - 1)  # a sigmoid beyond 17 is 1 in float32


def interpolate(x0, noise, sigma):
    """x_sigma of x0, noise [b h w c] and sigma [b]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def target(x0, noise):
    """The velocity dx/dsigma, which does not depend on sigma."""
    return noise - x0
