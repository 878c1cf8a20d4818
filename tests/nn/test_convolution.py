"""Group normalisation beside flax's, and the residual blocks around it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import conv, dense, group_norm, random_params, silu
from vlm_jax.nn.convolution import Downsample, GroupNorm, ResidualBlock, Upsample

RANDOM = np.random.default_rng(0)
X = (1 + RANDOM.normal(size=(2, 4, 4, 8))).astype(np.float32)
PARAMS = {name: RANDOM.normal(size=8).astype(np.float32) for name in ("scale", "bias")}


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_is_that_of_flax(groups: int, dtype: str):
    x = jnp.asarray(X, dtype)
    y = jax.jit(GroupNorm(groups, dtype).apply)({"params": PARAMS}, x)
    expected = jax.jit(nn.GroupNorm(groups, dtype=dtype).apply)({"params": PARAMS}, x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 2**-6  # one rounding of values up to 4
    np.testing.assert_allclose(np.float32(y), np.float32(expected), atol=tolerance)


def test_group_norm_takes_the_statistics_of_bfloat16_in_float32():
    """At a mean of 200 deviations, squares rounded to bfloat16 would be off by more than the variance.

    Operation by operation: a compiler that fuses them may keep more digits than the code asks for.
    """
    x = jnp.asarray(100 + RANDOM.integers(0, 2, (1, 5, 5, 8)), "bfloat16")
    y = GroupNorm(4).apply({"params": {"scale": np.ones(8), "bias": np.zeros(8)}}, x)
    groups = np.asarray(y).reshape(25, 4, 2)
    np.testing.assert_allclose(groups.mean(axis=(0, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(groups.std(axis=(0, 2)), 1, atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.3}])
def test_group_norm_adds_its_epsilon_to_the_variance(settings: dict[str, float]):
    """Of values whose variance is about a millionth, which is what it adds unless told otherwise."""
    x = X * np.float32(1e-3)
    y = jax.jit(GroupNorm(4, **settings).apply)({"params": PARAMS}, x)
    np.testing.assert_allclose(y, group_norm(PARAMS, x, 4, settings.get("epsilon", 1e-6)), rtol=1e-4, atol=1e-5)


def test_group_norm_of_constants_is_its_bias():
    """Their variance is zero, and rounding must not take it below."""
    x = np.broadcast_to(RANDOM.uniform(1, 1e5, (100, 1, 1, 1)), (100, 5, 5, 8)).astype(np.float32)
    y = jax.jit(GroupNorm(4).apply)({"params": {"scale": np.zeros(8), "bias": PARAMS["bias"]}}, x)
    np.testing.assert_allclose(y, np.broadcast_to(PARAMS["bias"], x.shape), rtol=1e-6)


@pytest.mark.parametrize("width", [8, 16])
def test_a_residual_block_starts_as_its_skip(width: int):
    module = ResidualBlock(width, groups=4)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    y = jax.jit(module.apply)(variables, X)
    assert ("skip" in variables["params"]) == (width != 8)
    if width == 8:
        np.testing.assert_array_equal(y, X)
    else:
        np.testing.assert_allclose(y, X @ variables["params"]["skip"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with its branch dropped"])
@pytest.mark.parametrize("width", [8, 16])
def test_a_residual_block_is_that_of_the_formula(width: int, dropped: bool):
    module = ResidualBlock(width, groups=4, dropout=1 - 1e-6)
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), X)["params"])
    rngs = {"dropout": jax.random.key(0)}
    y = jax.jit(lambda params: module.apply({"params": params}, X, train=dropped, rngs=rngs))(params)
    branch = conv(params["conv_in"], silu(group_norm(params["norm_in"], X, 4)))
    branch = silu(group_norm(params["norm_out"], branch, 4)) * (not dropped)
    skip = dense(params["skip"], X) if width != 8 else X
    np.testing.assert_allclose(y, skip + conv(params["conv_out"], branch), atol=1e-4)


def test_a_residual_block_drops_out_only_in_training():
    module = ResidualBlock(8, groups=4, dropout=0.5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    variables = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype(np.float32), shapes)
    train = jax.jit(lambda key: module.apply(variables, X, train=True, rngs={"dropout": key}))
    first, second = jax.random.split(jax.random.key(0))
    assert (train(first) != train(second)).any()
    apply = jax.jit(lambda dropout: ResidualBlock(8, 4, dropout).apply(variables, X), static_argnums=0)
    np.testing.assert_array_equal(apply(0.5), apply(0.0))


def test_down_halves_and_up_repeats_the_nearest():
    identity = np.zeros((3, 3, 8, 8), np.float32)
    identity[1, 1] = np.eye(8)
    variables = {"params": {"conv": {"kernel": identity, "bias": np.zeros(8, np.float32)}}}
    up = jax.jit(Upsample(8).apply)(variables, X)
    np.testing.assert_array_equal(up, X.repeat(2, axis=1).repeat(2, axis=2))
    params = {"conv": random_params(jax.eval_shape(lambda: variables["params"]["conv"]))}
    down = jax.jit(Downsample(8).apply)({"params": params}, X)
    np.testing.assert_allclose(down, conv(params["conv"], X, stride=2), atol=1e-4)
    assert down.shape == (2, 2, 2, 8)
