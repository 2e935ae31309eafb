"""SCM, the sampler of SANA-Sprint: one to four steps of a consistency model that came from a flow
(https://arxiv.org/abs/2503.09641; the model class is https://arxiv.org/abs/2410.11081).

It is published in TrigFlow's terms, docs/numerics.md 4.7: at an angle tau the state is
x = cos(tau) x0 + sin(tau) noise, both of standard deviation sigma_d = 0.5, and the network's velocity
v is wrapped into F, which gives x0 = cos(tau) x - sin(tau) F.  With

    t = sin(tau) / (cos(tau) + sin(tau)),   r = sqrt(t^2 + (1 - t)^2) = 1 / (cos(tau) + sin(tau)),

what the network is given is y = r x / sigma_d, and F = sigma_d [(1 - 2 t) x / sigma_d + r v(y, t)].
Put together, sigma_d cancels and a step is two lines in the flow's own terms, y = (1 - t) x0 + t noise:

    x0 = y - t v(y, t)                   (the data that the flow predicts)
    y <- (1 - t') x0 + t' noise'         (fresh noise, at the next time)

In float64 the two forms agree to rounding; this one has nothing left to lose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 1.57080  # radians, as published: a little above pi / 2, so that the first t is 1.0000037
MIDDLE = 1.3  # the second of two steps


class Schedule(NamedTuple):
    """One row per step; the network is told the noise level itself, 0 to 1."""

    t: np.ndarray  # [s] float32
    sigma: np.ndarray  # [s] float32, equal to t
    after: np.ndarray  # [s] float32, the noise level that the step leaves; the last is 0


def angles(steps):
    """tau [steps + 1]: evenly from 1.57080 to 0, or with 1.3 in the middle of two steps."""
    if steps == 2:
        return np.array([LARGEST, MIDDLE, 0.0])
    return np.linspace(LARGEST, 0.0, steps + 1)


def first_step(steps, strength):
    """The step that a picture of this strength in (0, 1] enters at: 0 paints it anew.

    As published, int(steps - steps * strength): of two steps, 0.6 still takes both, 0.5 one.
    """
    return int(steps - min(steps * strength, steps))


def schedule(steps, first=0):
    """The rows `first` to `steps`, as float32 arrays."""
    tau = angles(steps)[first:]
    t = np.sin(tau) / (np.cos(tau) + np.sin(tau))
    return Schedule(*(row.astype(np.float32) for row in (t[:-1], t[:-1], t[1:])))


def scm(velocity, x, schedule, noise, data=None, times=None):
    """Paints in one `lax.scan`.

    Args:
      velocity: velocity(y, t) -> v, like y, on y = (1 - t) x0 + t noise.
      x: the noise to begin with, standard normal, float32.
      schedule: from `schedule`.
      noise: [steps, *x.shape], standard normal: drawn for every step, though the last has no use
        for it, so that a recorded sequence of draws can be passed as it is.
      data: like x, what the noise is mixed with at the first step, or None for nothing.
      times: what `velocity` receives as t, a pytree with leading axis steps; `schedule.t` if None.
    Returns:
      x0, float32.
    """

    def step(y, row):
        t, s, fresh = row
        data = y - s.sigma * velocity(y, t).astype(jnp.float32)
        return (1 - s.after) * data + s.after * fresh, None

    y = schedule.sigma[0] * x.astype(jnp.float32)
    if data is not None:
        y = y + (1 - schedule.sigma[0]) * data.astype(jnp.float32)
    rows = (schedule.t if times is None else times, schedule, noise.astype(jnp.float32))
    return jax.lax.scan(step, y, rows)[0]
