"""The decoder: beside its papers' formulas, and what rotary positions, masks, caches and shared heads promise."""

import logging
import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import reference
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.decoder import (
    Decoder,
    DecoderConfig,
    RotaryScaling,
    decoder_rules,
    rotary,
    rotary_frequencies,
    rotate,
)
from vlm_jax.nn.stack import unrolled
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings

EPS = 0.3
"""Of about the size of the squares that it is added to."""
CONFIG = DecoderConfig(width=8, depth=2, heads=4, kv_heads=2, head_width=6, mlp=12, norm_eps=EPS, scan=False)
SCANNED = replace(CONFIG, scan=True)
BATCH, LENGTH = 2, 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(BATCH, LENGTH, CONFIG.width)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
CAUSAL = np.broadcast_to(np.tri(LENGTH, dtype=bool), (BATCH, LENGTH, LENGTH))
LLAMA_3_2 = DecoderConfig(
    width=2048,
    depth=16,
    heads=32,
    kv_heads=8,
    head_width=64,
    mlp=8192,
    rope_base=500_000.0,
    rope_scaling=RotaryScaling(factor=32.0),
)


def random_params(config: DecoderConfig) -> Any:
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), X, POSITIONS)["params"]
    return reference.random_params(shapes)


def output(config: DecoderConfig, params: Any, x: Any, positions: Any = POSITIONS, mask: Any = None) -> jax.Array:
    return Decoder(config).apply({"params": params}, x, positions, mask, causal=True)[0]


apply = jax.jit(output, static_argnums=0)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def scanned() -> Any:
    return random_params(SCANNED)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_heads": 1, "qkv_bias": True},
        {"kv_heads": 4, "qk_norm": "rms", "rope_base": 50.0},
        {"qk_norm": "layer", "rope_scaling": RotaryScaling(factor=4.0, original_length=20)},
    ],
)
def test_a_decoder_is_that_of_the_formula(settings: dict[str, Any]):
    """At positions that differ from row to row and jump."""
    config = replace(CONFIG, **settings)
    params = random_params(config)
    positions = np.sort(RANDOM.integers(0, 40, size=(BATCH, LENGTH))).astype(np.int32)
    mask = CAUSAL & (RANDOM.random(CAUSAL.shape) < 0.7) | np.eye(LENGTH, dtype=bool)
    expected = reference.decoder(params, X, positions, mask, config, rotary_frequencies(config))
    np.testing.assert_allclose(apply(config, params, X, positions, mask[:, None]), expected, atol=2e-5)


def test_the_frequencies_fall_from_one_to_almost_the_base_as_in_the_paper():
    """2104.09864, section 3.2.2: theta_i = 10000 ^ (-2 (i - 1) / d) for i = 1 ... d / 2."""
    expected = [10_000 ** (-2 * (i - 1) / 6) for i in (1, 2, 3)]
    np.testing.assert_allclose(rotary_frequencies(CONFIG), expected, rtol=1e-12)


def test_the_scaled_frequencies_are_those_of_llama_3():
    """Meta's release compares wavelengths: above 8192 a 32nd of the frequency, below 2048 all of it, smooth between."""
    for actual, i in zip(rotary_frequencies(LLAMA_3_2), range(32), strict=True):
        frequency = 500_000 ** (-i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192 / 1:
            expected = frequency / 32
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 32 + smooth * frequency
        assert actual == pytest.approx(expected, rel=1e-12)
    middle = [i for i in range(32) if 8192 / 4 < 2 * math.pi * 500_000 ** (i / 32) < 8192]
    assert middle == [15, 16, 17]  # so that each branch was taken


def test_a_rotation_keeps_lengths_and_gives_products_that_depend_on_distances_alone():
    query, key = RANDOM.normal(size=(2, 1, 1, 1, 6)).astype(np.float32)

    def product(i: int, j: int) -> float:
        turned = [rotate(x, rotary(jnp.full((1, 1), place), CONFIG)) for x, place in ((query, i), (key, j))]
        np.testing.assert_allclose(np.linalg.norm(turned[0]), np.linalg.norm(query), rtol=1e-6)
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(5, 3) == pytest.approx(product(102, 100), abs=1e-5)
    assert product(0, 0) == pytest.approx(float(np.sum(query * key)), abs=1e-6)
    assert abs(product(5, 3) - product(3, 5)) > 0.1


def test_a_rotation_is_computed_in_float32_whatever_it_turns():
    """At position 100 003 an angle that bfloat16 had rounded would be a turn of some hundred off."""
    x = jnp.asarray(RANDOM.normal(size=(1, 1, 1, 6)), jnp.bfloat16)
    positions = np.full((1, 1), 100_003)
    y = rotate(x, rotary(jnp.asarray(positions), CONFIG))
    assert y.dtype == jnp.bfloat16
    exact = reference.rotate(np.float64(x[:, :, 0]), positions, rotary_frequencies(CONFIG))
    np.testing.assert_allclose(np.float64(y[:, :, 0]), exact, atol=0.02)


def test_only_differences_of_positions_count(params):
    """Of each row for itself."""
    moved = apply(CONFIG, params, X, POSITIONS + np.array([[100], [7]], np.int32))
    np.testing.assert_allclose(moved, apply(CONFIG, params, X), atol=2e-5)
    apart = apply(CONFIG, params, X, 2 * POSITIONS)
    assert (abs(apart - moved)[:, 1:].max(axis=(1, 2)) > 1e-3).all()


def test_a_later_token_changes_nothing_before_it(params):
    for changed in range(LENGTH):
        later = X.copy()
        later[:, changed] += 1
        before, after = apply(CONFIG, params, X), apply(CONFIG, params, later)
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed:] != after[:, changed:]).any(axis=(0, 2)).all()


def test_a_row_padded_on_the_left_is_the_row_alone(params):
    """Whatever the padding holds: its positions begin behind it, and a mask leaves it out."""
    pad = np.array([0, 2])
    positions = np.maximum(POSITIONS - pad[:, None], 0).astype(np.int32)
    mask = (np.arange(LENGTH) >= pad[:, None])[:, None, None]
    padded = apply(CONFIG, params, X, positions, np.broadcast_to(mask, (BATCH, 1, LENGTH, LENGTH)))
    np.testing.assert_allclose(padded[0], apply(CONFIG, params, X)[0], atol=1e-5)
    alone = np.concatenate([X[1:, 2:], X[1:, :2]], axis=1)  # causal: what comes behind changes nothing
    alone = apply(CONFIG, params, np.concatenate([alone, alone]))
    np.testing.assert_allclose(padded[1, 2:], alone[0, : LENGTH - 2], atol=1e-5)


def test_documents_packed_into_one_row_are_as_alone(params):
    segment = np.array([1, 1, 2, 2, 2, 2])
    mask = np.broadcast_to((segment[:, None] == segment)[None, None], (BATCH, 1, LENGTH, LENGTH))
    positions = np.broadcast_to(np.array([0, 1, 0, 1, 2, 3], np.int32), (BATCH, LENGTH))
    packed = apply(CONFIG, params, X, positions, mask)
    np.testing.assert_allclose(packed[:, :2], apply(CONFIG, params, X)[:, :2], atol=1e-5)
    second = np.concatenate([X[:, 2:], X[:, :2]], axis=1)
    np.testing.assert_allclose(packed[:, 2:], apply(CONFIG, params, second)[:, :4], atol=1e-5)


def test_a_prompt_and_then_a_token_at_a_time_are_the_full_pass(scanned):
    """With prompts of unequal lengths, padded on the left, a mask beside the cache, and layers that were scanned."""
    pad = np.array([0, 2])
    positions = np.maximum(POSITIONS - pad[:, None], 0).astype(np.int32)
    mask = np.broadcast_to(np.arange(LENGTH) >= pad[:, None], (LENGTH, BATCH, LENGTH)).swapaxes(0, 1)
    full = apply(SCANNED, scanned, X, positions, mask[:, None])
    config, layers = unrolled(SCANNED, scanned)
    room = empty_cache(BATCH, LENGTH + 1, config.kv_heads, config.head_width, layers=config.depth, dtype="float32")
    cache = tuple(Cache(part.key + 100, part.value + 100) for part in room)
    mask = np.pad(mask, [(0, 0), (0, 0), (0, 1)], constant_values=True)[:, None]

    @jax.jit
    def step(x: Any, positions: Any, mask: Any, cache: Any, slot: Any) -> Any:
        return Decoder(config).apply({"params": layers}, x, positions, mask, causal=True, cache=cache, slot=slot)

    for start, stop in [(0, 4), (4, 5), (5, 6)]:
        y, cache = step(X[:, start:stop], positions[:, start:stop], mask[:, :, start:stop], cache, start)
        for row in range(BATCH):
            first = max(start, pad[row])
            np.testing.assert_allclose(y[row, first - start :], full[row, first:stop], atol=1e-5)


@pytest.mark.parametrize("remat", ["products", "all"])
def test_scanned_and_rematerialised_layers_compute_what_unrolled_ones_do(scanned, remat: Any):
    def loss(params: Any, config: DecoderConfig) -> jax.Array:
        if not config.scan:
            config, params = unrolled(config, params)
        return jnp.sum(jnp.square(output(config, params, X)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(scanned, CONFIG)
    actual = gradient(scanned, replace(SCANNED, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_norms_of_queries_and_keys_have_the_parameters_of_their_models():
    def shapes(norm: Any) -> dict[str, tuple[int, ...]]:
        config = replace(CONFIG, qk_norm=norm)
        attention = jax.eval_shape(Decoder(config).init, jax.random.key(0), X, POSITIONS)["params"]["block_0"][
            "attention"
        ]
        return {f"{name}/{leaf}": x.shape for name in ("query_norm", "key_norm") for leaf, x in attention[name].items()}

    assert shapes("rms") == {"query_norm/scale": (6,), "key_norm/scale": (6,)}
    each = {"query_norm/scale": (4, 6), "query_norm/bias": (4, 6), "key_norm/scale": (2, 6), "key_norm/bias": (2, 6)}
    assert shapes("layer") == each


def test_layers_start_with_the_variance_of_their_depth():
    config = DecoderConfig(width=64, depth=3, heads=2, kv_heads=1, head_width=32, mlp=128)
    x, positions = np.zeros((1, 1, 64), np.float32), np.zeros((1, 1), np.int32)
    blocks = jax.jit(Decoder(config).init)(jax.random.key(0), x, positions)["params"]["blocks"]
    for kernel, fan_in in ((blocks["attention"]["out"]["kernel"], 64), (blocks["mlp"]["down"]["kernel"], 128)):
        np.testing.assert_allclose(np.var(kernel, axis=(1, 2)), 1 / (2 * config.depth) / fan_in, rtol=0.08)
    np.testing.assert_allclose(np.var(blocks["mlp"]["gate"]["kernel"]), 1 / 64, rtol=0.05)


def test_dropout_of_all_leaves_the_residual_stream(params):
    config = replace(CONFIG, dropout=1 - 1e-6)
    y, _ = jax.jit(
        lambda: Decoder(config).apply({"params": params}, X, POSITIONS, train=True, rngs={"dropout": jax.random.key(0)})
    )()
    np.testing.assert_allclose(y, reference.rms_norm(params["final_norm"], X, EPS), atol=1e-5)
    np.testing.assert_array_equal(apply(config, params, X), apply(CONFIG, params, X))


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters(params):
    """Within 2% in norm: each of some ten roundings in sequence is one of 0.4% at most."""
    config = replace(CONFIG, dtype="bfloat16")
    exact, rounded = apply(CONFIG, params, X), apply(config, params, X)
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(rounded.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), X, POSITIONS)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_heads": 3}, "4 heads of queries cannot share 3 heads of keys and values: choose kv_heads that divide"),
        ({"kv_heads": 0}, "4 heads of queries cannot share 0 heads"),
        ({"head_width": 5}, "a head of 5 features has no pairs to rotate: choose an even head_width"),
        ({"rope_base": 1.0}, "rope_base is 1.0: it must be above 1"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **settings)


@pytest.mark.parametrize(
    "settings", [{"factor": 0.5}, {"factor": 8.0, "low_frequency": 4.0}, {"factor": 8.0, "original_length": 0}]
)
def test_a_scaling_that_is_none_is_refused(settings: dict[str, float]):
    with pytest.raises(UserError, match="scales no rotation: the factor must be at least 1"):
        RotaryScaling(**settings)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_eight_devices_compute_what_one_does(kv_heads: int):
    """Whether the mesh splits the heads of keys and values or each device has them all; gradients too."""
    config = DecoderConfig(width=8, depth=1, heads=4, kv_heads=kv_heads, head_width=6, mlp=12, qkv_bias=True)
    x = RANDOM.normal(size=(4, LENGTH, config.width)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (4, LENGTH))
    params = random_params(config)

    def value_and_gradient(params: Any) -> Any:
        return jax.value_and_grad(lambda p: jnp.sum(jnp.square(output(config, p, x, positions))))(params)

    expected = jax.jit(value_and_gradient)(params)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, decoder_rules(config), mesh))
        actual = jax.jit(value_and_gradient)(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize(("kv_heads", "whole"), [(1, True), (2, False), (4, False)])
def test_heads_of_keys_and_values_that_the_mesh_does_not_divide_lie_whole_everywhere(kv_heads, whole, caplog):
    """One line says so, whatever the number of layers; features of a head would divide, but heads stay together."""
    config = replace(CONFIG, kv_heads=kv_heads, qkv_bias=True)
    params = random_params(config)
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])
    with caplog.at_level(logging.WARNING):
        layers = parameter_shardings(params, decoder_rules(config), mesh)["block_1"]["attention"]
    assert layers["query"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert layers["out"]["kernel"].spec == PartitionSpec("tensor", "fsdp")
    axis = None if whole else "tensor"
    for name in ("key", "value"):
        assert layers[name]["kernel"].spec == PartitionSpec("fsdp", axis)
        assert layers[name]["bias"].spec == PartitionSpec(axis)
    told = ["every device has all 1 heads of keys and values: --mesh.tensor 2 splits none"] if whole else []
    assert [record.message for record in caplog.records] == told


def test_heads_of_queries_that_the_mesh_does_not_divide_are_refused():
    """Though it would divide their features."""
    mesh = make_mesh(MeshShape(fsdp=2, tensor=4))
    params = random_params(replace(CONFIG, heads=6))
    message = (
        "the parameter block_0/attention/out/kernel of 6 heads cannot be split over --mesh.tensor 4: choose one that "
        "divides 6"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        parameter_shardings(params, decoder_rules(replace(CONFIG, heads=6)), mesh)
