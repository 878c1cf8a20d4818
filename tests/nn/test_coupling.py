"""Layers of flows: each is undone by its inverse, and its log-determinant is that of its Jacobian."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from invertible import jacobian_log_det, random_variables
from reference import conv, random_params
from vlm_jax.nn.coupling import (
    ActNorm,
    Coupling,
    CouplingNet,
    InvertibleConv,
    MultiScale,
    Repeated,
    Split,
    Step,
    mixture_logit,
    mixture_logit_inverse,
    squeeze,
    transform,
    unsqueeze,
)
from vlm_jax.nn.masked_flow import MaskedStep

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 2, 2, 4))
CONTEXT = jax.random.normal(jax.random.key(1), (3, 2, 2, 2))

LAYERS = {
    "actnorm": (ActNorm(), ()),
    "convolution": (InvertibleConv(), ()),
    "affine": (Coupling(8), ()),
    "mixture": (Coupling(8, mixtures=3), (CONTEXT,)),
    "step": (Step(8), (CONTEXT,)),
    "repeated": (Repeated(partial(Step, 8), 3), ()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_undone_by_its_inverse_and_knows_its_determinant(name: str):
    module, context = LAYERS[name]
    variables = random_variables(module, X, *context)
    y, log_det = jax.jit(module.apply)(variables, X, *context)
    back, inverse_log_det = jax.jit(partial(module.apply, inverse=True))(variables, y, *context)
    assert np.abs(y - X).max() > 0.1
    np.testing.assert_allclose(back, X, atol=1e-4)
    assert log_det.shape == (3,)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-3)
    expected = jacobian_log_det(lambda x: module.apply(variables, x[None], *(c[:1] for c in context))[0], X[0])
    assert abs(expected) > 0.1
    np.testing.assert_allclose(log_det[0], expected, atol=1e-4)


def test_a_split_is_undone_given_its_noise_and_knows_its_determinant():
    module = Split()
    variables = random_variables(module, X)
    kept, noise, log_det = jax.jit(module.apply)(variables, X)
    same, other, inverse_log_det = jax.jit(module.apply)(variables, kept, noise)
    np.testing.assert_allclose(jnp.concatenate([same, other], axis=-1), X, atol=1e-5)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-5)
    expected = jacobian_log_det(lambda x: jnp.concatenate(module.apply(variables, x[None])[:2], axis=-1), X[0])
    np.testing.assert_allclose(log_det[0], expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_scales_are_undone_and_know_their_determinant(dtype: str):
    """In bfloat16 the networks round, and their input that the inverse has recovered rounds otherwise now and then."""
    module = MultiScale(partial(Step, 8, 2, dtype=dtype), 2, 2)
    x = jax.random.normal(KEY, (32, 4, 4, 1))
    variables = random_variables(module, x, scale=0.05)
    noise, log_det = jax.jit(module.apply)(variables, x)
    assert (noise.shape, noise.dtype, log_det.dtype) == ((32, 16), jnp.float32, jnp.float32)
    back = jax.jit(lambda noise: module.apply(variables, noise, (4, 4, 1), method="invert"))(noise)
    np.testing.assert_allclose(back, x, atol=1e-4 if dtype == "float32" else 0.1)
    if dtype == "float32":
        expected = jacobian_log_det(lambda x: module.apply(variables, x[None])[0], x[0])
        np.testing.assert_allclose(log_det[0], expected, atol=1e-3)


def test_actnorm_makes_the_first_batch_standard():
    x = 5 * jax.random.normal(KEY, (16, 4, 4, 3)) * jnp.array([0.1, 1, 10]) + jnp.array([-3, 0, 50])
    (y, _), _ = jax.jit(ActNorm().init_with_output)(KEY, x)
    np.testing.assert_allclose(np.mean(y, axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.var(y, axis=(0, 1, 2)), 1, atol=1e-4)


def test_actnorm_of_a_constant_channel_adds_a_millionth_to_its_variance():
    (y, _), variables = ActNorm().init_with_output(KEY, jnp.full((2, 2, 2, 1), 3.0))
    np.testing.assert_allclose(variables["params"]["log_scale"], -0.5 * math.log(1e-6), rtol=1e-6)
    np.testing.assert_allclose(variables["params"]["shift"], -3000, rtol=1e-5)
    np.testing.assert_allclose(y, 0, atol=1e-2)


def test_one_layer_stretches_or_shrinks_by_at_most_the_square_of_e():
    """exp(2 tanh(s / 2)): of small outputs exp(s), and of any its derivative is the log-determinant."""
    outputs = jnp.array([-1e4, -1.0, -0.01, 0.01, 1.0, 1e4])
    expected = np.array([-2, -2 * math.tanh(0.5), -0.01, 0.01, 2 * math.tanh(0.5), 2])
    x = jnp.full((6, 1, 1, 1), 3.0)
    network = jnp.stack([outputs, jnp.full(6, 0.5)], axis=-1)[:, None, None]
    y, log_det = transform(x, network, 0, inverse=False)
    np.testing.assert_allclose(log_det, expected, rtol=1e-4)
    np.testing.assert_allclose(y.ravel(), 3 * np.exp(expected) + 0.5, rtol=1e-4)


def test_a_mixture_is_the_logit_of_its_distribution_function():
    """1902.00275, equation 8, in float64; and its logistics are as bounded as an affine map."""
    random = np.random.default_rng(0)
    parameters = random.normal(size=(1, 4, 4, 2, 3, 3)) * np.array([1, 1, 0.5])
    parameters[0, 0, 0, 0, :, 2], parameters[0, 0, 0, 1, :, 2] = 1e4, -1e4
    x = random.normal(size=(1, 4, 4, 2))
    weights = scipy.special.softmax(parameters[..., 0], axis=-1)
    scales = np.exp(2 * np.tanh(parameters[..., 2] / 2))
    z = (x[..., None] - parameters[..., 1]) / scales
    below = np.sum(weights * scipy.special.expit(z), axis=-1)
    density = np.sum(weights * scipy.special.expit(z) * scipy.special.expit(-z) / scales, axis=-1)
    x, parameters = jnp.float32(x), jnp.float32(parameters)
    y, log_slope = mixture_logit(x, parameters)
    np.testing.assert_allclose(y, scipy.special.logit(below), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_slope, np.log(density / below / (1 - below)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(mixture_logit_inverse)(y, parameters), x, atol=1e-4)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with all hidden units dropped"])
def test_a_couplings_network_is_glows_of_relus_after_actnorms(dropped: bool):
    module, x = CouplingNet(8, 2, mixtures=2, dropout=1 - 1e-6), np.float32(X)
    params = random_params(jax.eval_shape(module.init, KEY, x)["params"])
    rngs = {"dropout": KEY}
    y = jax.jit(lambda params: module.apply({"params": params}, x, train=dropped, rngs=rngs))(params)
    for name in ("in", "hidden"):
        norm = params[f"norm_{name}"]
        x = conv(params[f"conv_{name}"], x) * np.exp(norm["log_scale"]) + norm["shift"]
        x = np.maximum(x, 0)
    np.testing.assert_allclose(y, conv(params["parameters"], x * (not dropped)), rtol=1e-4, atol=1e-4)


def test_the_logistics_of_a_coupling_start_apart_from_minus_two_to_two():
    x = jnp.zeros((1, 1, 1, 2))
    start = CouplingNet(8, 2, mixtures=3).init_with_output(KEY, x)[0].reshape(2, 11)
    logistics = start[:, 2:].reshape(2, 3, 3)
    np.testing.assert_array_equal(logistics[..., 1], [[-2, 0, 2]] * 2)
    assert jnp.sum(jnp.abs(start)) == 8


class Dropping(nn.Module):
    """A step that adds 0 or 2 to each element in training."""

    @nn.compact
    def __call__(self, x: jax.Array, context: None, *, inverse: bool, train: bool) -> tuple[jax.Array, jax.Array]:
        return x + nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x)), jnp.zeros(len(x))


def test_each_step_drops_out_by_itself():
    x = jnp.zeros((1, 8, 8, 1))
    sums, _ = Repeated(Dropping, 2).apply({}, x, train=True, rngs={"dropout": KEY})
    assert set(np.unique(sums)) == {0, 2, 4}


def test_every_actnorm_of_a_stack_sees_what_those_before_it_make_of_the_first_batch():
    """Each layer normalises its own input: with couplings that start as affine identities, all but the first stay."""
    x = 3 * jax.random.normal(KEY, (64, 4, 4, 4)) + 1
    variables = jax.jit(Repeated(partial(Step, 8), 3).init)(KEY, x)
    log_scale = np.asarray(variables["params"]["step"]["norm"]["log_scale"])
    np.testing.assert_allclose(log_scale[0], -math.log(3), atol=0.1)
    assert np.abs(log_scale[1:]).max() < 0.1


def test_an_invertible_convolution_starts_orthogonal_and_not_twice_the_same():
    variables = jax.jit(Repeated(partial(Step, 8), 2).init)(KEY, X)
    convolutions = {collection: tree["step"]["convolution"] for collection, tree in variables.items()}
    assert set(convolutions["constants"]) == {"permutation"}
    matrices = []
    for layer in range(2):
        single = jax.tree.map(lambda leaf, layer=layer: leaf[layer], convolutions)
        matrices.append(np.asarray(InvertibleConv().apply(single, jnp.eye(4)[None, None])[0][0, 0]))
    for matrix in matrices:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(4), atol=1e-5)
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1


def test_a_coupling_starts_as_the_identity():
    (y, log_det), _ = jax.jit(Coupling(8).init_with_output)(KEY, X)
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(log_det, 0)


def test_squeezing_gathers_squares_of_pixels():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    y = squeeze(x)
    np.testing.assert_array_equal(y[0, 0, 0], [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(unsqueeze(y), x)


@pytest.mark.parametrize(("depth", "loops"), [(8, False), (9, True)])
def test_a_short_stack_is_no_loop(depth: int, loops: bool):
    """In one, a convolution takes tens of times as long on the CPU."""
    module = Repeated(partial(MaskedStep, 8, partial(Step, 8)), depth)
    variables = jax.eval_shape(module.init, KEY, X)
    assert ("while" in jax.jit(module.apply).lower(variables, X).as_text()) == loops
