"""Boxes, scaling and flips: what is taken of an image, with the laws that random views are drawn from."""

import math

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.transforms import centre_box, random_box, random_flip, resample, square_box, whole_box


def _noise(*shape, levels=256):
    return np.random.default_rng(0).integers(0, levels, shape, dtype=np.uint8)


def _whole(image: np.ndarray, size: int, levels: int = 256) -> np.ndarray:
    return resample(Image.fromarray(image), whole_box(*image.shape[:2]), size, levels=levels)


def _boxes(count: int, height: int, width: int, min_area: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([random_box(height, width, min_area, rng) for _ in range(count)])


def _distance_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the empirical distribution function from the uniform's."""
    expected = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_an_image_of_the_size_is_unchanged(shape):
    for levels in (17, 256):
        image = _noise(*shape, levels=levels)
        np.testing.assert_array_equal(_whole(image, 8), image.reshape(8, 8, -1))


def test_a_rounding_beyond_an_edge_is_of_no_account():
    image = Image.fromarray(_noise(8, 8))
    for box in ((-1e-7, 0, 8, 8), (0, -1e-9, 8, 8), (0, 0, 8 + 1e-7, 8), (0, 0, 8, 8 + 1e-9)):
        np.testing.assert_array_equal(resample(image, box, 8)[..., 0], image)
    grown = resample(image, (-1e-7, -8, 16 + 1e-7, 8), 16, around=(255, 255, 255))
    np.testing.assert_array_equal(grown[8:, :8, 0], image)
    assert (grown[:8] == 255).all() and (grown[8:, 8:] == 255).all()


def test_the_centre_is_the_largest_square_in_the_middle():
    assert centre_box(30, 90, size=15) == (30, 0, 60, 30)
    assert centre_box(90, 30, size=30) == (0, 30, 30, 60)
    assert centre_box(5, 5, size=7) == (0, 0, 5, 5)


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(37, 90), (90, 37), (41, 43), (64, 50), (20, 20)])
@pytest.mark.parametrize("size", [9, 16, 48])
def test_a_box_is_what_whole_pictures_are_scaled_to(height: int, width: int, size: int, method: str):
    """Scaled whole and then cut, laid on a square and then scaled, or scaled to one: as published towers are fed.

    To a level: Pillow rounds between rows and columns, and takes first what is less work. (At the edges of the range it
    clips there, too: what overshoots from noise of all levels is several away.)
    """
    array = 80 + _noise(height, width, 3, levels=96)
    image, kind = Image.fromarray(array), Image.Resampling[method.upper()]
    short = min(height, width)
    scaled = image.resize((size * width // short, size * height // short), kind)
    left, upper = (scaled.width - size) // 2, (scaled.height - size) // 2
    expected = {
        centre_box(height, width, size=size): scaled.crop((left, upper, left + size, upper + size)),
        whole_box(height, width): image.resize((size, size), kind),
    }
    square = Image.new("RGB", (max(height, width),) * 2, (100, 150, 90))
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    expected[square_box(height, width)] = square.resize((size, size), kind)
    for box, theirs in expected.items():
        ours = resample(image, box, size, method=method, around=(100, 150, 90))
        assert abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_what_is_laid_around_a_grey_image_is_grey():
    image = Image.fromarray(_noise(8, 4, levels=2) + 254)
    around = resample(image, square_box(8, 4), 8, around=(255, 0, 0))
    np.testing.assert_array_equal(around[:, [0, 1, 6, 7], 0], 76)  # the luma of red
    np.testing.assert_array_equal(around[:, 2:6, 0], np.asarray(image))


def test_scaling_keeps_symmetry():
    image = _noise(31, 90, 3)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    box = (29.5, 0, 60.5, 31)
    one, other = (resample(Image.fromarray(array), box, 10) for array in (image, mirrored))
    assert one.shape == (10, 10, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one[:, ::-1], other)


def test_scaling_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    assert abs(_whole(stripes, 8).astype(int)[:, 1:-1] - 100).max() <= 2


def test_a_constant_image_stays_constant():
    image = Image.fromarray(np.full((20, 33, 3), 77, np.uint8))
    for box in (centre_box(20, 33, size=9), (3.3, 1.2, 17.9, 14.1)):
        np.testing.assert_array_equal(resample(image, box, 9), 77)
        np.testing.assert_array_equal(resample(image, box, 50), 77)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
@pytest.mark.parametrize("size", [5, 12, 32])
def test_scaling_never_leaves_the_levels_of_the_image(shape, size):
    """A bicubic filter overshoots at edges: the digits have 17 levels, of which scaling would make an 18th."""
    image = 16 * _noise(*shape, levels=2)
    plain = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    assert size < 8 or plain.max() > 16
    np.testing.assert_array_equal(_whole(image, size, 17), np.minimum(plain, 16).reshape(size, size, -1))
    np.testing.assert_array_equal(_whole(image, size), plain.reshape(size, size, -1))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (64, 20)])
@pytest.mark.parametrize("min_area", [0.08, 0.6, 1.0])
def test_random_boxes_lie_within_the_image_and_the_limits_of_area_and_aspect(height, width, min_area):
    left, upper, right, lower = _boxes(500, height, width, min_area).T
    shares = (right - left) * (lower - upper) / min(height, width) ** 2
    ratios = (right - left) / (lower - upper)
    assert left.min() >= 0 and right.max() <= width + 1e-9
    assert upper.min() >= 0 and lower.max() <= height + 1e-9
    assert min_area - 1e-9 <= shares.min() <= min_area + 0.02
    assert 0.98 <= shares.max() <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= ratios.min() <= ratios.max() <= 4 / 3 + 1e-9
    assert (min_area == 1.0 and height == width) or math.log(ratios.max() / ratios.min()) > 0.2


def test_the_area_of_random_boxes_is_uniform_their_aspect_log_uniform_and_their_place_uniform():
    """At 2,000 draws a distance of 0.036 has a probability of 1%; an aspect that is uniform itself is 0.07 away."""
    left, upper, right, lower = _boxes(2000, 64, 64, 0.2).T
    width, height = right - left, lower - upper
    share = width * height / 64**2
    assert _distance_from_uniform(share, 0.2, 1.0) < 0.036
    assert _distance_from_uniform(left / (64 - width), 0.0, 1.0) < 0.036
    assert _distance_from_uniform(upper / (64 - height), 0.0, 1.0) < 0.036

    left, upper, right, lower = _boxes(2000, 64, 128, 0.2).T
    width, height = right - left, lower - upper
    whole = width * height / 64**2 <= 3 / 4  # where all aspects fit
    log_ratio = np.log(width / height)[whole]
    assert _distance_from_uniform(log_ratio, math.log(3 / 4), math.log(4 / 3)) < 0.045


def test_the_whole_area_of_a_square_is_no_crop():
    np.testing.assert_allclose(_boxes(20, 40, 40, 1.0), [(0, 0, 40, 40)] * 20, atol=1e-9)


def test_half_of_the_images_are_mirrored():
    image = _noise(4, 6, 3)
    rng = np.random.default_rng(0)
    results = [random_flip(image, rng) for _ in range(2000)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert mirrored + sum(np.array_equal(result, image) for result in results) == 2000
    assert 930 < mirrored < 1070
