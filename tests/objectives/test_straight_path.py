"""The straight path: its bound in closed form, and what follows from a prediction."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives.likelihood import to_unit_range
from vlm_jax.objectives.straight import LOG_SNR, StraightPath, time_of

KEY = jax.random.key(0)
PATH = StraightPath("x")


def spread(t: jax.Array) -> jax.Array:
    return t[:, None, None, None]


@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_what_the_path_tells_of_gaussian_data_is_half_a_logarithm(deviation: float):
    """1/2 ln(1 + SNR v) between the ends, of an exact prediction, and what the first end leaves of the data."""
    v, rows = deviation**2, 1 << 18
    data_key, path_key = jax.random.split(KEY)
    x = deviation * jax.random.normal(data_key, (rows, 1, 1, 1))

    def predict(x_t: jax.Array, t: jax.Array) -> jax.Array:
        t = spread(t)
        return v * (1 - t) / (v * (1 - t) ** 2 + t**2) * x_t

    found = np.asarray(jax.jit(partial(PATH.divergence, predict))(x, path_key), np.float64)
    first, last = (0.5 * math.log1p(v * math.exp(end)) for end in LOG_SNR)
    expected = last - first + 0.5 * v * math.exp(LOG_SNR[0])
    assert found.std() / math.sqrt(rows) < 0.01 * expected
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / math.sqrt(rows))


@pytest.mark.parametrize("error", [0.0, 0.005 * math.log(2)], ids=["as it is", "five thousandths of a bit off"])
def test_the_bound_is_the_integral_of_half_the_snr_times_the_squared_error_over_log_snr(error: float):
    """Of errors that are known: c, whose integral is c^2 / 2 (SNR_1 - SNR_0), and c / SNR^(1/2), with c^2 / 2 for each
    unit of log SNR; at both ends what is left of the data, and the cost of a level whose noise is next to none."""
    image = jnp.arange(30_000, dtype=jnp.uint8).reshape(-1, 1, 1, 1) % 3
    x, (first, last) = to_unit_range(image, 3), LOG_SNR

    def found(off: Any) -> float:
        bound = PATH.bound(lambda x_t, t: x + spread(off(t)), x, image, 3, KEY)
        return float(np.asarray(bound, np.float64).mean()) + error

    left = 0.5 * math.exp(first) * 2 / 3
    steady, falling = found(lambda t: 2e-3 * jnp.ones_like(t)), found(lambda t: 0.3 * t / (1 - t))
    close = partial(math.isclose, abs_tol=1e-3)
    assert close(steady, left + 0.5 * 4e-6 * (math.exp(last) - math.exp(first))) == (error == 0)
    assert close(falling, left + 0.5 * 0.09 * (last - first)) == (error == 0)


def test_guidance_of_the_data_is_guidance_of_the_velocity():
    x_t, told, nothing = jax.random.normal(KEY, (3, 4, 2, 2, 1))
    t = jnp.float32([0.01, 0.2, 0.6, 1.0])

    def guided(of: str) -> jax.Array:
        one, two = (getattr(PATH, of)(each, x_t, t) for each in (told, nothing))
        return two + 3.0 * (one - two)

    np.testing.assert_allclose(x_t - spread(t) * guided("velocity"), guided("data"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predict", ["x", "velocity", "eps"])
def test_the_right_prediction_has_no_error_and_leads_to_the_data(predict: str):
    path = StraightPath(predict)
    x, eps = jax.random.normal(KEY, (2, 4, 2, 2, 1))
    t = jnp.float32([0.1, 0.3, 0.6, 0.9])
    output = {"x": x, "velocity": eps - x, "eps": eps}[predict]
    np.testing.assert_allclose(path.squared_error(output, x, eps, t), 0, atol=1e-9)
    np.testing.assert_allclose(path.data(output, path.noisy(x, t, eps), t), x, atol=1e-5)
    gain = {"x": 1 / 0.3, "velocity": 1, "eps": 1 / 0.7}[predict]
    np.testing.assert_allclose(path.squared_error(output + 1, x, eps, t)[1], gain**2, rtol=1e-4)


def test_a_shift_scales_the_noise():
    """A path whose noise has the deviation s is at t where the unit path is at s t / (1 + (s - 1) t)."""
    t, s = jnp.linspace(0.1, 0.9, 5), 0.25
    shifted = StraightPath(shift=s).shifted(t)
    np.testing.assert_allclose(shifted / (1 - shifted), s * t / (1 - t), rtol=1e-5)


def test_even_times_are_even_in_log_snr():
    t = np.asarray(PATH.even_times(KEY, 1000), np.float64)
    log_snr = np.sort(2 * np.log((1 - t) / t))
    np.testing.assert_allclose(log_snr, np.linspace(*LOG_SNR, 1000), atol=0.06)
    assert time_of(jnp.float32(0)) == 0.5
