import math

import numpy as np
import pytest

from vlm_jax.data.transforms import random_box, random_flip, random_resized_crop, resize, to_channels


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_size_is_unchanged(channels):
    image = _noise(8, 8, channels)
    assert resize(image, 8) is image


@pytest.mark.parametrize("shape", [(30, 90, 3), (90, 30, 3), (31, 17, 1), (5, 4, 3)])
def test_resize_gives_a_square(shape):
    resized = resize(_noise(*shape), 10)
    assert resized.shape == (10, 10, shape[-1])
    assert resized.dtype == np.uint8


def test_the_centre_is_kept():
    image = np.full((30, 90, 3), 255, np.uint8)
    image[:, 30:60] = 0
    for wide in (image, image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(resize(wide, 10)[2:8, 2:8], 0)
    image = _noise(31, 90, 3)
    np.testing.assert_array_equal(resize(image[:, ::-1], 10), resize(image, 10)[:, ::-1])


def test_scaling_is_antialiased():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 200
    assert abs(resize(stripes, 8).astype(int)[:, 1:-1] - 100).max() <= 2


def test_a_constant_image_stays_constant():
    image = np.full((20, 33, 3), 77, np.uint8)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(resize(image, 9), 77)
    np.testing.assert_array_equal(random_resized_crop(image, 9, 0.3, rng), 77)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (64, 20)])
@pytest.mark.parametrize("min_area", [0.08, 0.6, 1.0])
def test_random_boxes(height, width, min_area):
    rng = np.random.default_rng(0)
    square = min(height, width) ** 2
    shares, ratios = [], []
    for _ in range(500):
        left, upper, right, lower = random_box(height, width, min_area, rng)
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= upper < lower <= height + 1e-9
        shares.append((right - left) * (lower - upper) / square)
        ratios.append((right - left) / (lower - upper))
    assert min_area - 1e-9 <= min(shares) <= min_area + 0.02
    assert 0.98 <= max(shares) <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= min(ratios) <= max(ratios) <= 4 / 3 + 1e-9
    assert (min_area == 1.0 and height == width) or math.log(max(ratios) / min(ratios)) > 0.2


def test_boxes_lie_anywhere():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(64, 64, 0.5, rng) for _ in range(500)])
    np.testing.assert_allclose(boxes.min(0)[:2], 0, atol=0.5)
    np.testing.assert_allclose(boxes.max(0)[2:], 64, atol=0.5)
    # The smallest boxes are 39 to 52 wide and high.
    assert boxes.max(0)[:2].min() > 15


def test_the_whole_area_of_a_square_is_no_crop():
    image = _noise(40, 40, 3)
    np.testing.assert_array_equal(random_resized_crop(image, 16, 1.0, np.random.default_rng(0)), resize(image, 16))


def test_flips():
    image = _noise(4, 6, 3)
    rng = np.random.default_rng(0)
    results = [random_flip(image, rng) for _ in range(200)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert mirrored + sum(np.array_equal(result, image) for result in results) == 200
    assert 70 < mirrored < 130


def test_channels():
    grey, color = _noise(4, 5, 1), _noise(4, 5, 3)
    np.testing.assert_array_equal(to_channels(grey, 1), grey)
    np.testing.assert_array_equal(to_channels(color, 3), color)
    np.testing.assert_array_equal(to_channels(grey, 3), np.concatenate([grey] * 3, axis=-1))
    np.testing.assert_array_equal(to_channels(to_channels(grey, 3), 1), grey)
    luma = color @ [0.299, 0.587, 0.114]
    assert abs(to_channels(color, 1)[..., 0] - luma).max() <= 1
    translucent = np.concatenate([color, grey], axis=-1)
    np.testing.assert_array_equal(to_channels(translucent, 3), color)
    np.testing.assert_array_equal(to_channels(translucent, 1), to_channels(color, 1))
