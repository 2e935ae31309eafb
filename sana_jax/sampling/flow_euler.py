"""Euler steps on the rectified flow dx/dsigma = v, the reference sampler."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Schedule(NamedTuple):
    """One row per step; `sigma` and `t` are those at which the network is called."""

    t: np.ndarray  # [s] float32 in (0, 1000], fractional
    sigma: np.ndarray  # [s] float32
    delta: np.ndarray  # [s] float32, sigma_{k+1} - sigma_k


def schedule(steps, shift):
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler, which shifts twice (docs/numerics.md 4.5).

    The ends of its training grid are shifted once, the steps between them again, and 0 is appended.
    """

    def shifted(u):
        return shift * u / (1 + (shift - 1) * u)

    sigma = np.append(shifted(np.linspace(1.0, shifted(0.001), steps)), 0.0)
    arrays = 1000 * sigma[:-1], sigma[:-1], np.diff(sigma)
    return Schedule(*(x.astype(np.float32) for x in arrays))


def flow_euler(velocity, x, schedule, times=None):
    """x <- x + (sigma_{k+1} - sigma_k) velocity(x, t).  Arguments as in `flow_dpm_solver`."""

    def step(x, row):
        t, s = row
        return x + s.delta * velocity(x, t).astype(jnp.float32), None

    rows = (schedule.t if times is None else times, schedule)
    return jax.lax.scan(step, x.astype(jnp.float32), rows)[0]
