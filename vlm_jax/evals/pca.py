"""Principal components of patches: what an autoencoder has to beat with as many numbers an image.

The coefficients are real, and so are the latents of an autoencoder; a code is counted as one number too, though it
holds log2(K) bits and a coefficient as many as one likes. What is compared is a count of numbers, not of bits: beside
codes the components are the stronger for it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlm_jax.evals.pixels import psnr
from vlm_jax.evals.subject import Pictures

SIDE = 8
"""Pixels of a patch's side."""
PATCHES = 100_000
"""At most, that the components are of."""
AN_IMAGE = 32
"""At most, of each image of training: as it comes, for data sets are kept in random order."""


def psnr_of_pca(pictures: Pictures, numbers: int) -> float:
    """In dB, a mean over the held-out images: each is `numbers` coefficients of components of training's patches.

    All patches of an image have as many, or some one more, evenly spread. The mean of all patches costs nothing.
    """
    assert pictures.training is not None
    components = fitted(image for _, image in pictures.training())
    found = [
        psnr(images, restored(components, images, numbers, pictures.levels), pictures.levels)
        for images in pictures.held_out()
    ]
    return float(np.mean(np.concatenate(found)))


def fitted(images: Iterable[UInt8[np.ndarray, "H W C"]]) -> Any:
    """All components, as scikit-learn has them, of some patches of the first images."""
    from sklearn.decomposition import PCA  # a second to import

    rng, found, count = np.random.default_rng(0), [], 0
    for image in images:
        found.append(rng.permutation(patches(image[None])[0])[:AN_IMAGE])
        count += len(found[-1])
        if count >= PATCHES:
            break
    return PCA().fit(np.concatenate(found)[:PATCHES])


def restored(
    components: Any, images: UInt8[np.ndarray, "B H W C"], numbers: int, levels: int
) -> UInt8[np.ndarray, "B H W C"]:
    """What is left of images in so many coefficients each, those of the largest components, in whole levels."""
    whole = patches(images)
    batch, count, size = whole.shape
    kept = np.diff(numbers * np.arange(count + 1) // count)
    coefficients = components.transform(whole.reshape(-1, size)).reshape(batch, count, -1)
    coefficients *= np.arange(coefficients.shape[-1]) < kept[:, None]
    flat = components.inverse_transform(coefficients.reshape(batch * count, -1)).reshape(whole.shape)
    return joined(np.clip(np.round(flat), 0, levels - 1).astype(np.uint8), images.shape)


def patches(images: UInt8[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B P D"]:
    """Of `SIDE` x `SIDE` pixels, row by row; those at the right and lower edges are filled up with copies of it."""
    batch, height, width, channels = images.shape
    filled = np.pad(images, ((0, 0), (0, -height % SIDE), (0, -width % SIDE), (0, 0)), mode="edge")
    split = filled.reshape(batch, -(-height // SIDE), SIDE, -(-width // SIDE), SIDE, channels).swapaxes(2, 3)
    return split.reshape(batch, -1, SIDE * SIDE * channels).astype(np.float64)


def joined(parts: UInt8[np.ndarray, "B P D"], shape: tuple[int, ...]) -> UInt8[np.ndarray, "B H W C"]:
    """The inverse of `patches`, of images of a shape."""
    batch, height, width, channels = shape
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    split = parts.reshape(batch, rows, columns, SIDE, SIDE, channels).swapaxes(2, 3)
    return split.reshape(batch, rows * SIDE, columns * SIDE, channels)[:, :height, :width]
