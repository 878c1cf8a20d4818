"""Gated masked convolutions: as masked kernels over the whole window, and what each pixel's output depends on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import conv, dense, random_params
from vlm_jax.nn.masked import GatedLayer, GatedStack

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(1, 5, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with both gates dropped"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_layer_is_that_of_the_paper_with_masked_kernels(kernel: int, dropped: bool):
    """1606.05328, figure 2 and section 2.3, with whole windows around the pixel whose weights to come are zero."""
    layer = GatedLayer(width=4, kernel=kernel, classes=3, dropout=1 - 1e-6)
    v, h, label = X, X[:, ::-1], np.array([2])
    args = (v, h), label, dropped
    params = random_params(jax.eval_shape(lambda: layer.init(KEY, *args))["params"], scale=0.3)
    rows, pixels = jax.jit(lambda params: layer.apply({"params": params}, *args, rngs={"dropout": KEY})[0])(params)

    def masked(x: np.ndarray, params: Any) -> np.ndarray:
        rows, columns, *widths = params["kernel"].shape
        whole = np.zeros((kernel if rows > 1 else 1, kernel, *widths))
        whole[:rows, :columns] = params["kernel"]
        return conv({"kernel": whole, "bias": params["bias"]}, x)

    def gate(x: np.ndarray) -> np.ndarray:
        return np.tanh(x[..., :4]) / (1 + np.exp(-x[..., 4:])) * (not dropped)

    told = np.split(params["label"][2], 2)
    above = masked(v, params["vertical_conv"]) + told[0]
    beside = masked(h, params["horizontal_conv"]) + above @ params["link"]["kernel"] + told[1]
    np.testing.assert_allclose(rows, v + gate(above), atol=1e-5)
    np.testing.assert_allclose(pixels, h + dense(params["out"], gate(beside)), atol=1e-5)


def test_each_layer_drops_out_by_itself_and_labels_start_with_the_deviation_of_a_fiftieth():
    """Two layers that each add 0 or 2 to a pixel's feature, of gates that are 1: sums of 0, 2 and 4."""
    stack, x = GatedStack(width=64, depth=2, kernel=1, classes=20, dropout=0.5), np.zeros((1, 1, 1, 64), np.float32)
    variables = jax.jit(stack.init)(KEY, x, np.array([0]))
    np.testing.assert_allclose(variables["params"]["layers"]["label"].std(), 0.02, rtol=0.05)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables["params"])
    params["layers"]["horizontal_conv"]["bias"][:] = 20
    params["layers"]["out"]["kernel"][:] = np.eye(64)
    sums = stack.apply({"params": params}, x, np.array([0]), train=True, rngs={"dropout": KEY})
    assert set(np.unique(sums.round(3))) == {0, 2, 4}


def test_an_output_depends_on_all_pixels_before_its_own_and_on_no_other():
    """By derivatives, at a depth whose windows together span the image."""
    stack = GatedStack(width=4, depth=6, kernel=3)
    variables = jax.jit(stack.init)(KEY, X)
    jacobian = jax.jit(jax.jacrev(lambda x: jnp.sum(stack.apply(variables, x), axis=-1)))(X)[0, :, :, 0]
    influence = np.abs(jacobian).max(axis=-1).reshape(30, 30)
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((30, 30), bool), -1))
