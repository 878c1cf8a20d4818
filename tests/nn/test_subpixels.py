"""The ends of an autoregressive network over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import ACTIVATIONS, dense, layer_norm, random_params
from vlm_jax.nn.subpixels import MixtureHead, SoftmaxHead, smooth_outputs, smooth_tables, waves

KEY = jax.random.key(0)


@pytest.mark.parametrize("levels", [3, 256])
def test_near_levels_start_near_each_other(levels: int):
    """Two that are d apart of L have the similarity sum cos(pi f d / (L - 1)) / f over f, which is 1 at d = 0."""
    basis = np.asarray(waves(levels), np.float64)
    frequencies = np.arange(1, min(levels, 64) + 1)
    apart = np.subtract.outer(np.arange(levels), np.arange(levels)) / (levels - 1)
    expected = np.cos(np.pi * apart[..., None] * frequencies) @ (1 / frequencies) / np.sum(1 / frequencies)
    np.testing.assert_allclose(basis @ basis.T, expected, atol=1e-4)
    assert levels == 3 or expected[0, 1] > 0.9


@pytest.mark.parametrize("head", ["softmax", "mixture"])
def test_a_head_is_a_norm_and_two_layers_of_what_the_network_says_and_of_the_sub_pixels_before(head: str):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    patch = np.array([[0, 2, 1], [1, 1, 1], [2, 0, 0], [0, 0, 2], [2, 2, 2]])
    module, args = {
        "softmax": (SoftmaxHead(3, 4, 8, norm_eps=0.3), (x, patch)),
        "mixture": (MixtureHead(6, 8, norm_eps=0.3), (x,)),
    }[head]
    params = random_params(jax.eval_shape(module.init, KEY, *args)["params"])
    y = jax.jit(lambda params: module.apply({"params": params}, *args))(params)
    states = x.astype(np.float64)
    if head == "softmax":
        told = params["table"]["embedding"][np.arange(2), patch[:, :2]].cumsum(axis=1)
        states = states[:, None] + params["query"]
        states[:, 1:] += told
    hidden = ACTIVATIONS["gelu_tanh"](dense(params["up"], layer_norm(params["norm"], states, 0.3)))
    np.testing.assert_allclose(y, dense(params["logits" if head == "softmax" else "mixture"], hidden), atol=1e-4)


def test_queries_start_with_the_deviation_of_a_fiftieth():
    module = SoftmaxHead(40, 2, 64)
    query = jax.jit(lambda key: module.init(key, jnp.zeros((1, 64)), jnp.zeros((1, 40), int))["params"]["query"])(KEY)
    np.testing.assert_allclose(query.std(), 0.02, rtol=0.05)


def test_tables_and_outputs_start_with_the_variance_of_independent_ones():
    tables = smooth_tables(jax.random.key(0), (4, 256, 128))
    np.testing.assert_allclose(np.var(tables, axis=(1, 2)), 1 / 4, rtol=0.2)
    kernel = smooth_outputs(jax.random.key(0), (128, 256))
    np.testing.assert_allclose(np.var(kernel), 1 / 128, rtol=0.2)
