"""Attention: beside jax's own, its causality, and decoding as the full pass a position at a time."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn.attention import Attention, Cache, attend, dot_product_attention, empty_cache
from vlm_jax.sharding import MeshShape, make_mesh

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 8
RANDOM = np.random.default_rng(0)
MODULE = Attention(width=WIDTH, heads=HEADS)
X = RANDOM.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
CONTEXT = RANDOM.normal(size=(BATCH, 3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(MODULE.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: (0.5 * RANDOM.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_jax(causal: bool, masked: bool):
    query, key, value = RANDOM.normal(size=(3, BATCH, LENGTH, HEADS, 4)).astype(np.float32)
    mask = None
    if masked:
        mask = RANDOM.random((BATCH, 1, LENGTH, LENGTH)) < 0.5
        mask |= np.eye(LENGTH, dtype=bool)  # a row that attends to nothing has no defined value
    y = jax.jit(dot_product_attention, static_argnames="causal")(query, key, value, mask, causal=causal)
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_the_logits_and_softmax_of_bfloat16_attention_are_float32():
    """At logits of some tens, whose rounding to bfloat16 would change the weights by a tenth."""
    query, key, value = jnp.asarray(RANDOM.normal(size=(3, 1, 16, 1, 16)), jnp.bfloat16)
    query = query * 16
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (query, key, value)))
    y = jax.jit(dot_product_attention)(query, key, value)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2**-6)


def test_causal_attention_sees_nothing_that_comes_later(variables):
    apply = jax.jit(lambda x: MODULE.apply(variables, x, causal=True)[0])
    for changed in range(LENGTH):
        later = X.copy()
        later[:, changed] += 1
        before, after = apply(X), apply(later)
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed:] != after[:, changed:]).any(axis=(0, 2)).all()


def test_decoding_a_position_at_a_time_is_the_full_causal_pass(variables):
    """Whatever the room that is not filled yet may hold."""
    full, _ = jax.jit(lambda x: MODULE.apply(variables, x, causal=True))(X)
    step = jax.jit(lambda x, cache, slot: MODULE.apply(variables, x, cache=cache, slot=slot))
    (empty,) = empty_cache(BATCH, LENGTH + 2, HEADS, WIDTH // HEADS, layers=1, dtype="float32")
    assert empty.key.shape == empty.value.shape == (BATCH, HEADS, LENGTH + 2, WIDTH // HEADS)
    cache = Cache(empty.key + 100, empty.value + 100)
    for position in range(LENGTH):
        y, cache = step(X[:, position : position + 1], cache, position)
        np.testing.assert_allclose(y[:, 0], full[:, position], atol=1e-6)


def test_several_positions_at_once_fill_the_cache_as_one_after_the_other_does(variables):
    full, _ = jax.jit(lambda x: MODULE.apply(variables, x, causal=True))(X)
    step = jax.jit(lambda x, cache, slot: MODULE.apply(variables, x, causal=True, cache=cache, slot=slot))
    (empty,) = empty_cache(BATCH, LENGTH + 2, HEADS, WIDTH // HEADS, layers=1, dtype="float32")
    y, cache = step(X[:, :2], Cache(empty.key + 100, empty.value + 100), 0)
    np.testing.assert_allclose(y, full[:, :2], atol=1e-6)
    y, _ = step(X[:, 2:], cache, 2)
    np.testing.assert_allclose(y, full[:, 2:], atol=1e-6)


def test_decoding_honours_a_mask_as_the_full_causal_pass_does(variables):
    """Prompts of unequal lengths, padded on the left: what one example leaves out another attends to."""
    mask = np.arange(LENGTH) >= np.array([0, 2])[:, None, None, None]
    mask = np.broadcast_to(mask, (BATCH, 1, LENGTH, LENGTH)) | np.eye(LENGTH, dtype=bool)
    full, _ = jax.jit(lambda x, mask: MODULE.apply(variables, x, mask=mask, causal=True))(X, mask)

    @jax.jit
    def step(x, mask, cache, slot):
        return MODULE.apply(variables, x, mask=mask, causal=True, cache=cache, slot=slot)

    (empty,) = empty_cache(BATCH, LENGTH + 2, HEADS, WIDTH // HEADS, layers=1, dtype="float32")
    room = np.pad(mask, [(0, 0), (0, 0), (0, 0), (0, 2)], constant_values=True)
    cache = Cache(empty.key + 100, empty.value + 100)
    for start, stop in [(0, 2), (2, 3), (3, 5)]:
        y, cache = step(X[:, start:stop], room[:, :, start:stop], cache, start)
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_in_a_cache_sees_itself_and_what_was_before_and_nothing_behind(variables, causal: bool):
    """Not causal: the tokens of an image, each of which sees the later ones too."""
    image = np.arange(LENGTH) >= 2
    mask = np.tri(LENGTH, dtype=bool) | (not causal) & image[:, None] & image
    full, _ = jax.jit(lambda x: MODULE.apply(variables, x, mask=mask[None, None]))(X)
    step = jax.jit(lambda x, cache, slot: MODULE.apply(variables, x, causal=causal, cache=cache, slot=slot))
    (empty,) = empty_cache(BATCH, LENGTH + 2, HEADS, WIDTH // HEADS, layers=1, dtype="float32")
    cache = Cache(empty.key + 100, empty.value + 100)
    for start, stop in [(0, 1), (1, 2), (2, 5)]:
        y, cache = step(X[:, start:stop], cache, start)
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-6)


def test_rows_may_stand_at_slots_of_their_own(variables):
    """Two prompts of unequal lengths side by side, each of which is then continued at its own end."""
    lengths = np.array([1, 3])
    full, _ = jax.jit(lambda x: MODULE.apply(variables, x, causal=True))(X)
    step = jax.jit(lambda x, cache, slot: MODULE.apply(variables, x, causal=True, cache=cache, slot=slot))
    (empty,) = empty_cache(BATCH, LENGTH + 2, HEADS, WIDTH // HEADS, layers=1, dtype="float32")
    _, cache = step(X[:, :3], Cache(empty.key + 100, empty.value + 100), np.zeros(BATCH, np.int32))
    for i in range(2):
        places = lengths + i
        y, cache = step(X[np.arange(BATCH), places][:, None], cache, places)
        np.testing.assert_allclose(y[:, 0], full[np.arange(BATCH), places], atol=1e-6)


QUERIES = RANDOM.normal(size=(BATCH, LENGTH, 6, 4)).astype(np.float32)


def shared(heads: int) -> np.ndarray:
    """Keys and values."""
    return RANDOM.normal(size=(2, BATCH, LENGTH, heads, 4)).astype(np.float32)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_share_keys_and_values_are_those_with_copies_of_them(heads: int, causal: bool):
    """Neighbouring heads share, as in 2305.13245; so do the gradients, which are the copies' sums."""
    key, value = shared(heads)
    mask = (RANDOM.random((BATCH, 6, LENGTH, LENGTH)) < 0.5) | np.eye(LENGTH, dtype=bool)

    def copied(key: jax.Array, value: jax.Array) -> jax.Array:
        key, value = (jnp.repeat(x, 6 // heads, axis=2) for x in (key, value))
        return dot_product_attention(QUERIES, key, value, mask, causal=causal)

    def grouped(key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(QUERIES, key, value, mask, causal=causal)

    def outputs(function) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(function, key, value)
        return y, *pullback(jnp.cos(y))

    for actual, expected in zip(jax.jit(lambda: outputs(grouped))(), jax.jit(lambda: outputs(copied))(), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_shared_keys_are_nowhere_copied():
    """Of 6 heads' keys, not an array of their size is in the program, forwards or backwards."""
    shapes = [jax.ShapeDtypeStruct((BATCH, size, heads, 4), jnp.float32) for size, heads in ((3, 6), (7, 2), (7, 2))]

    def gradient(*x: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: jnp.sum(dot_product_attention(*x)), argnums=(0, 1, 2))(*x)

    sizes = re.findall(r":f32\[([\d,]+)\]", str(jax.make_jaxpr(gradient)(*shapes)))
    assert BATCH * 7 * 2 * 4 in {math.prod(map(int, size.split(","))) for size in sizes}
    assert BATCH * 7 * 6 * 4 not in {math.prod(map(int, size.split(","))) for size in sizes}


def test_a_cache_of_shared_heads_with_a_mask_gives_what_the_full_pass_does():
    key, value = shared(2)
    mask = np.arange(LENGTH) >= np.array([0, 2])[:, None, None, None]
    mask = np.broadcast_to(mask, (BATCH, 1, LENGTH, LENGTH)) | np.eye(LENGTH, dtype=bool)
    full = jax.jit(lambda: dot_product_attention(QUERIES, key, value, mask, causal=True))()
    (cache,) = empty_cache(BATCH, LENGTH, 2, 4, layers=1, dtype="float32")
    step = jax.jit(lambda *x, **cache: attend(*x, causal=True, **cache))
    for start, stop in [(0, 3), (3, 4), (4, 5)]:
        tokens = (x[:, start:stop] for x in (QUERIES, key, value))
        y, cache = step(*tokens, mask[:, :, start:stop], cache=cache, slot=start)
        np.testing.assert_allclose(y, full[:, start:stop], atol=1e-6)


@pytest.mark.parametrize(("heads", "tensor"), [(2, 2), (3, 2), (1, 2), (2, 4)])
def test_a_mesh_that_splits_heads_changes_nothing(heads: int, tensor: int):
    """Whether it splits the heads of keys and values with those of the queries, or not."""
    queries = np.concatenate([QUERIES, QUERIES], axis=2)
    key, value = shared(heads)
    expected = jax.jit(dot_product_attention)(queries, key, value)
    mesh = make_mesh(MeshShape(data=2, tensor=tensor), jax.devices()[: 2 * tensor])
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(dot_product_attention)(queries, key, value), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (1, HEADS), (BATCH, HEADS)])
def test_a_mask_holds_for_the_examples_and_heads_that_it_names(shape: tuple[int, int]):
    query, key, value = RANDOM.normal(size=(3, BATCH, LENGTH, HEADS, 4)).astype(np.float32)
    mask = (RANDOM.random((*shape, LENGTH, LENGTH)) < 0.5) | np.eye(LENGTH, dtype=bool)
    y = jax.jit(dot_product_attention)(query, key, value, mask)
    mask = np.broadcast_to(mask, (BATCH, HEADS, LENGTH, LENGTH))
    for i, h in np.ndindex(BATCH, HEADS):
        logits = np.where(mask[i, h], query[i, :, h] @ key[i, :, h].T / 2, -np.inf)
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(y[i, :, h], weights @ value[i, :, h], atol=1e-5)


def test_queries_attend_to_a_context_through_their_own_projections(variables):
    def project(name: str, inputs: np.ndarray) -> np.ndarray:
        layer = variables["params"][name]
        return (inputs @ layer["kernel"] + layer["bias"]).reshape(BATCH, -1, HEADS, WIDTH // HEADS)

    query, key, value = project("query", X), project("key", CONTEXT), project("value", CONTEXT)
    logits = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(WIDTH // HEADS)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    attended = np.einsum("bhts,bshd->bthd", weights, value).reshape(BATCH, LENGTH, WIDTH)
    out = variables["params"]["out"]
    y, cache = jax.jit(MODULE.apply)(variables, X, CONTEXT)
    np.testing.assert_allclose(y, attended @ out["kernel"] + out["bias"], atol=1e-5)
    assert cache is None


def test_the_output_projection_starts_with_the_stated_share_of_variance():
    x = np.zeros((1, 1, 128), np.float32)
    params = jax.jit(Attention(width=128, heads=2, output_scale=0.1).init)(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(params["out"]["kernel"].std() ** 2, 0.1 / 128, rtol=0.05)
    np.testing.assert_allclose(params["query"]["kernel"].std() ** 2, 1 / 128, rtol=0.05)
