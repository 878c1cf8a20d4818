"""Encoders of text alone: T5 beside its formula, what a text attends to, and the tower that a run of CLIP has."""

import math
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec

from reference import ACTIVATIONS, dense, random_params, rms_norm
from smallest import CLIP
from vlm_jax.contract import abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.models import build, clip, text_encoder
from vlm_jax.nn.stack import Remat
from vlm_jax.nn.t5 import T5, bucket_of, relative_bias
from vlm_jax.pretrained.layout import nested
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings, to_global
from vlm_jax.start import Start, check_configs, reads_tokens, taken
from vlm_jax.trees import count_parameters, leaves_by_path, unstack

BATCH, LENGTH, EOS, VOCAB, EPS = 4, 20, 1, 12, 0.05
KEY = jax.random.key(0)
ENCODER = T5(
    vocab_size=VOCAB,
    context_length=LENGTH,
    width=8,
    depth=2,
    heads=4,
    head_width=3,
    mlp=10,
    buckets=8,
    max_distance=12,
    norm_eps=EPS,
)
TOWER = replace(
    CLIP.text,
    vocab_size=VOCAB,
    context_length=LENGTH,
    eos_id=EOS,
    transformer=replace(CLIP.text.transformer, depth=2, scan=True, dropout=0.0),
)
NETWORKS = {"gated": ENCODER, "relu": replace(ENCODER, feed_forward="relu"), "clip": TOWER}
CONFIGS = {name: text_encoder.Config(network=network) for name, network in NETWORKS.items()}
ENDS = np.array([19, 7, 0, 12])
TOKENS = np.random.default_rng(0).integers(2, VOCAB, (BATCH, LENGTH)).astype(np.int32)
TOKENS[np.arange(LENGTH) > ENDS[:, None]] = 0
TOKENS[np.arange(BATCH), ENDS] = EOS
INSIDE = np.arange(LENGTH) <= ENDS[:, None]


def shapes_of(config: text_encoder.Config) -> Any:
    model = build(config)
    return jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, BATCH))


def variables_of(config: text_encoder.Config) -> Any:
    return jax.tree.map(jnp.asarray, random_params(shapes_of(config), 0.4))


def features(config: text_encoder.Config, variables: Any, tokens: Any = TOKENS) -> np.ndarray:
    return np.asarray(jax.jit(build(config).text_features)(variables, tokens)[0])


def bucket(relative: int, buckets: int, max_distance: int) -> int:
    """Of a key so many places after its query, in float64: `_relative_position_bucket` of the release."""
    side, distance = buckets // 2, abs(relative)
    near = side // 2
    if distance >= near:
        share = math.log(distance / near) / math.log(max_distance / near)
        distance = min(side - 1, near + math.floor(share * (side - near) + 1e-9))
    return distance + (side if relative > 0 else 0)


def encoded(params: Any, tokens: np.ndarray, config: T5, depth: int | None = None) -> np.ndarray:
    """1910.10683, section 2.1, head by head, of a stack that is unrolled."""
    x = np.float64(params["token"]["embedding"])[tokens]
    place = np.arange(tokens.shape[1])
    buckets = [[bucket(key - query, config.buckets, config.max_distance) for key in place] for query in place]
    for i in range(config.depth if depth is None else depth):
        block = params[f"block_{i}"]
        y = rms_norm(block["attention_norm"], x, config.norm_eps)
        query, key, value = (
            np.split(dense(block["attention"][name], y), config.heads, axis=-1) for name in ("query", "key", "value")
        )
        heads = []
        for h in range(config.heads):
            logits = query[h] @ key[h].swapaxes(1, 2) + np.float64(params["relative_bias"])[:, h][buckets]
            logits = np.where(INSIDE[:, None], logits, -np.inf)
            heads.append(scipy.special.softmax(logits, axis=-1) @ value[h])
        x = x + dense(block["attention"]["out"], np.concatenate(heads, axis=-1))
        y, mlp = rms_norm(block["mlp_norm"], x, config.norm_eps), block["mlp"]
        hidden = dense(mlp["up"], y)
        relu = config.feed_forward == "relu"
        hidden = np.maximum(hidden, 0) if relu else ACTIVATIONS["gelu_tanh"](dense(mlp["gate"], y)) * hidden
        x = x + dense(mlp["down"], hidden)
    return rms_norm(params["final_norm"], x, config.norm_eps) if depth is None else x


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (4, 2), (6, 5), (16, 40)])
def test_a_distance_has_the_bucket_that_the_formula_gives_it(buckets: int, max_distance: int):
    config = replace(ENCODER, buckets=buckets, max_distance=max_distance)
    found = [bucket_of(distance, config) for distance in range(300)]
    assert found == [bucket(-distance, buckets, max_distance) for distance in range(300)]
    assert set(found) == set(range(buckets // 2))


def test_buckets_begin_where_the_published_ones_do():
    """Eight of one distance, then each half an octave, to whole numbers at the octaves."""
    found = [bucket_of(distance, text_encoder.T5_V1_1_XXL) for distance in range(200)]
    assert [found.index(number) for number in range(16)] == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]


def test_a_bias_depends_on_the_distance_and_the_side_alone():
    table = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    (bias,) = np.asarray(jax.jit(lambda: relative_bias(table, LENGTH, ENCODER))())
    for query, key in np.ndindex(LENGTH, LENGTH):
        np.testing.assert_array_equal(bias[:, query, key], table[bucket(key - query, 8, 12)])
    assert (bias != bias.swapaxes(1, 2)).sum() == 4 * LENGTH * (LENGTH - 1)  # the sides share none


@pytest.mark.parametrize("name", ["gated", pytest.param("relu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("scan", [True, False])
def test_the_encoder_computes_its_formula_at_the_layer_that_the_config_names(name: str, left_out: int, scan: bool):
    """With heads that are together wider than the model; all layers are initialised, whichever is read."""
    network = replace(NETWORKS[name], features=left_out, scan=scan)
    config = text_encoder.Config(network=network)
    variables = variables_of(config)
    params = unstack(variables["params"]["network"], "blocks", "block")
    assert {"block_0", "block_1", "final_norm"} <= params.keys()
    expected = encoded(params, TOKENS, network, depth=2 - left_out if left_out else None)
    found = features(config, variables)
    assert found.dtype == np.float32 and np.ptp(expected, axis=1).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_goes_to_its_first_end_and_what_follows_changes_nothing_in_it(name: str):
    variables, model = variables_of(CONFIGS[name]), build(CONFIGS[name])
    before, inside = jax.jit(model.text_features)(variables, TOKENS)
    np.testing.assert_array_equal(inside, INSIDE)
    other = np.where(INSIDE, TOKENS, np.random.default_rng(2).integers(0, VOCAB, TOKENS.shape)).astype(np.int32)
    np.testing.assert_allclose(features(CONFIGS[name], variables, other)[INSIDE], before[INSIDE], atol=1e-6)
    for place in (0, 5):
        changed = TOKENS.copy()
        changed[0, place] = 3 + TOKENS[0, place] % 5
        moved = (features(CONFIGS[name], variables, changed) != before).any(axis=2)
        first = place if name == "clip" else 0  # which looks back alone
        assert moved[0, first:].all() and moved.sum() == LENGTH - first


@pytest.mark.parametrize("name", CONFIGS)
def test_only_a_text_that_ends_is_read_where_the_network_finds_its_end(name: str):
    config = CONFIGS[name]
    spec = build(config).inputs["tokens"]
    assert (spec.shape, spec.limit, spec.contains) == ((LENGTH,), VOCAB, EOS)
    siglip = text_encoder.Config(network=replace(TOWER, pool="last"))
    assert build(siglip).inputs["tokens"].contains is None


@pytest.mark.parametrize("name", ["gated", pytest.param("relu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat", ["products", "all"])
def test_layers_compute_the_same_stacked_apart_and_again(name: str, remat: Remat):
    def loss(params: Any, config: text_encoder.Config) -> jax.Array:
        if not config.network.scan:
            params = {"network": unstack(params["network"], "blocks", "block")}
        return jnp.sum(jnp.square(build(config).text_features({"params": params}, TOKENS)[0]))

    params = variables_of(CONFIGS[name])["params"]
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(params, text_encoder.Config(network=replace(NETWORKS[name], scan=False)))
    actual = gradient(params, text_encoder.Config(network=replace(NETWORKS[name], remat=remat)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), actual, expected)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_close_to_float32_and_its_features_are_float32(name: str):
    """Within 3% in norm: each of some ten roundings in sequence is one of 0.4% at most."""
    network: Any = NETWORKS[name]
    if name == "clip":
        rounded = replace(network, transformer=replace(network.transformer, dtype="bfloat16"))
    else:
        rounded = replace(network, dtype="bfloat16")
    variables, config = variables_of(CONFIGS[name]), text_encoder.Config(network=rounded)
    exact, found = features(CONFIGS[name], variables), features(config, variables)
    assert found.dtype == np.float32
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.03
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(config))} == {np.dtype(np.float32)}


def test_the_logits_and_softmax_of_bfloat16_attention_are_float32():
    """All biases may be larger by 300, which bfloat16 would round to the next even number."""
    config = text_encoder.Config(network=replace(ENCODER, dtype="bfloat16"))
    variables = variables_of(config)
    before = features(config, variables)
    variables["params"]["network"]["relative_bias"] += 300
    assert np.linalg.norm(features(config, variables) - before) / np.linalg.norm(before) < 0.005


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_compute_what_one_does(name: str):
    """Gradients, too."""
    model, variables, batch = build(CONFIGS[name]), variables_of(CONFIGS[name]), np.concatenate([TOKENS, TOKENS[::-1]])

    def value_and_gradient(params: Any, tokens: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(model.text_features({"params": params}, tokens)[0]))

        return jax.value_and_grad(loss)(params)

    expected = jax.jit(value_and_gradient)(variables["params"], batch)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables["params"], parameter_shardings(variables["params"], model.rules, mesh))
        actual = jax.jit(value_and_gradient)(placed, to_global({"tokens": batch}, 8, mesh)["tokens"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), actual, expected)


def test_biases_lie_with_their_heads():
    model, params = build(CONFIGS["gated"]), shapes_of(CONFIGS["gated"])["params"]
    layouts = parameter_shardings(params, model.rules, make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))["network"]
    assert layouts["relative_bias"].spec == PartitionSpec(None, "tensor")
    assert layouts["blocks"]["attention"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(UserError, match=r"of 4 heads cannot be split over --mesh.tensor 8"):
        parameter_shardings(params, model.rules, make_mesh(MeshShape(tensor=8)))


def test_dropout_is_of_the_embedded_tokens_each_branch_and_what_comes_after_the_final_norm():
    """In training; in use there is none."""
    config = text_encoder.Config(network=replace(ENCODER, dropout=0.5, scan=False))
    variables, module, drawn = variables_of(config), text_encoder.TextEncoder(config), []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            drawn.append(np.mean(y == 0))
        return y

    for train, expected in ((True, 0.5), (False, 0.0)):
        drawn.clear()
        with nn.intercept_methods(record):
            module.apply(variables, TOKENS, train=train, rngs={"dropout": KEY})
        np.testing.assert_allclose(drawn, [expected] * (1 + 2 * ENCODER.depth + 1), atol=0.1)


def test_queries_begin_smaller_by_the_root_of_a_head_s_width():
    """In place of the scale that the logits lack; the tables begin with the release's deviations."""
    network = replace(ENCODER, vocab_size=500, width=64, head_width=16, buckets=128, max_distance=256)
    model = build(text_encoder.Config(network=network))
    params = jax.jit(model.init)(KEY, {"tokens": np.ones((1, LENGTH), np.int32)})["params"]["network"]
    attention = params["blocks"]["attention"]
    expected = {"query": (64 * 16) ** -0.5, "key": 64**-0.5, "value": 64**-0.5, "out": 64**-0.5}
    for name, deviation in expected.items():
        np.testing.assert_allclose(np.std(attention[name]["kernel"]), deviation, rtol=0.05, err_msg=name)
    np.testing.assert_allclose(np.std(params["token"]["embedding"]), 1, rtol=0.05)
    np.testing.assert_allclose(np.std(params["relative_bias"]), 64**-0.5, rtol=0.15)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("T5_V1_1_SMALL", 35_332_800),
        ("T5_V1_1_BASE", 109_628_544),
        ("T5_V1_1_LARGE", 341_231_104),
        ("T5_V1_1_XL", 1_223_527_424),
        ("T5_V1_1_XXL", 4_762_310_656),
    ],
)
def test_published_encoders_have_their_parameters(name: str, parameters: int):
    """As transformers counts those of a `T5EncoderModel` of these sizes (`tests/parity` asks it)."""
    config = text_encoder.Config(network=getattr(text_encoder, name))
    assert count_parameters(shapes_of(config)) == parameters


@pytest.mark.parametrize("left_out", [0, 1])
def test_the_text_tower_of_a_clip_run_becomes_an_encoder_by_a_start(left_out: int):
    """All but its projection, wherever features are read."""
    old = replace(CLIP, text=TOWER)
    config = text_encoder.Config(network=replace(TOWER, features=left_out))
    trained = build(replace(old, text=config.network))
    shapes = jax.eval_shape(trained.init, KEY, abstract_batch(trained.inputs, BATCH))
    variables = jax.tree.map(jnp.asarray, random_params(shapes, 0.4))
    start = Start(workdir="runs/clip", take="text", into="network", leave=("projection",))
    check_configs(start, old, config)
    given, told = taken(start, old, variables, config, shapes_of(config))
    assert told == [] and reads_tokens(config.network)
    assert given.keys() == leaves_by_path(shapes_of(config)).keys()
    expected, _ = jax.jit(trained.text_features)(variables, TOKENS)
    np.testing.assert_array_equal(features(config, nested(given)), expected)
    with pytest.raises(UserError, match=r"this run's model has no network/projection/kernel, which runs/clip has"):
        taken(replace(start, leave=()), old, variables, config, shapes_of(config))


def test_a_clip_s_own_tower_is_the_part_that_it_names():
    """Of the published CLIP that Stable Diffusion is told by: 123 million parameters without the projection."""
    config = text_encoder.Config(network=clip.CLIP_VIT_L14.text)
    assert count_parameters(shapes_of(config)) == 123_060_480


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_id": 12}, "eos_id is 12: it must be below vocab_size, which is 12"),
        ({"head_width": 0}, "head_width is 0: it must be at least 1"),
        ({"buckets": 2}, "buckets is 2: it must be even, and at least 4"),
        ({"buckets": 9}, "buckets is 9: it must be even"),
        ({"max_distance": 2}, "max_distance is 2 and the 2 nearest distances have buckets of their own"),
        ({"features": 3}, "features is 3 and there are depth=2 blocks to leave out: choose fewer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        replace(ENCODER, **settings)
