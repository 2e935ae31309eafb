"""Guidance wrappers on velocities that are easy to see through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.sampling import flow_euler as euler
from sana_jax.sampling.guidance import classifier_free, fading, perturbed_attention, within

X = jnp.ones((2, 3))


def both(x, t):
    return -x, 2 * x + t


def test_classifier_free():
    np.testing.assert_allclose(classifier_free(both, 4.5)(X, 1.0), -X + 4.5 * (3 * X + 1.0 - -0 * X), rtol=1e-6)
    np.testing.assert_allclose(classifier_free(both, 1.0)(X, 1.0), 2 * X + 1, rtol=1e-6)


def test_classifier_free_combines_in_float32():
    def low(x, t):
        return x.astype(jnp.bfloat16), (x * 1.0078125).astype(jnp.bfloat16)

    v = classifier_free(low, 4.5)(X, 0.0)
    assert v.dtype == jnp.float32
    np.testing.assert_array_equal(v, 1 + 4.5 * 0.0078125 * X)


def test_within_is_open_at_both_ends():
    velocity = within(lambda x, t: x, lambda x, t: -x, (0.25, 0.75), sigma=lambda t: t)
    signs = [float(velocity(X, jnp.float32(t))[0, 0]) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert signs == [-1, -1, 1, -1, -1]


def test_within_runs_one_of_two_inside_a_scan():
    """Outside the interval the guided half is not computed at all."""
    calls = []

    def guided(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return x

    schedule = euler.schedule(10, 3.0)
    velocity = within(guided, lambda x, t: x, (0.5, 0.9), sigma=lambda t: t)
    jax.block_until_ready(euler.flow_euler(velocity, X, schedule, schedule.sigma))
    jax.effects_barrier()
    assert len(calls) == ((schedule.sigma > 0.5) & (schedule.sigma < 0.9)).sum()


def branches(x, t):
    return -x, 2 * x + t, 5 * x


def test_perturbed_attention_guides_away_from_the_perturbed():
    """v_u + w (v_c - v_u) + s (v_c - v_p) on 1: -1 + 4.5 * 4 + s (3 - 5), at t = 1."""
    for s in (0.0, 2.0):
        v = perturbed_attention(branches, 4.5, lambda t: s * t)(X, 1.0)
        np.testing.assert_allclose(v, (17 - 2 * s) * X, rtol=1e-6)
    without = perturbed_attention(lambda x, t: branches(x, t)[1:], 4.5, lambda t: 2.0)
    np.testing.assert_allclose(without(X, 1.0), (3 - 2 * 2) * X, rtol=1e-6)


def test_fading():
    faded = [float(fading(3.0, 0.01, jnp.float32(t))) for t in (1000, 900, 700, 500)]
    assert faded == pytest.approx([3, 2, 0, 0]) and float(fading(3.0, 0.0, 1.0)) == 3
