"""Which part of an image is taken, and how it becomes the array that a model reads."""

import math

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""


def centre_box(height: int, width: int) -> Box:
    """The largest square in the middle."""
    side = min(height, width)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(height: int, width: int, min_area: float, rng: np.random.Generator) -> Box:
    """A box within the image, anywhere, of a random share in `[min_area, 1]` of the area of its largest square.

    The share is uniform and the aspect ratio log-uniform over as much of [3/4, 4/3] as fits (Szegedy et al. 2015, but
    no draw is rejected).
    """
    area = rng.uniform(min_area, 1.0) * min(height, width) ** 2
    narrowest, widest = max(3 / 4, area / height**2), min(4 / 3, width**2 / area)
    ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
    box_width, box_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, upper = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return left, upper, left + box_width, upper + box_height


def resample(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The box of an image of mode L or RGB, scaled to uint8 [size, size, C] by a bicubic filter with antialiasing.

    A whole image of that size comes back as it is, so its values never change; and none exceeds the image's largest.
    """
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    if pixels.max() < 255:
        # The filter overshoots at edges: of 17 levels it would make some that there are not.
        pixels = np.minimum(pixels, np.uint8(np.max(image.getextrema())))
    return pixels.reshape(size, size, -1)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image [H, W, C] or its mirror image, with equal probability."""
    return image[:, ::-1] if rng.random() < 0.5 else image
