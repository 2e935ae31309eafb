"""SCM against its published TrigFlow form in float64 (docs/numerics.md 4.7), and diffusers' scheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.sampling import scm

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(8, 8)) * 0.3
NOISE, DATA, FRESH = RNG.normal(size=(3, 8)), RNG.normal(size=(3, 8)), RNG.normal(size=(6, 3, 8))


def velocity(x, t, xp=jnp):
    """Smooth, nonlinear, of order 1; in the precision of its input."""
    return xp.sin(x @ WEIGHTS.astype(x.dtype)) + x * 0.5 + t


def closed_form(steps, first=0, data=None, sigma_d=0.5, net_sigma_d=None, middle=1.3):
    """The wrapped velocity and the update as they are published, in float64."""
    net_sigma_d = net_sigma_d or sigma_d
    tau = np.array([1.57080, middle, 0]) if steps == 2 else np.linspace(1.57080, 0, steps + 1)
    tau, x = tau[first:], sigma_d * NOISE
    if data is not None:
        x = np.cos(tau[0]) * sigma_d * data + np.sin(tau[0]) * x
    for k in range(len(tau) - 1):
        t = np.sin(tau[k]) / (np.cos(tau[k]) + np.sin(tau[k]))
        root = np.sqrt(t**2 + (1 - t) ** 2)
        y = x / net_sigma_d * root
        f = ((1 - 2 * t) * y + (1 - 2 * t + 2 * t**2) * velocity(y, t, np)) / root * net_sigma_d
        x0 = np.cos(tau[k]) * x - np.sin(tau[k]) * f
        x = np.cos(tau[k + 1]) * x0 + np.sin(tau[k + 1]) * sigma_d * FRESH[k]
    return x0 / sigma_d


def ours(steps, first=0, data=None, noise=NOISE, fresh=FRESH):
    schedule = scm.schedule(steps, first)
    data = None if data is None else jnp.float32(data)
    return scm.scm(velocity, jnp.float32(noise), schedule, jnp.float32(fresh[: steps - first]), data)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_follows_the_published_form(steps):
    assert np.abs(ours(steps) - closed_form(steps)).max() <= 2e-6
    # sigma_d is one number that two formulas share: it cancels, unless they disagree about it.
    assert np.abs(closed_form(steps, sigma_d=0.7) - closed_form(steps)).max() <= 1e-12
    assert np.abs(closed_form(steps, net_sigma_d=1.0) - closed_form(steps)).max() > 0.1


@pytest.mark.parametrize("steps, strength, first", [(2, 0.6, 0), (2, 0.5, 1), (4, 0.5, 2), (4, 0.6, 1), (1, 0.3, 0), (3, 1.0, 0)])
def test_begins_with_data(steps, strength, first):
    assert scm.first_step(steps, strength) == first
    image = ours(steps, first, DATA)
    assert np.abs(image - closed_form(steps, first, DATA)).max() <= 2e-6
    if first:
        assert np.abs(image - ours(steps, first)).max() > 0.1


def test_controls():
    reference = closed_form(2)
    assert np.abs(ours(2, noise=0.5 * NOISE) - reference).max() > 0.1  # the noise is standard normal
    assert np.abs(ours(2, fresh=0.5 * FRESH) - reference).max() > 0.1
    assert np.abs(closed_form(2, middle=1.57080 / 2) - reference).max() > 0.01  # only two steps have 1.3
    assert np.abs(ours(2, fresh=FRESH[::-1]) - reference).max() > 0.1


def test_times():
    assert scm.schedule(1).t == pytest.approx([1.0000037], abs=1e-7)
    two = scm.schedule(2)
    np.testing.assert_allclose(two.t, [1.0000037, np.sin(1.3) / (np.cos(1.3) + np.sin(1.3))], rtol=1e-7)
    np.testing.assert_array_equal(two.after, [two.t[1], 0])
    np.testing.assert_array_equal(scm.schedule(4, 1).t, scm.schedule(4).t[1:])


def test_the_last_noise_is_drawn_and_not_used():
    other = FRESH.copy()
    other[1] = 7
    np.testing.assert_array_equal(ours(2), ours(2, fresh=other))


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_agrees_with_diffusers_scheduler(steps, monkeypatch):
    """Their scheduler under the wrapper of their pipeline, which is spelled out here in float32."""
    import torch
    from diffusers import SCMScheduler
    from diffusers.schedulers import scheduling_scm

    draws = [torch.tensor(f, dtype=torch.float32) for f in FRESH]
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *_, **__: draws.pop(0))
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    x = 0.5 * torch.tensor(NOISE, dtype=torch.float32)
    for tau in scheduler.timesteps[:-1]:
        t = torch.sin(tau) / (torch.cos(tau) + torch.sin(tau))
        y = x / 0.5 * torch.sqrt(t**2 + (1 - t) ** 2)
        v = torch.tensor(velocity(y.numpy(), t.numpy(), np))
        f = 0.5 * ((1 - 2 * t) * y + (1 - 2 * t + 2 * t**2) * v) / torch.sqrt(t**2 + (1 - t) ** 2)
        x, data = scheduler.step(f, tau, x, return_dict=False)
    assert np.abs(ours(steps) - (data / 0.5).numpy()).max() <= 5e-6


def test_state_stays_float32_and_one_scan():
    def low(x, t):
        assert x.dtype == jnp.float32
        return x.astype(jnp.bfloat16) * t["a"].astype(jnp.bfloat16)

    x = scm.scm(low, jnp.float32(NOISE), scm.schedule(4), jnp.float32(FRESH[:4]), times={"a": jnp.ones(4)})
    assert x.dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda n: scm.scm(velocity, n, scm.schedule(4), jnp.float32(FRESH[:4])))(jnp.float32(NOISE)))
    assert text.count("scan[") == 1
