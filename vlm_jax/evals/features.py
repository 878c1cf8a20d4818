"""Features for linear probes: arrays of any kind as rows of numbers of one scale, turned to their principal axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.contract import Input

LARGEST = 8192
"""Features, at most: of more, which large images and codes have, so many sums are taken."""
FAINT = 1e-9
"""Share of the variance up to which an axis is none: far below what the weakest penalty leaves anything of."""


def reader(
    specs: Mapping[str, Input], seed: Sequence[int]
) -> Callable[[Mapping[str, np.ndarray]], Float[np.ndarray, "B D"]]:
    """What makes rows of features, float32, of arrays [B, ...] by name: all numbers of all arrays, one after the other.

    A code is as many numbers as there are codes, of which one is 1 and the others 0. A linear map of these may be any
    table of vectors for each place, such as that by which a decoder looks them up: so nothing that codes tell is left
    out, whatever the quantiser is, though there are more weights to learn than of vectors.

    Where there are more than `LARGEST` numbers, each is added to one of so many sums, with a sign, both drawn by the
    seed: inner products are kept on average (feature hashing, 0902.2206). Arrays of one size have the same sums.
    """
    maps, end = [], 0
    for name, spec in specs.items():
        choices = spec.limit or 1 if np.issubdtype(spec.dtype, np.integer) else 1
        first = end + choices * np.arange(math.prod(spec.shape))
        maps.append((name, choices > 1, first))
        end += choices * len(first)
    size, sums, signs = end, np.arange(end), np.ones(end)
    if end > LARGEST:
        rng, size = np.random.default_rng(seed), LARGEST
        sums, signs = rng.integers(0, size, end), rng.choice([-1.0, 1.0], end)

    def read(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "B D"]:
        parts = []
        for name, coded, first in maps:
            flat = arrays[name].reshape(len(arrays[name]), -1)
            parts.append((first + flat, np.ones(flat.shape)) if coded else (np.tile(first, (len(flat), 1)), flat))
        index, value = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        return summed(sums[index], signs[index] * value, size).astype(np.float32)

    return read


def summed(index: Int[np.ndarray, "B n"], value: Float[np.ndarray, "B n"], size: int) -> Float[np.ndarray, "B D"]:
    """For each row the sum of the values of each index in [0, size)."""
    rows = len(index)
    flat = np.arange(rows)[:, None] * size + index
    return np.bincount(flat.ravel(), value.ravel(), rows * size).reshape(rows, size)


class Features(NamedTuple):
    """Of examples to learn from, and of others; float32."""

    training: Float[np.ndarray, "N K"]
    """Of mean 0, the features uncorrelated."""
    held_out: Float[np.ndarray, "M K"]
    variances: Float[np.ndarray, " K"]
    """Of the features in training; their sum is 1, or 0 where none varies."""


def turned(training: Float[np.ndarray, "N D"], held_out: Float[np.ndarray, "M D"]) -> Features:
    """Features of one variance, turned to the principal axes of training.

    Each has mean 0 and variance 1 / D' there, of the D' that vary. Turning changes no probe whose penalty is on the
    squares of its weights, nor does leaving out what is at a right angle to all of training: there its weights are 0.
    But it makes no more features than examples, and they are far faster to learn from, for they are uncorrelated.
    """
    varies = np.ptp(training, axis=0) > 0
    one, other = (each[:, varies].astype(np.float64) for each in (training, held_out))
    mean, scale = one.mean(axis=0), one.std(axis=0) * math.sqrt(max(varies.sum(), 1))
    one, other = (one - mean) / scale, (other - mean) / scale
    variances, vectors = np.linalg.eigh(one @ one.T / len(one))
    kept = variances > FAINT
    variances, vectors = variances[kept], vectors[:, kept]
    lengths = np.sqrt(len(one) * variances)
    return Features(
        (vectors * lengths).astype(np.float32),
        ((other @ one.T) @ (vectors / lengths)).astype(np.float32),
        variances,
    )
