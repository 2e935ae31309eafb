"""Rung "solver": the sampler alone, on a velocity that is written down.

Against the recursion in float64 from the same closed forms (docs/numerics.md 4.3, 4.5, 4.7), and
against diffusers' scheduler, whose class and shift are those of the reference's folder.
"""

import jax.numpy as jnp
import numpy as np

from sana_jax.parity import peers
from sana_jax.parity.rows import compare, counted
from sana_jax.sampling import flow_dpm_solver as dpm
from sana_jax.sampling import flow_euler as euler
from sana_jax.sampling import scm

WORDS = {"flow-dpm-solver": "Flow-DPM-Solver", "flow-euler": "Flow-Euler", "scm": "SCM"}
SHAPE = (3, 8)
SEED = 12


def problem(steps, seed=3):
    """(weights [8 8], x [3 8], noise [steps 3 8]), float64."""
    rng = np.random.default_rng(seed)
    weights, x = rng.normal(size=(8, 8)) * 0.3, rng.normal(size=SHAPE)
    return weights, x, rng.normal(size=(steps, *SHAPE))


def velocity_of(weights, span):
    """velocity(x, t, xp): smooth, and different at every place and time; `span` is the largest t."""

    def velocity(x, t, xp=jnp):
        return xp.sin(x @ xp.asarray(weights, dtype=x.dtype)) + x * 0.5 + t / span

    return velocity


def ours(sampler, steps, shift, noise=None):
    """Our sampler's result, float32; `noise` in place of that of `problem`."""
    weights, x, drawn = problem(steps)
    noise = drawn if noise is None else noise
    velocity, x = velocity_of(weights, 1.0 if sampler == "scm" else 1000.0), jnp.float32(x)
    if sampler == "scm":
        return scm.scm(velocity, x, scm.schedule(steps), jnp.float32(noise))
    if sampler == "flow-euler":
        return euler.flow_euler(velocity, x, euler.schedule(steps, shift))
    return dpm.flow_dpm_solver(velocity, x, dpm.schedule(steps, shift))


def closed_form(sampler, steps, shift):
    """The same recursion in float64."""
    return {"flow-dpm-solver": dpm64, "flow-euler": euler64, "scm": scm64}[sampler](steps, shift)


def dpm64(steps, shift):
    weights, x, _ = problem(steps)
    velocity, before = velocity_of(weights, 1000.0), 0.0
    u = 0.999 * np.arange(steps, -1, -1) / steps
    sigma = shift * u / (1 + (shift - 1) * u)
    lam = np.log1p(-sigma[:-1]) - np.log(sigma[:-1])
    for k in range(steps):
        m = x - sigma[k] * velocity(x, np.floor(1000 * sigma[k]), np)
        second = 0 < k < steps - 1
        c = (lam[k + 1] - lam[k]) / (2 * (lam[k] - lam[k - 1])) if second else 0.0
        ratio = sigma[k + 1] / sigma[k]
        x, before = ratio * x + (1 - ratio) * (m + c * (m - before)), m
    return x


def euler64(steps, shift):
    weights, x, _ = problem(steps)
    velocity, last = velocity_of(weights, 1000.0), 0.001 * shift / (1 + 0.001 * (shift - 1))
    u = np.linspace(1.0, last, steps)
    sigma = np.append(shift * u / (1 + (shift - 1) * u), 0.0)
    for k in range(steps):
        x = x + (sigma[k + 1] - sigma[k]) * velocity(x, 1000 * sigma[k], np)
    return x


def scm64(steps, shift, sigma_d=0.5):
    """In TrigFlow's terms, as published, not in those that our sampler uses."""
    weights, x, noise = problem(steps)
    velocity, x = velocity_of(weights, 1.0), sigma_d * x
    tau = [1.57080, 1.3, 0.0] if steps == 2 else np.linspace(1.57080, 0, steps + 1)
    for k in range(steps):
        cos, sin = np.cos(tau[k]), np.sin(tau[k])
        t = sin / (cos + sin)
        norm = np.sqrt(t**2 + (1 - t) ** 2)
        y = norm * x / sigma_d
        f = sigma_d * ((1 - 2 * t) * y + (1 - 2 * t + 2 * t * t) * velocity(y, t, np)) / norm
        x0 = cos * x - sin * f
        x = np.cos(tau[k + 1]) * x0 + np.sin(tau[k + 1]) * sigma_d * noise[k]
    return x0 / sigma_d


def theirs(case):
    """diffusers' scheduler stepping through the same problem in float32."""
    import torch

    weights, x, noise = problem(case.steps)
    scheduler, x = peers.scheduler(case), torch.tensor(x, dtype=torch.float32)
    weights = torch.tensor(weights, dtype=torch.float32)

    def velocity(x, t):
        return torch.sin(x @ weights) + x * 0.5 + t

    if case.sampler != "scm":
        scheduler.set_timesteps(case.steps)
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t / 1000), t, x, return_dict=False)[0]
        return x.numpy()

    scheduler.set_timesteps(case.steps, **({} if case.steps == 2 else {"intermediate_timesteps": None}))
    sigma_d = scheduler.config.sigma_data
    x, generator = x * sigma_d, torch.Generator().manual_seed(SEED)
    for tau in scheduler.timesteps[:-1]:
        t = tau.sin() / (tau.cos() + tau.sin())
        norm = torch.sqrt(t**2 + (1 - t) ** 2)
        y = norm * x / sigma_d
        f = sigma_d * ((1 - 2 * t) * y + (1 - 2 * t + 2 * t * t) * velocity(y, t)) / norm
        x, x0 = scheduler.step(f, tau, x, generator=generator, return_dict=False)
    return (x0 / sigma_d).numpy()


def drawn(steps):
    """The noise that the scheduler draws in `theirs`, float32 [steps 3 8]."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return np.stack([torch.randn(SHAPE, generator=generator).numpy() for _ in range(steps)])


def rows(case):
    """Our sampler, at the model's shift, against the closed form and against the reference's scheduler."""
    name = f"{WORDS[case.sampler]}, {counted(case.steps)}"
    shift = case.pipeline().flow_shift
    against = compare(
        f"{name}, against float64",
        ours(case.sampler, case.steps, shift),
        closed_form(case.sampler, case.steps, shift),
        "solver",
    )
    noise = drawn(case.steps) if case.sampler == "scm" else None
    return [
        against,
        compare(f"{name}, against {case.scheduler}", ours(case.sampler, case.steps, shift, noise), theirs(case), "solver"),
    ]
