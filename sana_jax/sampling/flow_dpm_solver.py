"""Flow-DPM-Solver++: multistep DPM-Solver++ on the rectified flow (https://arxiv.org/abs/2410.10629,
section 3.3; the solver is https://arxiv.org/abs/2211.01095).

On x = (1 - sigma) x0 + sigma noise, a network that predicts v = noise - x0 also predicts the data,
m = x - sigma v.  With lambda = log((1 - sigma) / sigma) the solver integrates

    x_{k+1} = A x_k + B [m_k + c_1 (m_k - m_{k-1}) + c_2 (m_{k-1} - m_{k-2})],
    A = sigma_{k+1} / sigma_k,   B = 1 - A   (= alpha_{k+1} (1 - exp(-h)) for this flow).

A, B and c depend on the step only, so they are tables, computed in float64 with the last step in its
limit (sigma = 0, lambda = infinity: A = 0, B = 1).  No infinity ever reaches the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Schedule(NamedTuple):
    """One row per step; `sigma` and `t` are those at which the network is called."""

    t: np.ndarray  # [s] float32, integers in [0, 1000)
    sigma: np.ndarray  # [s] float32
    a: np.ndarray  # [s] float32
    b: np.ndarray  # [s] float32
    c: np.ndarray  # [s, 2] float32


def times(steps, shift):
    """sigma [steps + 1] from nearly 1 to 0, float64 (docs/numerics.md 4.2).

    The grid starts at u = 0.999, not 1, and is then shifted: s u / (1 + (s - 1) u).
    """
    u = 0.999 * np.arange(steps, -1, -1) / steps
    return shift * u / (1 + (shift - 1) * u)


def orders(steps, order):
    """The order of each step: rises from 1, falls to 1 at the end (diffusers' `lower_order_final`)."""
    rising = np.minimum(np.arange(1, steps + 1), order)
    rising[-1] = 1  # sigma = 0 leaves only the data prediction
    if steps < 15 and steps > 1:
        rising[-2] = min(rising[-2], 2)
    return rising


def schedule(steps, shift, order=2):
    """The tables of `steps` steps of the given order (1, 2 or 3), as float32 arrays."""
    sigma = times(steps, shift)
    a = sigma[1:] / sigma[:-1]
    c = np.zeros((steps, 2))
    lam = np.log1p(-sigma[:-1]) - np.log(sigma[:-1])
    for k, kth in enumerate(orders(steps, order)):
        if kth == 1:
            continue
        h, h0 = lam[k + 1] - lam[k], lam[k] - lam[k - 1]
        if kth == 2:
            c[k, 0] = h / (2 * h0)
            continue
        # Third order, divided by B = -alpha phi_1; D_1 and D_2 are spelled out in the differences
        # m_k - m_{k-1} and m_{k-1} - m_{k-2} (docs/numerics.md 4.3).
        h1 = lam[k - 1] - lam[k - 2]
        r0, r1 = h0 / h, h1 / h
        phi1 = np.expm1(-h)
        phi2 = phi1 / h + 1
        phi3 = phi2 / h - 0.5
        first, second = -phi2 / phi1, phi3 / phi1
        c[k, 0] = (first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)) / r0
        c[k, 1] = -(first * r0 / (r0 + r1) + second / (r0 + r1)) / r1
    arrays = np.floor(1000 * sigma[:-1]), sigma[:-1], a, 1 - a, c
    return Schedule(*(x.astype(np.float32) for x in arrays))


def flow_dpm_solver(velocity, x, schedule, times=None):
    """Integrates from noise to data in one `lax.scan`.

    Args:
      velocity: velocity(x, t) -> v, like x.  The only thing known of the model.
      x: the noise, float32; kept in float32 (a bfloat16 state drifts by 0.1, docs/numerics.md 4.5).
      schedule: from `schedule`.
      times: what `velocity` receives as t, a pytree with leading axis steps; `schedule.t` if None.
        A caller that has prepared something for each time (embeddings, say) passes it here.
    Returns:
      x0, float32.
    """

    def step(carry, row):
        x, m1, m2 = carry
        t, s = row
        m = x - s.sigma * velocity(x, t).astype(jnp.float32)
        x = s.a * x + s.b * (m + s.c[0] * (m - m1) + s.c[1] * (m1 - m2))
        return (x, m, m1), None

    x = x.astype(jnp.float32)
    rows = (schedule.t if times is None else times, schedule)
    (x, _, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x), jnp.zeros_like(x)), rows)
    return x
