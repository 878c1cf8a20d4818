"""Quantisers: codebooks move as their papers say, gradients go where they should, and codes are what they name."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.nn.codebook import RECENT, k_means, unit_length, use_of_codes, with_gradient
from vlm_jax.nn.quantize import (
    EMA,
    FSQ,
    LFQ,
    Learned,
    Quantised,
    Residual,
    SimVQ,
    quantizer,
)
from vlm_jax.sharding import MeshShape, make_mesh, to_global

KEY = jax.random.key(0)
Z = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32)
KINDS: dict[str, Any] = {
    "ema": EMA(size=7, width=2),
    "learned": Learned(size=7, width=2),
    "unit": Learned(size=7, width=2, unit=True),
    "simvq": SimVQ(size=7, width=2),
    "fsq": FSQ(levels=(3, 4)),
    "lfq": LFQ(width=2),
    "residual": Residual(book=EMA(size=5, width=2), books=3),
    "residual of signs": Residual(book=LFQ(width=2), books=2),
}
GRADIENTS = ["straight_through", "rotation"]


def begun(config: Any, z: np.ndarray = Z) -> Any:
    return jax.jit(quantizer(config).init)(KEY, z)


def apply(config: Any, variables: Any, z: Any, train: bool = False) -> tuple[Quantised, Any]:
    """And the collections after it."""
    module = quantizer(config)
    kept = [name for name in variables if name != "params"]
    return module.apply(variables, z, train=train, rngs={"codes": jax.random.key(1)}, mutable=kept)


def clusters_of(variables: Any) -> tuple[np.ndarray, np.ndarray]:
    found = variables["codebook"]["clusters"]
    return np.float64(found["count"]), np.float64(found["total"])


@pytest.mark.parametrize("name", KINDS)
def test_what_is_decoded_is_what_the_codes_name(name: str):
    """To the last bit: a decoder is told the codes of an image, and must paint as it did in training."""
    config = KINDS[name]
    variables = begun(config)
    found, _ = jax.jit(lambda v, z: apply(config, v, z))(variables, Z)
    assert found.codes.shape == (4, 3, 3, config.books)[: 3 + (config.books > 1)]
    assert found.codes.dtype == jnp.int32 and found.codes.min() >= 0 and found.codes.max() < config.size
    named = jax.jit(lambda v, codes: quantizer(config).apply(v, codes, method="look_up"))(variables, found.codes)
    if config.books == 1:
        np.testing.assert_array_equal(found.value, named)
    else:  # sums of as many terms, in another order perhaps
        np.testing.assert_allclose(found.value, named, atol=1e-6)
    assert len(np.unique(found.codes)) > 1


@pytest.mark.parametrize("name", ["ema", "learned", "simvq", "lfq", "fsq"])
def test_a_code_is_the_nearest(name: str):
    config = KINDS[name]
    variables = begun(config)
    z = np.tanh(Z) if name == "fsq" else Z
    book = np.float64(quantizer(config).apply(variables, jnp.arange(config.size), method="look_up"))
    found, _ = apply(config, variables, np.arctanh(np.clip(z, -0.999, 0.999)) if name == "fsq" else z)
    distance = np.square(np.float64(z)[..., None, :] - book).sum(axis=-1)
    if name == "fsq":  # whose even levels lie beside the middle: each feature goes to the nearest of its own
        book = np.float64(quantizer(config).apply(variables, found.codes, method="look_up"))
        assert np.abs(book - z).max() < 0.75
    else:
        np.testing.assert_array_equal(found.codes, distance.argmin(axis=-1))


def test_without_memory_an_average_is_a_step_of_k_means():
    config = EMA(size=7, width=2, decay=0.0, epsilon=0.0, restart=0.0)
    variables = begun(config)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), variables)
    found, state = apply(config, variables, Z, train=True)
    after = quantizer(config).apply(state, jnp.arange(7), method="look_up")
    flat, codes = Z.reshape(-1, 2), np.asarray(found.codes).ravel()
    for code in np.unique(codes):
        np.testing.assert_allclose(after[code], flat[codes == code].mean(axis=0), rtol=1e-5)


def test_averages_move_by_their_decay_and_are_smoothed_by_their_epsilon():
    config = EMA(size=7, width=2, decay=0.9, epsilon=0.3, restart=0.0)
    variables = begun(config)
    found, state = apply(config, variables, Z, train=True)
    flat, codes = np.float64(Z.reshape(-1, 2)), np.asarray(found.codes).ravel()
    count, total = clusters_of(variables)
    mine = np.eye(7)[codes]
    count, total = 0.9 * count + 0.1 * mine.sum(axis=0), 0.9 * total + 0.1 * mine.T @ flat
    for actual, expected in zip(clusters_of(state), (count, total), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    smoothed = count.sum() * (count + 0.3) / (count.sum() + 7 * 0.3)
    book = quantizer(config).apply(state, jnp.arange(7), method="look_up")
    np.testing.assert_allclose(book, total / smoothed[:, None], rtol=1e-5)
    _, still = apply(config, variables, Z, train=False)
    jax.tree.map(np.testing.assert_array_equal, still, {"codebook": variables["codebook"]})


def test_a_code_that_few_belong_to_begins_anew_as_one_of_the_batch():
    config = EMA(size=7, width=2, decay=0.5, restart=3.0)
    variables = begun(config)
    far = jax.tree.map(np.array, variables)
    far["codebook"]["clusters"]["count"][2], far["codebook"]["clusters"]["total"][2] = 4.0, [400.0, 0.0]
    _, state = apply(config, far, Z, train=True)
    count, total = clusters_of(state)
    assert count[2] == 3.0  # it had 4, and nothing is near it
    assert (np.abs(Z.reshape(-1, 2) - total[2] / 3).max(axis=1) < 1e-6).any()
    assert (count >= 3.0).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["ema", "learned", "simvq"])
def test_commitment_moves_the_features_and_nothing_else_does(name: str, gradient: str):
    """The penalty's gradient for the features is that of commitment, and for a codebook that of its own distance."""
    config = replace(KINDS[name], gradient=gradient)
    variables = begun(config)

    def penalty(config: Any) -> Any:
        def of(z: Any, params: Any) -> jax.Array:
            return apply(config, {**variables, "params": params}, z)[0].penalty

        return jax.grad(of, argnums=(0, 1))(jnp.asarray(Z), variables.get("params", {}))

    (features, book), (none, other) = penalty(config), penalty(replace(config, commitment=0.0))
    found, _ = apply(config, variables, Z)
    np.testing.assert_allclose(features, 0.25 * 2 * (Z - found.value) / Z.size, atol=1e-7)
    np.testing.assert_array_equal(none, np.zeros_like(Z))
    jax.tree.map(np.testing.assert_array_equal, book, other)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(book))
    if name == "learned":
        flat, codes = np.float64(Z.reshape(-1, 2)), np.asarray(found.codes).ravel()
        vectors = np.float64(variables["params"]["vectors"])
        expected = sum(np.eye(7)[code][:, None] * 2 * (vectors[code] - z) for code, z in zip(codes, flat, strict=True))
        np.testing.assert_allclose(book["vectors"], expected / Z.size, atol=1e-6)


def test_a_straight_gradient_is_the_codes_own():
    q = jnp.asarray(Z[::-1])
    np.testing.assert_array_equal(with_gradient(jnp.asarray(Z), q), q)
    _, back = jax.vjp(lambda z: with_gradient(z, q), jnp.asarray(Z))
    np.testing.assert_array_equal(back(jnp.asarray(Z))[0], Z)


def test_a_rotated_gradient_is_turned_and_stretched_as_the_features_are():
    """2410.06424, section 4.2: the derivative is |q| / |z| times the rotation that takes z to q."""
    random = np.random.default_rng(1)
    z, q = (jnp.asarray(random.normal(size=4), jnp.float32) for _ in range(2))
    np.testing.assert_array_equal(with_gradient(z, q, "rotation"), q)
    jacobian = np.float64(jax.jacobian(lambda z: with_gradient(z, q, "rotation"))(z))
    ratio = np.linalg.norm(q) / np.linalg.norm(z)
    np.testing.assert_allclose(jacobian @ np.float64(z), q, atol=1e-5)
    np.testing.assert_allclose(jacobian.T @ jacobian, ratio**2 * np.eye(4), atol=1e-4)
    np.testing.assert_allclose(np.linalg.det(jacobian), ratio**4, rtol=1e-4)
    across = random.normal(size=4)  # what is at right angles to both stays
    basis = np.linalg.qr(np.stack([z, q], axis=1))[0]
    across -= basis @ (basis.T @ across)
    np.testing.assert_allclose(jacobian @ across, ratio * across, atol=1e-5)


def test_vectors_of_unit_length():
    variables = begun(KINDS["unit"])
    variables = {"params": {"vectors": 3 * variables["params"]["vectors"]}}
    found, _ = apply(KINDS["unit"], variables, Z)
    np.testing.assert_allclose(np.linalg.norm(found.value, axis=-1), 1, rtol=1e-5)
    cosine = np.asarray(Z) @ np.asarray(unit_length(variables["params"]["vectors"])).T
    np.testing.assert_array_equal(found.codes, cosine.argmax(axis=-1))


@pytest.mark.parametrize("levels", [(3,), (4,), (5, 4), (8, 6, 5)])
def test_finite_scalars_have_as_many_values_as_codes(levels: tuple[int, ...]):
    config = FSQ(levels=levels)
    z = 3 * np.random.default_rng(0).normal(size=(20_000, len(levels))).astype(np.float32)
    found, _ = jax.jit(lambda z: apply(config, {}, z))(z)
    values, codes = np.asarray(found.value), np.asarray(found.codes)
    assert config.size == math.prod(levels) == len(np.unique(codes)) == len(np.unique(values, axis=0))
    assert len(np.unique(np.c_[values, codes], axis=0)) == config.size
    assert np.abs(values).max() <= 1
    all_values = quantizer(config).apply({}, jnp.arange(config.size), method="look_up")
    np.testing.assert_array_equal(values, all_values[codes])
    # A quarter of the way from one level to the next is still the first: of an odd number, around zero.
    odd = FSQ(levels=(5,))
    near = jnp.arctanh(jnp.float32([[0.45], [0.55], [-0.45], [-0.55]]) / 2 * 2 / (1 - 1e-3))
    np.testing.assert_allclose(apply(odd, {}, near / 2 * 2)[0].value.ravel(), [0.5, 0.5, -0.5, -0.5])


def test_the_gradient_of_finite_scalars_is_that_of_their_bound():
    config = FSQ(levels=(5,))
    z = jnp.float32([[0.0], [1.0]])
    gradient = jax.grad(lambda z: jnp.sum(apply(config, {}, z)[0].value))(z)
    np.testing.assert_allclose(gradient, (1 - np.tanh(np.asarray(z)) ** 2) * (1 - 1e-3), rtol=1e-5)


def test_signs_are_bits_and_their_entropy_is_that_of_all_codes():
    config = LFQ(width=3, inverse_temperature=0.7, entropy=0.1)
    z = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    found, _ = apply(config, {}, z)
    np.testing.assert_array_equal(found.value, np.where(z > 0, 1, -1))
    np.testing.assert_array_equal(found.codes, (z > 0) @ [1, 2, 4])
    corners = np.array([[2 * (code >> bit & 1) - 1 for bit in range(3)] for code in range(8)])
    p = np.exp(-0.7 * np.square(np.float64(z)[:, None] - corners).sum(axis=-1))
    p /= p.sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    decided, used = -(p * np.log(p)).sum(axis=1).mean(), -(mean * np.log(mean)).sum()
    commitment = 0.25 * np.square(z - np.asarray(found.value)).mean()
    np.testing.assert_allclose(found.penalty, 0.1 * (decided - used) + commitment, rtol=1e-5)


def test_each_residual_book_has_what_those_before_it_left():
    config = KINDS["residual"]
    variables = begun(config)
    found, _ = apply(config, variables, Z)
    errors = []
    for kept in range(1, 4):
        parts = [
            quantizer(config.book).apply(
                {"codebook": variables["codebook"][f"parts_{i}"]}, found.codes[..., i], method="look_up"
            )
            for i in range(kept)
        ]
        errors.append(np.square(Z - sum(parts)).mean())
    assert errors[0] > errors[1] > errors[2] > 0
    whole = apply(replace(config, dropout=0.0), variables, Z, train=True)[0].value
    fewer = {
        float(np.square(np.asarray(each - whole)).mean())
        for each in (
            quantizer(replace(config, dropout=1 - 1e-6))
            .apply(variables, Z, train=True, rngs={"codes": jax.random.key(i)}, mutable=["codebook"])[0]
            .value
            for i in range(12)
        )
    }
    assert len(fewer) == 2 and min(fewer) > 0  # of three books the last is left out, or the last two


def test_a_codebook_begins_as_the_centres_of_what_it_is_to_stand_for():
    """Never as noise: of well separated features each has a code."""
    centres = 10 * np.random.default_rng(3).permutation(np.stack(np.meshgrid(range(3), range(3)), -1).reshape(9, 2))
    z = centres[np.random.default_rng(4).integers(0, 9, 400)] + 0.01 * np.random.default_rng(5).normal(size=(400, 2))
    found, count = jax.jit(k_means, static_argnums=2)(KEY, jnp.float32(z), 60)
    assert count.sum() == 400
    occupied = np.asarray(found)[np.asarray(count) > 0]
    assert np.abs(np.linalg.norm(occupied[:, None] - centres, axis=-1).min(axis=1)).max() < 0.1
    assert len(np.unique(np.round(occupied / 10), axis=0)) == 9
    few, count = k_means(KEY, jnp.float32(z[:5]), 8)
    assert np.isfinite(few).all() and count.sum() == 5


def test_codes_in_use_are_those_seen_lately_and_perplexity_is_of_the_batch():
    age = jnp.full(8, RECENT)
    codes = jnp.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    use, age = use_of_codes(codes, age)
    np.testing.assert_allclose([use["code_use"], use["code_perplexity"]], [2 / 8, 2], rtol=1e-5)
    use, age = use_of_codes(jnp.full(int(RECENT) - 1, 5), age)
    np.testing.assert_allclose([use["code_use"], use["code_perplexity"]], [3 / 8, 1], rtol=1e-5)
    use, age = use_of_codes(jnp.array([5]), age)
    assert use["code_use"] == 1 / 8  # 0 and 1 were seen 65,536 tokens ago
    use, _ = use_of_codes(jnp.array([[0, 3], [1, 3]]), jnp.full((2, 8), RECENT))
    np.testing.assert_allclose([use["code_use"], use["code_perplexity"]], [(2 + 1) / 16, (2 + 1) / 2], rtol=1e-5)


def test_eight_devices_move_a_codebook_as_one_does():
    config = KINDS["ema"]
    z = np.random.default_rng(6).normal(size=(16, 2, 2, 2)).astype(np.float32)
    variables = begun(config, z)
    step = jax.jit(lambda v, z: apply(config, v, z, train=True))
    one, mesh = step(variables, z), make_mesh(MeshShape())
    with jax.set_mesh(mesh):
        eight = step(variables, to_global({"z": z}, len(z), mesh)["z"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, eight)


def test_quantisers_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"levels of FSQ are \[2, 5\]: each must be at least 3; LFQ has two of each"):
        FSQ(levels=(2, 5))
    with pytest.raises(UserError, match="a residual quantiser has 1 books: it must have 2 at least"):
        Residual(book=LFQ(width=2), books=1)
