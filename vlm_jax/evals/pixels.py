"""What pixels alone tell of images: how near two are, how near the nearest of many is, and whether patches show."""

import itertools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8

TOGETHER = 128
"""Images that others are compared with at once."""


def psnr(
    images: UInt8[np.ndarray, "B H W C"], copies: UInt8[np.ndarray, "B H W C"], levels: int
) -> Float[np.ndarray, " B"]:
    """Of each copy in dB, of a range of `levels - 1`; infinite where it is equal."""
    errors = images.astype(np.float64) - copies
    return decibels(np.mean(np.square(errors), axis=(1, 2, 3)), levels)


def decibels(square: Float[np.ndarray, " B"], levels: int) -> Float[np.ndarray, " B"]:
    """The PSNR of a mean squared error."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10((levels - 1) ** 2 / square)


def psnr_of_nearest(
    images: UInt8[np.ndarray, "B H W C"], others: Iterable[UInt8[np.ndarray, "H W C"]], levels: int
) -> Float[np.ndarray, " B"]:
    """Of each image in dB, taken for a copy of that of the others which is nearest to it."""
    flat = images.reshape(len(images), -1).astype(np.float64)  # in which sums of squares of integers are exact
    nearest, others = np.full(len(flat), np.inf), iter(others)
    while part := list(itertools.islice(others, TOGETHER)):
        rows = np.stack(part).reshape(len(part), -1).astype(np.float64)
        squares = np.square(flat).sum(axis=1)[:, None] - 2 * flat @ rows.T + np.square(rows).sum(axis=1)
        nearest = np.minimum(nearest, squares.min(axis=1))
    return decibels(nearest / flat.shape[1], levels)


def border_contrast(images: UInt8[np.ndarray, "N H W C"], side: int) -> float | None:
    """The mean absolute difference of neighbours across borders of patches, over that of neighbours within one.

    Of patches of `side` x `side` pixels from the upper left corner. 1: no border shows; infinite: nothing else does.
    None: there are no borders, or nothing within them, or all is of one colour.
    """
    across, within = [], []
    for axis in (1, 2):
        steps = np.abs(np.diff(images.astype(np.int16), axis=axis))
        border = np.arange(1, images.shape[axis]) % side == 0
        across.append(np.compress(border, steps, axis=axis).ravel())
        within.append(np.compress(~border, steps, axis=axis).ravel())
    borders, insides = np.concatenate(across), np.concatenate(within)
    if not borders.size or not insides.size or not (borders.any() or insides.any()):
        return None
    return float(borders.mean() / insides.mean()) if insides.any() else np.inf
