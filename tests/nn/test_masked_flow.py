"""Masked-convolution flows: row by row, undone exactly, with the determinant of their Jacobian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invertible import jacobian_log_det, random_variables
from reference import conv, elu, random_params
from vlm_jax.nn.coupling import MultiScale, Step
from vlm_jax.nn.masked_flow import MaskedStep, MaskedUnit, RowFlow

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 4, 4, 2))

LAYERS = {
    "rows": RowFlow(8, 2),
    "unit": MaskedUnit(8),
    "step": MaskedStep(8, partial(Step, 8, mixtures=2)),
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


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_scales_of_masked_steps_are_undone(dtype: str):
    """In bfloat16 the networks round, and their input that the inverse has recovered rounds otherwise now and then."""
    module = MultiScale(partial(MaskedStep, 8, partial(Step, 8, dtype=dtype), dtype), 2, 2)
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


def test_a_row_is_scaled_and_shifted_by_the_formula():
    """exp(2 tanh(s / 2)) and t, of exponential linear units of the two rows above and five columns."""
    module, x = RowFlow(8, 2), np.asarray(X, np.float64)
    params = random_params(jax.eval_shape(module.init, KEY, X)["params"])
    y, log_det = jax.jit(module.apply)({"params": params}, X)
    above = np.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0)))
    # A window of two rows, with one of zeros below, gives at each row what stands below it and the next.
    hidden = elu(conv(params["conv_in"], above)[:, :4])
    outputs = conv(params["parameters"], elu(conv(params["conv_hidden"], hidden))).reshape(*x.shape, 2)
    log_scale = 2 * np.tanh(outputs[..., 0] / 2)
    np.testing.assert_allclose(y, x * np.exp(log_scale) + outputs[..., 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_det, log_scale.sum(axis=(1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_the_coupling_of_a_step_sees_the_context_and_drops_out_in_training():
    context = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    module, rngs = MaskedStep(8, partial(Step, 8, dropout=0.5)), {"dropout": KEY}
    variables = random_params(jax.eval_shape(module.init, KEY, X, context))
    apply = jax.jit(partial(module.apply, rngs=rngs), static_argnames="train")
    still, _ = apply(variables, X, context)
    assert np.abs(apply(variables, X, context + 1)[0] - still).max() > 1e-3
    assert np.abs(apply(variables, X, context, train=True)[0] - still).max() > 1e-3
