"""Masked-convolution flows: row by row, undone exactly, with the determinant of their Jacobian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invertible import jacobian_log_det, random_variables
from vlm_jax.nn.coupling import MultiScale
from vlm_jax.nn.masked_flow import MaskedStep, MaskedUnit, RowFlow

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 4, 4, 2))

LAYERS = {
    "rows": RowFlow(8, 2),
    "unit": MaskedUnit(8),
    "step": MaskedStep(8, 8, mixtures=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_undone_by_its_inverse_and_knows_its_determinant(name: str):
    module = LAYERS[name]
    variables = random_variables(module, X)
    y, log_det = jax.jit(module.apply)(variables, X)
    back, inverse_log_det = jax.jit(partial(module.apply, inverse=True))(variables, y)
    assert np.abs(y - X).max() > 0.1
    np.testing.assert_allclose(back, X, atol=1e-4)
    assert log_det.shape == (3,)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-3)
    expected = jacobian_log_det(lambda x: module.apply(variables, x[None])[0], X[0])
    assert abs(expected) > 0.1
    np.testing.assert_allclose(log_det[0], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_of_masked_steps_are_undone(dtype: str):
    """In bfloat16 the networks round, and their input that the inverse has recovered rounds otherwise now and then."""
    module = MultiScale(partial(MaskedStep, 8, 8, dtype=dtype), 2, 2)
    x = jax.random.normal(KEY, (16, 4, 4, 1))
    variables = random_variables(module, x, scale=0.05)
    noise, log_det = jax.jit(module.apply)(variables, x)
    assert (noise.dtype, log_det.dtype) == (jnp.float32, jnp.float32)
    back = jax.jit(lambda noise: module.apply(variables, noise, (4, 4, 1), method="invert"))(noise)
    np.testing.assert_allclose(back, x, atol=1e-4 if dtype == "float32" else 0.1)


def test_each_row_is_transformed_given_the_two_above_it_and_two_columns_on_either_side():
    x = jax.random.normal(KEY, (1, 6, 7, 1))
    module = RowFlow(8, 1)
    variables = random_variables(module, x)
    jacobian = jax.jit(jax.jacfwd(lambda x: module.apply(variables, x)[0][0, :, :, 0]))(x)[:, :, 0, :, :, 0]
    rows, columns = np.arange(6), np.arange(7)
    above = (rows[:, None] - rows)[:, None, :, None]
    across = np.abs(columns[:, None] - columns)[None, :, None, :]
    reached = (above > 0) & (above <= 2) & (across <= 2) | (above == 0) & (across == 0)
    np.testing.assert_array_equal(jacobian != 0, reached)


def test_a_unit_brings_every_side_to_each_pixel():
    """One layer sees none but the rows above; after four each of the corners depends on the others."""
    x = jax.random.normal(KEY, (1, 3, 3, 1))
    module = MaskedUnit(8)
    variables = random_variables(module, x)
    jacobian = jax.jit(jax.jacfwd(lambda x: module.apply(variables, x)[0][0, :, :, 0]))(x)[:, :, 0, :, :, 0]
    assert (jacobian.reshape(9, 9) != 0).all()


def test_a_unit_starts_as_the_identity():
    (y, log_det), _ = jax.jit(MaskedUnit(8).init_with_output)(KEY, X)
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(log_det, 0)
