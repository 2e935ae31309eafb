"""The pieces of the rectified flow, each against numbers that were worked out otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import flow


def keys(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_levels(shift):
    """In exact fractions sigma is s i / (1000 + (s - 1) i); the published float64 is within 1e-15 of it."""
    sigma, time = flow.levels(shift)
    i = np.arange(1000)
    exact = shift * i / (1000 + (shift - 1) * i)
    np.testing.assert_allclose(sigma, exact, rtol=2e-7, atol=1e-12)
    assert sigma.dtype == time.dtype == np.float32
    np.testing.assert_array_equal(time, np.trunc(time))
    below = 1000 * exact - time  # just below an integer where the rounding of float64 says so
    assert below.min() > -1e-9 and below.max() < 1 + 1e-9
    assert (sigma[0], time[0], time[-1]) == (0, 0, {1.0: 999, 3.0: 999, 6.0: 999}[shift])


def test_time_of_an_integer_is_truncated_as_published():
    """Number 500 at shift 3 is 750 exactly; 1 - linspace is a little less or more."""
    base = 1 - np.linspace(1, 0.001, 1000)
    published = (3.0 * base / (1 + 2.0 * base) * 1000).astype(np.int64)
    np.testing.assert_array_equal(flow.levels(3.0)[1], published)


def test_shift_at_its_ends():
    assert flow.shift_sigma(0.0, 3.0) == 0 and flow.shift_sigma(1.0, 3.0) == 1
    assert flow.shift_sigma(0.5, 3.0) == 0.75 and flow.shift_sigma(0.5, 1.0) == 0.5


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.6)])
def test_times_are_logit_normal(mean, std):
    """The share of 20000 numbers below each of five levels, to 4 standard deviations."""
    number = np.asarray(jax.jit(flow.sample_times, static_argnums=(1, 2))(keys(20000), mean, std))
    assert number.dtype == np.int32 and 0 <= number.min() and number.max() <= 999
    for level in (100, 300, 500, 700, 900):
        share = float(jax.scipy.stats.norm.cdf((np.log(level / (1000 - level)) - mean) / std))
        assert abs((number < level).mean() - share) <= 4 * np.sqrt(share * (1 - share) / 20000)


def test_the_largest_normal_stays_on_the_grid():
    """sigmoid(17) is 1 in float32."""
    assert int(flow.sample_times(keys(1), 40.0, 1.0)[0]) == 999
    assert int(flow.sample_times(keys(1), -200.0, 1.0)[0]) == 0


def test_a_row_draws_the_same_in_every_batch():
    number = flow.sample_times(keys(6))
    np.testing.assert_array_equal(flow.sample_times(keys(6)[2:3])[0], number[2])
    assert len(set(np.asarray(number).tolist())) > 1


def test_interpolate_and_target():
    x0, noise = (np.random.default_rng(i).normal(size=(3, 2, 2, 4)).astype("f") for i in (0, 1))
    sigma = jnp.float32([0, 0.25, 1])
    x = flow.interpolate(x0, noise, sigma)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_allclose(x[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(x[2], noise[2])
    # The target is the slope of the path: a step back along it from any level arrives at x0.
    v = flow.target(x0, noise)
    np.testing.assert_allclose(x - sigma[:, None, None, None] * v, x0, atol=1e-6)
