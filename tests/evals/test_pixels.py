"""What pixels alone tell: PSNR as another library has it, the nearest of many by trying all, and borders by hand."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from vlm_jax.evals import pixels
from vlm_jax.evals.pixels import border_contrast, psnr, psnr_of_nearest

RNG = np.random.default_rng(0)


def test_psnr_is_that_of_another_library_and_infinite_of_equal_images() -> None:
    """Of the range that the levels span, and without the arithmetic of bytes."""
    images, copies = RNG.integers(0, 17, (2, 3, 4, 5, 2)).astype(np.uint8)
    copies[2] = images[2]
    expected = [peak_signal_noise_ratio(*pair, data_range=16) for pair in zip(images[:2], copies[:2], strict=True)]
    np.testing.assert_allclose(psnr(images, copies, 17), [*expected, math.inf])


def test_the_nearest_of_many_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "TOGETHER", 4)
    images, others = (RNG.integers(0, 256, (count, 3, 3, 2)).astype(np.uint8) for count in (5, 11))
    others[10] = images[1]
    expected = [max(psnr(image[None], other[None], 256)[0] for other in others) for image in images]
    found = psnr_of_nearest(images, iter(others), 256)
    np.testing.assert_allclose(found, expected)
    assert found[1] == math.inf and np.isfinite(np.delete(found, 1)).all()


def test_a_copy_of_a_large_bright_image_is_an_exact_one() -> None:
    """Whose sum of squares is beyond what float32 counts exactly."""
    image = RNG.integers(200, 256, (1, 64, 64, 3)).astype(np.uint8)
    assert psnr_of_nearest(image, [image[0]], 256)[0] == math.inf
    other = image[0].copy()
    other[0, 0, 0] -= 1
    assert psnr_of_nearest(image, [other], 256)[0] == pytest.approx(10 * math.log10(255**2 * 64 * 64 * 3))


@pytest.mark.parametrize("side", [4, 8])
def test_a_ramp_has_no_borders_and_squares_of_one_colour_nothing_else(side: int) -> None:
    up, right = np.mgrid[:16, :16]
    ramp = (up + 2 * right).astype(np.uint8)[None, :, :, None]
    assert border_contrast(ramp, side) == 1
    squares = RNG.integers(0, 256, (2, 16 // side, 16 // side, 1)).astype(np.uint8)
    assert border_contrast(squares.repeat(side, axis=1).repeat(side, axis=2), side) == math.inf
    assert border_contrast(np.full((1, 16, 16, 3), 7, np.uint8), side) is None
    assert border_contrast(ramp[:, :side, :side], side) is None


def test_borders_of_another_grid_do_not_count() -> None:
    """Columns that step by 200 down and up, at 4, 8 and 12: every border of fours, and one of the two of eights."""
    row = np.repeat(np.array([200, 0, 200, 0], np.uint8), 4) + np.tile(np.array([0, 1, 0, 1], np.uint8), 4)
    image = np.tile(row, (16, 1))[None, :, :, None]
    # Of the 15 steps of each of 16 rows three are borders, of 201, 199 and 201; down there are none, of as many.
    assert border_contrast(image, 4) == pytest.approx((201 + 199 + 201) / 6 / (12 / 24))
    assert border_contrast(image, 8) == pytest.approx(199 / 2 / ((201 + 201 + 12) / 28))
    assert border_contrast(image.swapaxes(1, 2), 4) == border_contrast(image, 4)
    both = np.concatenate([image, image.swapaxes(1, 2), np.zeros_like(image)])
    assert border_contrast(both, 4) == pytest.approx(border_contrast(image, 4))  # all images together, not a mean
