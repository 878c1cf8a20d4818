"""The stack: how it is compiled changes nothing that it computes, and its options do what they say."""

import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import empty_cache
from vlm_jax.nn.stack import unrolled
from vlm_jax.nn.transformer import ACTIVATIONS, Transformer, TransformerStack

UNROLLED = Transformer(width=8, depth=2, heads=2, mlp=16, scan=False)
SCANNED = replace(UNROLLED, scan=True)
BATCH, LENGTH = 2, 5
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(BATCH, LENGTH, UNROLLED.width)).astype(np.float32)


@pytest.fixture(scope="module")
def unrolled_params() -> Any:
    """Random values for every parameter, norms and biases too."""
    shapes = jax.eval_shape(TransformerStack(UNROLLED).init, jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: (0.5 * RANDOM.normal(size=leaf.shape)).astype(np.float32), shapes)


def stacked(params: Any) -> Any:
    """The parameters of the unrolled stack for the scanned one."""
    blocks = [params[f"block_{i}"] for i in range(UNROLLED.depth)]
    return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks), "final_norm": params["final_norm"]}


def output(
    config: Transformer, params: Any, x: jax.Array, *, causal: bool = False, train: bool = False, rngs: Any = None
) -> jax.Array:
    return TransformerStack(config).apply({"params": params}, x, causal=causal, train=train, rngs=rngs)[0]


apply = jax.jit(output, static_argnums=0, static_argnames=("causal", "train"))


def test_scanned_layers_compute_what_unrolled_ones_do(unrolled_params):
    unrolled = apply(UNROLLED, unrolled_params, X, causal=True)
    scanned = apply(SCANNED, stacked(unrolled_params), X, causal=True)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_a_position_at_a_time_is_the_full_causal_pass(unrolled_params, scan: bool):
    config, params = (SCANNED, stacked(unrolled_params)) if scan else (UNROLLED, unrolled_params)
    full = apply(config, params, X, causal=True)
    config, params = unrolled(config, params)
    cache = empty_cache(BATCH, LENGTH, config.heads, config.width // config.heads, layers=config.depth, dtype="float32")

    def step(cache: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        position, token = x
        y, cache = TransformerStack(config).apply({"params": params}, token[:, None], cache=cache, slot=position)
        return cache, y[:, 0]

    _, decoded = jax.jit(lambda x: jax.lax.scan(step, cache, (jnp.arange(LENGTH), x.swapaxes(0, 1))))(X)
    np.testing.assert_allclose(decoded.swapaxes(0, 1), full, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_rematerialisation_changes_neither_value_nor_gradient_and_keeps_less(unrolled_params, scan: bool):
    config, params = (SCANNED, stacked(unrolled_params)) if scan else (UNROLLED, unrolled_params)

    def loss(config: Transformer, params: Any) -> jax.Array:
        return jnp.sum(jnp.square(output(config, params, X, causal=True, train=True)))

    def kept(config: Transformer) -> int:
        residuals = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(config, p), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    products, everything = replace(config, remat="products"), replace(config, remat="all")
    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    expected = value_and_grad(config, params)
    for remat in (products, everything):
        actual = value_and_grad(remat, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    assert kept(everything) < kept(products) < kept(config)
    assert kept(everything) < kept(config) / 2


def test_scanned_layers_are_traced_once_whatever_the_depth():
    def products(depth: int) -> int:
        module = TransformerStack(replace(SCANNED, depth=depth))
        variables = jax.eval_shape(module.init, jax.random.key(0), X)
        return str(jax.make_jaxpr(module.apply)(variables, X)).count("dot_general")

    assert products(2) == products(5)


def test_scanned_layers_start_apart_and_with_the_variance_of_their_depth():
    config = Transformer(width=64, depth=3, heads=2, mlp=128)
    x = np.zeros((1, 1, 64), np.float32)
    blocks = jax.jit(TransformerStack(config).init)(jax.random.key(0), x)["params"]["blocks"]
    for kernel, fan_in in ((blocks["attention"]["out"]["kernel"], 64), (blocks["mlp"]["down"]["kernel"], 128)):
        np.testing.assert_allclose(np.var(kernel, axis=(1, 2)), 1 / (2 * config.depth) / fan_in, rtol=0.08)
    assert (blocks["mlp"]["up"]["kernel"][0] != blocks["mlp"]["up"]["kernel"][1]).all()


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_only_trains(unrolled_params, scan: bool):
    config, params = (SCANNED, stacked(unrolled_params)) if scan else (UNROLLED, unrolled_params)
    dropping = replace(config, dropout=0.5)

    def train(key: jax.Array) -> jax.Array:
        return apply(dropping, params, X, train=True, rngs={"dropout": key})

    first, second = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(train(first), train(first))
    assert (train(first) != train(second)).any()
    np.testing.assert_array_equal(apply(dropping, params, X), apply(config, params, X))


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_is_drawn_for_each_branch_of_each_layer(unrolled_params, scan: bool):
    """Each of the 4 branches of 2 layers adds 0, or its own 2 ** branch twice: 16 sums, if the draws differ."""
    depth, width = 2, 512
    config = Transformer(width=width, depth=depth, heads=1, mlp=1, dropout=0.5, scan=scan)
    x = np.zeros((1, 1, width), np.float32)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(TransformerStack(config).init, jax.random.key(0), x)["params"],
    )
    for layer in range(depth):
        for branch, module in enumerate((("attention", "out"), ("mlp", "down"))):
            block = params["blocks"] if scan else params[f"block_{layer}"]
            bias = block[module[0]][module[1]]["bias"]
            (bias[layer] if scan else bias)[:] = 2 ** (2 * layer + branch)
    params["final_norm"]["scale"][:] = 1
    sums = apply(config, params, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert len(np.unique(np.round(sums, 3))) == 16


def test_bfloat16_computes_every_product_in_bfloat16_and_keeps_float32_parameters():
    config = replace(UNROLLED, dtype="bfloat16", depth=1)
    module = TransformerStack(config)
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(module.apply)(variables, X)))
    # Query, key, value, output, weighted values, up and down; the logits of the softmax are accumulated in float32.
    assert Counter(products) == {"bf16": 7, "f32": 1}


def test_bfloat16_activations_pass_from_block_to_block_in_bfloat16():
    module = TransformerStack(replace(UNROLLED, dtype="bfloat16"))
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    capture = partial(module.apply, capture_intermediates=True, mutable=["intermediates"])
    _, state = jax.eval_shape(capture, variables, X)
    for block in ("block_0", "block_1"):
        x, _ = state["intermediates"][block]["__call__"][0]
        assert x.dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_is_close_to_float32(unrolled_params, scan: bool):
    """Within 2% in norm: each of some ten roundings in sequence is one of 0.4% at most."""
    config, params = (SCANNED, stacked(unrolled_params)) if scan else (UNROLLED, unrolled_params)
    exact, rounded = apply(config, params, X), apply(replace(config, dtype="bfloat16"), params, X)
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(rounded.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int):
    with pytest.raises(UserError, match=f"a transformer of width 8 cannot be split into {heads} heads: choose heads"):
        replace(UNROLLED, heads=heads)


def test_activations():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    erf = np.vectorize(math.erf)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), x * (1 + erf(x / 2**0.5)) / 2, atol=1e-6)
    tanh = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), x * (1 + tanh) / 2, atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


NORM_EPS = 0.3
"""Of about the size of the variances that it is added to."""


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_stack_is_that_of_the_formula(unrolled_params, activation: Any, causal: bool):
    config = replace(UNROLLED, activation=activation, norm_eps=NORM_EPS)
    expected = reference.transformer(unrolled_params, X, config, causal=causal)
    np.testing.assert_allclose(apply(config, unrolled_params, X, causal=causal), expected, atol=1e-5)


def test_a_mask_says_who_is_attended_to(unrolled_params):
    """With a mask of the past it is the causal stack."""
    mask = np.tri(LENGTH, dtype=bool)[None, None]
    past = jax.jit(lambda x: TransformerStack(UNROLLED).apply({"params": unrolled_params}, x, mask=mask)[0])
    np.testing.assert_allclose(past(X), apply(UNROLLED, unrolled_params, X, causal=True), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_of_all_leaves_the_residual_stream(unrolled_params, scan: bool):
    """At a rate of all but one in a million, no branch adds anything."""
    config, params = (SCANNED, stacked(unrolled_params)) if scan else (UNROLLED, unrolled_params)
    dropping = replace(config, dropout=1 - 1e-6)
    y = apply(dropping, params, X, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(y, reference.layer_norm(params["final_norm"], X, config.norm_eps), atol=1e-5)
