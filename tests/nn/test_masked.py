"""Gated masked convolutions: as masked kernels over the whole window, and what each pixel's output depends on."""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn.masked import GatedLayer, GatedStack

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(1, 5, 6, 4)).astype(np.float32)


def test_a_layer_is_that_of_the_paper_with_masked_kernels():
    """1606.05328, figure 2, with convolutions of the whole 3x3 and 1x3 windows whose weights to come are zero."""
    layer = GatedLayer(width=4, kernel=3)
    v, h = X, X[:, ::-1]
    call = jax.jit(lambda variables: layer.apply(variables, (v, h), None, False)[0])
    variables = jax.jit(lambda key: layer.init(key, (v, h), None, False))(KEY)
    params = variables["params"]

    def convolution(x: np.ndarray, layer: dict[str, jax.Array]) -> jax.Array:
        kernel = layer["kernel"]
        height = 3 if len(kernel) > 1 else 1
        masked = np.zeros((height, 3, *kernel.shape[2:]), np.float32)
        masked[: len(kernel), : kernel.shape[1]] = kernel
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, masked, (1, 1), "SAME", dimension_numbers=dimensions) + layer["bias"]

    def gate(x: jax.Array) -> jax.Array:
        return jnp.tanh(x[..., :4]) / (1 + jnp.exp(-x[..., 4:]))

    above = convolution(v, params["vertical_conv"])
    beside = convolution(h, params["horizontal_conv"]) + above @ params["link"]["kernel"]
    rows, pixels = call(variables)
    np.testing.assert_allclose(rows, v + gate(above), atol=1e-5)
    np.testing.assert_allclose(pixels, h + gate(beside) @ params["out"]["kernel"] + params["out"]["bias"], atol=1e-5)


def test_an_output_depends_on_all_pixels_before_its_own_and_on_no_other():
    """By derivatives, at a depth whose windows together span the image."""
    stack = GatedStack(width=4, depth=6, kernel=3)
    variables = jax.jit(stack.init)(KEY, X)
    jacobian = jax.jit(jax.jacrev(lambda x: jnp.sum(stack.apply(variables, x), axis=-1)))(X)[0, :, :, 0]
    influence = np.abs(jacobian).max(axis=-1).reshape(30, 30)
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((30, 30), bool), -1))
