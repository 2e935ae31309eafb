"""The tables against the published worked example, and the solver against float64 and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.sampling import flow_dpm_solver as dpm

WEIGHTS = np.random.default_rng(0).normal(size=(8, 8)) * 0.3
NOISE = np.random.default_rng(1).normal(size=(3, 8))


def velocity(x, t, xp=jnp):
    """Smooth, nonlinear, of order 1; in the precision of its input."""
    return xp.sin(x @ WEIGHTS.astype(x.dtype)) + x * 0.5 + t / 1000


def closed_form(steps, shift, order):
    """The multistep update written out from docs/numerics.md 4.3 in float64, infinities and all."""
    sigma = dpm.times(steps, shift)
    with np.errstate(divide="ignore"):
        lam = np.log1p(-sigma) - np.log(sigma)
    x, data = NOISE.copy(), []
    for k in range(steps):
        data.append(x - sigma[k] * velocity(x, np.floor(1000 * sigma[k]), np))
        m, h, alpha = data[-1], lam[k + 1] - lam[k], 1 - sigma[k + 1]
        ratio, phi1 = sigma[k + 1] / sigma[k], np.expm1(-h)
        kth = dpm.orders(steps, order)[k]
        x = ratio * x - alpha * phi1 * m
        if kth == 2:
            h0 = lam[k] - lam[k - 1]
            x = x - 0.5 * alpha * phi1 * (m - data[-2]) * h / h0
        if kth == 3:
            r0, r1 = (lam[k] - lam[k - 1]) / h, (lam[k - 1] - lam[k - 2]) / h
            phi2 = phi1 / h + 1
            phi3 = phi2 / h - 0.5
            d0, d0_before = (m - data[-2]) / r0, (data[-2] - data[-3]) / r1
            d1 = d0 + r0 / (r0 + r1) * (d0 - d0_before)
            d2 = (d0 - d0_before) / (r0 + r1)
            x = x + alpha * phi2 * d1 - alpha * phi3 * d2
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20, 50])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_solver_follows_the_float64_closed_form(order, steps, shift):
    x = dpm.flow_dpm_solver(velocity, jnp.float32(NOISE), dpm.schedule(steps, shift, order))
    assert np.abs(x - closed_form(steps, shift, order)).max() <= 1e-5


def test_wrong_orders_are_seen():
    """The bound above is tight enough to tell the orders, and the last step's order, apart."""
    second = dpm.schedule(20, 3.0, 2)
    for wrong in (dpm.schedule(20, 3.0, 1), dpm.schedule(20, 3.0, 3), second._replace(c=second.c * 1.01)):
        x = dpm.flow_dpm_solver(velocity, jnp.float32(NOISE), wrong)
        assert np.abs(x - closed_form(20, 3.0, 2)).max() > 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [2.0, 3.0, 6.0])
def test_agrees_with_diffusers(order, shift):
    import torch
    from diffusers import DPMSolverMultistepScheduler

    for steps in (1, 2, 4, 14, 15, 20, 28):
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=order, prediction_type="flow_prediction",
            use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero",
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        schedule = dpm.schedule(steps, shift, order)
        assert (scheduler.timesteps.numpy() == schedule.t).all()
        x = torch.tensor(NOISE, dtype=torch.float32)
        for t in scheduler.timesteps:
            v = torch.tensor(velocity(x.numpy(), np.float32(t), np))
            x = scheduler.step(v, t, x).prev_sample
        ours = dpm.flow_dpm_solver(velocity, jnp.float32(NOISE), schedule)
        assert np.abs(ours - x.numpy()).max() <= 1e-5, steps


TIMES = {  # docs/numerics.md 4.4
    (14, 3.0): "999 974 947 916 881 843 799 749 691 624 545 449 333 187",
    (20, 3.0): "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136",
    (20, 6.0): "999 991 981 971 959 947 933 917 899 879 856 830 799 763 719 666 599 513 399 239",
}


@pytest.mark.parametrize("steps,shift", TIMES)
def test_published_times(steps, shift):
    assert list(dpm.schedule(steps, shift).t) == [int(t) for t in TIMES[steps, shift].split()]


def test_worked_table():
    schedule = dpm.schedule(20, 3.0)
    rows = {  # k: sigma, A, B, c, from docs/numerics.md 4.4
        0: (0.999666444, 0.982747317, 0.017252683, 0),
        1: (0.982419516, 0.981190916, 0.018809084, 0.092582474),
        10: (0.749624812, 0.947343478, 0.052656522, 0.500100581),
        18: (0.249791632, 0.545413219, 0.454586781, 0.807634556),
        19: (0.136239658, 0, 1, 0),
    }
    for k, row in rows.items():
        ours = schedule.sigma[k], schedule.a[k], schedule.b[k], schedule.c[k, 0]
        np.testing.assert_allclose(ours, row, rtol=1e-6, atol=1e-8)


def test_state_stays_float32_and_times_are_passed_on():
    seen = []

    def low_precision(x, t):
        assert x.dtype == jnp.float32
        seen.append(t.keys())
        return x.astype(jnp.bfloat16) * t["a"][:, None].astype(jnp.bfloat16)

    schedule = dpm.schedule(4, 3.0)
    times = {"a": jnp.ones((4, 3)), "b": jnp.zeros(4)}
    x = dpm.flow_dpm_solver(low_precision, jnp.float32(NOISE), schedule, times)
    assert x.dtype == jnp.float32 and set(seen[0]) == {"a", "b"}


def test_one_scan_whatever_the_number_of_steps():
    def program(steps):
        return str(jax.make_jaxpr(lambda x: dpm.flow_dpm_solver(velocity, x, dpm.schedule(steps, 3.0)))(NOISE))

    for steps in (4, 20):
        assert program(steps).count("scan[") == 1 and program(steps).count(" sin ") == 1
