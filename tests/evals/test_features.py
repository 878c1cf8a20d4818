"""Features: numbers by hand, sums that keep inner products, and axes that keep distances."""

from collections.abc import Callable

import numpy as np
import pytest

from vlm_jax.contract import Input
from vlm_jax.evals import features
from vlm_jax.evals.features import reader, turned

RNG = np.random.default_rng(0)
SEED = [0, 7]


def test_numbers_of_all_maps_stand_one_after_the_other() -> None:
    read = reader({"a": Input((2, 1), "float32"), "b": Input((2,), "float32")}, SEED)
    maps = {"b": np.float32([[5, 6], [7, 8]]), "a": np.float32([[[1], [2]], [[3], [4]]])}
    np.testing.assert_array_equal(read(maps), [[1, 2, 5, 6], [3, 4, 7, 8]])
    assert read(maps).dtype == np.float32


def test_a_code_is_one_of_as_many_numbers_as_there_are_codes_of_each_book() -> None:
    one = reader({"": Input((1, 2), "int32", 3)}, SEED)
    np.testing.assert_array_equal(one({"": np.array([[[0, 2]], [[1, 1]]])}), [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]])
    books = reader({"": Input((1, 1, 2), "int32", 2), "real": Input((1,), "float32")}, SEED)
    found = books({"": np.array([[[[1, 0]]]]), "real": np.float32([[0.5]])})
    np.testing.assert_array_equal(found, [[0, 1, 1, 0, 0.5]])


def averaged(monkeypatch: pytest.MonkeyPatch, specs: dict, maps: dict, dimensions: int) -> np.ndarray:
    """Inner products of the rows, the mean over many seeds."""
    monkeypatch.setattr(features, "LARGEST", dimensions)
    found = []
    for seed in range(3000):
        rows = reader(specs, [seed])(maps)
        assert rows.shape[1] == dimensions
        found.append(rows @ rows.T)
    return np.mean(found, axis=0)


def test_of_too_many_numbers_sums_are_taken_that_keep_inner_products_on_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = RNG.normal(size=(4, 3, 4)).astype(np.float32)
    exact = x.reshape(4, -1) @ x.reshape(4, -1).T
    np.testing.assert_allclose(averaged(monkeypatch, {"": Input((3, 4), "float32")}, {"": x}, 6), exact, atol=0.35)
    codes = RNG.integers(0, 5, (4, 3))
    same = (codes[:, None] == codes).sum(axis=-1)
    assert len(np.unique(same)) > 2
    np.testing.assert_allclose(averaged(monkeypatch, {"": Input((3,), "int32", 5)}, {"": codes}, 6), same, atol=0.15)


def test_arrays_of_one_size_have_the_same_sums_by_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LARGEST", 5)
    x = RNG.normal(size=(3, 12)).astype(np.float32)

    def read(shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
        return reader({"": Input(shape, "float32")}, seed)({"": x.reshape(3, *shape)})

    np.testing.assert_array_equal(read((12,), [1, 2]), read((2, 2, 3), [1, 2]))
    assert (read((12,), [1, 2]) != read((12,), [1, 3])).any()


@pytest.mark.parametrize("shape", [(20, 6), (8, 30)])
def test_axes_keep_all_distances_of_standardised_features(shape: tuple[int, int]) -> None:
    """Of more features than examples those of others are kept as far as training's reach."""
    training, others = (RNG.normal(size=(count, shape[1])) * np.arange(1, shape[1] + 1) + 3 for count in (shape[0], 5))
    found = turned(np.float32(training), np.float32(others))
    mean, deviation = training.mean(axis=0), training.std(axis=0)
    one, other = ((each - mean) / deviation / np.sqrt(shape[1]) for each in (training, others))
    np.testing.assert_allclose(found.training @ found.training.T, one @ one.T, atol=1e-5)
    np.testing.assert_allclose(found.held_out @ found.training.T, other @ one.T, atol=1e-5)
    if shape[0] > shape[1]:
        np.testing.assert_allclose(found.held_out @ found.held_out.T, other @ other.T, atol=1e-5)
    np.testing.assert_allclose(found.training.T @ found.training / len(one), np.diag(found.variances), atol=1e-6)
    np.testing.assert_allclose(found.training.mean(axis=0), 0, atol=1e-6)
    assert found.variances.sum() == pytest.approx(1)
    assert found.training.shape[1] == min(shape[1], shape[0] - 1)


@pytest.mark.parametrize("change", [lambda x: x[:, ::-1], lambda x: x * np.float32([3, -50, 0.1, 7]) + 2])
def test_order_unit_and_origin_of_features_are_nothing(change: Callable[[np.ndarray], np.ndarray]) -> None:
    training, others = (RNG.normal(size=(count, 4)).astype(np.float32) for count in (9, 3))
    found, same = turned(training, others), turned(change(training), change(others))
    np.testing.assert_allclose(same.held_out @ same.training.T, found.held_out @ found.training.T, atol=1e-5)
    np.testing.assert_allclose(same.variances, found.variances, atol=1e-6)


def test_what_never_varies_in_training_is_left_out() -> None:
    training = np.float32(np.column_stack([np.full(7, 0.1), RNG.normal(size=7)]))
    others = np.float32([[5, 0.5]])
    found = turned(training, others)
    alone = turned(training[:, 1:], others[:, 1:])
    np.testing.assert_array_equal(found.held_out, alone.held_out)
    nothing = turned(training[:, :1], others[:, :1])
    assert (nothing.training.shape, nothing.held_out.shape, nothing.variances.shape) == ((7, 0), (1, 0), (0,))
