"""Euler steps against diffusers' FlowMatchEulerDiscreteScheduler and a flow with a known end."""

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.sampling import flow_euler as euler

NOISE = np.random.default_rng(1).normal(size=(3, 8)).astype("f")


def velocity(x, t, xp=jnp):
    return xp.sin(x) + 0.5 * x + t / 1000


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 20, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_agrees_with_diffusers(steps, shift):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = euler.schedule(steps, shift)
    np.testing.assert_allclose(schedule.t, scheduler.timesteps.numpy(), rtol=2e-7)
    x = torch.tensor(NOISE)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tensor(velocity(x.numpy(), np.float32(t), np)), t, x).prev_sample
    ours = euler.flow_euler(velocity, jnp.asarray(NOISE), schedule)
    assert np.abs(ours - x.numpy()).max() <= 1e-5


def test_straight_flow_is_exact_in_one_step():
    """v = noise - x0 is constant along a straight path: any number of steps ends at x0."""
    data = np.random.default_rng(2).normal(size=NOISE.shape).astype("f")
    for steps in (1, 7):
        x = euler.flow_euler(lambda x, t: jnp.asarray(NOISE - data), jnp.asarray(NOISE), euler.schedule(steps, 3.0))
        np.testing.assert_allclose(x, data, atol=1e-6)


def test_shift_is_applied_twice():
    """A single shift, which looks right, ends 6 times too high or low; the last sigma tells."""
    schedule = euler.schedule(20, 3.0)
    assert schedule.sigma[-1] == pytest.approx(0.0089286, abs=1e-7)
    assert schedule.t[:2] == pytest.approx([1000, 981.8746], abs=1e-4)
