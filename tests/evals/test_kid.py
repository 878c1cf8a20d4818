"""The kernel distance by loops, by closed forms, and without bias; and how it is named."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judging import sampler, seeing

from vlm_jax.evals import kid
from vlm_jax.evals.kid import kernel_distance, squared_discrepancy, subset_size


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Demystifying MMD GANs, equations 2 and 4, pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    def within(z: np.ndarray) -> float:
        pairs = list(itertools.permutations(range(len(z)), 2))
        return sum(k(z[i], z[j]) for i, j in pairs) / len(pairs)

    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


@pytest.mark.parametrize(("n", "m", "d"), [(7, 5, 3), (2, 2, 1), (4, 9, 16)])
def test_it_is_the_sum_over_pairs(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), 1 + 2 * rng.normal(size=(m, d))
    assert squared_discrepancy(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)


def of_moments(differences: tuple[float, float, float]) -> float:
    """MMD^2 of two distributions of numbers, of the differences of their first three moments: the kernel is a sum of
    products of powers."""
    return sum(math.comb(3, power) * each**2 for power, each in enumerate(differences, 1))


def test_its_mean_over_all_samples_is_the_discrepancy_itself() -> None:
    """Of two numbers each, out of three: exactly, though no sample is large, and 0 of one distribution."""
    values, shares = np.array([0.0, 1.0, 3.0]), {"x": (0.5, 0.3, 0.2), "y": (0.2, 0.2, 0.6)}

    def mean(one: str, other: str) -> float:
        total = 0.0
        for drawn in itertools.product(range(3), repeat=4):
            chance = math.prod(shares[one][i] for i in drawn[:2]) * math.prod(shares[other][i] for i in drawn[2:])
            x, y = values[list(drawn[:2]), None], values[list(drawn[2:]), None]
            total += chance * squared_discrepancy(x, y)
        return total

    moments = [values**power @ (np.array(shares["x"]) - shares["y"]) for power in (1, 2, 3)]
    assert mean("x", "y") == pytest.approx(of_moments(tuple(moments)), rel=1e-12)
    assert mean("x", "x") == pytest.approx(0, abs=1e-12)


def test_halves_of_one_distribution_are_no_distance_apart_within_its_error_and_shifted_ones_are() -> None:
    """Of 600 numbers, by the moments of all that they might be."""
    rng = np.random.default_rng(1)
    one, other = rng.uniform(-1, 1, (2, 600, 1))
    same = kernel_distance(one, other)
    assert same.deviation is not None and abs(same.mean) < same.deviation < 0.1
    shift = 1.0
    apart = kernel_distance(one, other + shift)
    assert apart.mean == pytest.approx(of_moments((shift, shift**2, shift**3 + shift)), rel=0.25)
    assert apart.deviation is not None and apart.mean > 5 * apart.deviation


def test_it_is_the_mean_and_deviation_over_subsets_of_both() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 9, 4))
    rng, values = np.random.default_rng(0), []
    for _ in range(100):
        chosen = rng.choice(9, 4, replace=False), rng.choice(9, 4, replace=False)
        values.append(by_loops(x[chosen[0]], y[chosen[1]]))
    found = kernel_distance(x, y)
    assert found == (pytest.approx(np.mean(values)), pytest.approx(np.std(values)))
    assert kernel_distance(x, y) == found


def test_subsets_are_of_1000_or_half_of_all() -> None:
    assert [subset_size(count) for count in (2, 3, 4, 9, 1500, 2000, 50_000)] == [2, 2, 2, 4, 750, 1000, 1000]
    x, y = np.random.default_rng(0).normal(size=(2, 2, 3))
    assert kernel_distance(x, y) == (pytest.approx(by_loops(x, y)), None)


def test_it_says_whose_eyes_it_is_seen_with_and_of_how_many() -> None:
    """Samples of one grey among real ones of another: of two numbers apart nothing varies."""
    subject = sampler(np.full((6, 2, 2, 1), 10, np.uint8), 40)
    expected = pytest.approx(((10 * 10 + 1) ** 3) + (40 * 40 + 1) ** 3 - 2 * (10 * 40 + 1) ** 3)
    counts = {"samples": 6, "subset_size": 3}
    known: dict[str, Any] = {
        "kid_of_embeddings": {},
        "kid_of_features": {"features": True},
        "kid": {"features": True, "fid": True},
    }
    for name, settings in known.items():
        found = kid.run(replace(subject, judges=(seeing(2, 1, 256, **settings),)))
        assert found == {name: expected, f"{name}_deviation": pytest.approx(0, abs=1e-6), **counts}
    judges = (seeing(2, 1, 256, name="a"), seeing(2, 1, 256, name="b", features=True, fid=True))
    found = kid.run(replace(subject, judges=judges))
    assert found.keys() == {
        *("kid_of_embeddings_by_a", "kid_of_embeddings_deviation_by_a", "kid_by_b", "kid_deviation_by_b"),
        *counts,
    }
