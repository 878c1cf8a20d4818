"""The learned noise schedule: it rises from 0 to 1, whatever its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vlm_jax.nn.schedule import MonotoneSchedule

KEY = jax.random.key(0)
TIMES = jnp.linspace(0, 1, 101)


@pytest.mark.parametrize("perturbation", [0.0, 3.0])
def test_it_rises_from_0_to_1_at_the_stated_rate(perturbation: float):
    module = MonotoneSchedule()
    start = module.init(KEY, TIMES)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf + np.float32(perturbation * random.normal(size=leaf.shape)), start)
    progress, slope = module.apply(variables, TIMES)
    np.testing.assert_allclose(progress[jnp.array([0, -1])], [0, 1], atol=1e-6)
    assert (np.diff(progress) > 0).all()
    derivative = jax.vmap(jax.grad(lambda t: module.apply(variables, t)[0]))(TIMES)
    np.testing.assert_allclose(slope, derivative, rtol=1e-4)


def test_it_starts_as_a_line_and_as_much_of_sigmoids_that_rise_one_after_the_other():
    """The stated 1024 of them, ten times as steep as the line: near a line."""
    progress, slope = MonotoneSchedule().init_with_output(KEY, TIMES)[0]
    times = np.asarray(TIMES, np.float64)
    rise = times + scipy.special.expit(10 * (times[:, None] - np.linspace(0, 1, 1024))).mean(axis=1)
    np.testing.assert_allclose(progress, (rise - rise[0]) / (rise[-1] - rise[0]), atol=1e-5)
    np.testing.assert_allclose(progress, TIMES, atol=0.05)
    assert slope.min() > 0.7 and slope.max() < 1.3
