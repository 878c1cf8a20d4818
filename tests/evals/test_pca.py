"""Principal components of patches: what lies in few dimensions needs few numbers, and all numbers are enough."""

import math

import numpy as np
import pytest

from vlm_jax.evals import Pictures, pca
from vlm_jax.evals.pca import fitted, joined, patches, psnr_of_pca, restored
from vlm_jax.evals.pixels import psnr

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 16, 16, 1)).astype(np.uint8)
STRIPES = np.tile(np.repeat([10, -10], 4), (8, 1))
"""[8, 8], whose mean is 0."""


def pictures(images: np.ndarray, training: np.ndarray, levels: int = 256) -> Pictures:
    """Two at a time."""
    return Pictures(
        levels=levels,
        held_out=lambda: iter(np.split(images, range(2, len(images), 2))),
        training=lambda: (({}, image) for image in training),
    )


@pytest.mark.parametrize("shape", [(2, 16, 24, 3), (1, 13, 9, 1), (1, 4, 4, 2)])
def test_patches_are_put_together_again(shape: tuple[int, ...]) -> None:
    images = RNG.integers(0, 256, shape).astype(np.uint8)
    parts = patches(images)
    assert parts.shape == (shape[0], -(-shape[1] // 8) * -(-shape[2] // 8), 64 * shape[3])
    np.testing.assert_array_equal(joined(parts.astype(np.uint8), shape), images)
    np.testing.assert_array_equal(parts[0, 0].reshape(8, 8, -1)[:4, :4], images[0, :4, :4])


def test_all_coefficients_leave_an_image_as_it_is_and_none_the_mean_patch() -> None:
    assert psnr_of_pca(pictures(NOISE[:3], NOISE), 4 * 64) == math.inf
    assert 20 < psnr_of_pca(pictures(NOISE[:3], NOISE), 4 * 63) < 60
    middle = np.round(patches(NOISE).mean(axis=(0, 1))).reshape(1, 8, 8, 1).astype(np.uint8)
    expected = psnr(NOISE[:3], np.tile(middle, (3, 2, 2, 1)), 256).mean()
    assert psnr_of_pca(pictures(NOISE[:3], NOISE), 0) == pytest.approx(expected)


def test_more_coefficients_are_never_worse() -> None:
    found = [psnr_of_pca(pictures(NOISE[:4], NOISE[4:]), numbers) for numbers in (0, 4, 16, 64, 128)]
    assert found == sorted(found) and len(set(found)) == 5


def test_what_lies_in_two_dimensions_needs_two_numbers_a_patch_the_first_for_what_varies_more() -> None:
    """Patches of a grey and stripes of some strength: of six numbers on four patches every second one has both."""
    every = np.array([(grey, strength) for grey in range(90, 190, 20) for strength in range(-2, 3)] * 4)
    grey, strength = RNG.permutation(every).T.reshape(2, 25, 2, 2)
    parts = grey[..., None, None] + strength[..., None, None] * STRIPES
    images = parts.swapaxes(2, 3).reshape(25, 16, 16, 1).astype(np.uint8)
    components = fitted(images)
    np.testing.assert_array_equal(restored(components, images, 8, 256), images)
    flat = np.repeat(grey, 64).reshape(25, 4, 64)
    np.testing.assert_array_equal(patches(restored(components, images, 4, 256)), flat)
    wrong = np.abs(patches(restored(components, images, 6, 256)) - patches(images)).max(axis=(0, 2))
    np.testing.assert_array_equal(wrong > 0, [True, False, True, False])


def test_levels_are_whole_and_of_the_range_that_there_is() -> None:
    """Sharp edges in a few coefficients overshoot 0 and 16."""
    images = RNG.choice(np.array([0, 16], np.uint8), (200, 8, 8, 1))
    found = restored(fitted(images), images, 40, 17)
    assert found.dtype == np.uint8 and found.min() == 0 and found.max() == 16


def test_no_more_patches_are_taken_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "PATCHES", 100)
    monkeypatch.setattr(pca, "AN_IMAGE", 3)
    taken = []
    fitted(taken.append(index) or image for index, image in enumerate(NOISE))
    assert len(taken) == 34
    monkeypatch.undo()
    assert (pca.PATCHES, pca.AN_IMAGE) == (100_000, 32)
