"""Images to the size and channels that a model reads, and random views of them. All are uint8 [H, W, C]."""

import math

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side scaled to `size` with antialiasing, and the centre of the longer: [size, size, C].

    An image of that size comes back as it is, so its values never change.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    left, upper = (width - side) / 2, (height - side) / 2
    return _resample(image, (left, upper, left + side, upper + side), size)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """[H, W, channels], of 1 (grey: ITU-R 601 luma) or 3 (RGB: grey thrice); an alpha channel is dropped."""
    if image.shape[-1] == channels:
        return image
    if channels == 1:
        return np.asarray(Image.fromarray(image[..., :3]).convert("L"))[..., None]
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image or its mirror image, with equal probability."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_resized_crop(image: np.ndarray, size: int, min_area: float, rng: np.random.Generator) -> np.ndarray:
    """A `random_box` of the image, scaled to [size, size, C] with antialiasing (Szegedy et al. 2015)."""
    height, width = image.shape[:2]
    return _resample(image, random_box(height, width, min_area, rng), size)


def random_box(height: int, width: int, min_area: float, rng: np.random.Generator) -> Box:
    """A box within the image, anywhere, of a random share in `[min_area, 1]` of the area of its largest square.

    The aspect ratio is log-uniform over as much of [3/4, 4/3] as fits, so no draw is rejected.
    """
    area = rng.uniform(min_area, 1.0) * min(height, width) ** 2
    narrowest, widest = max(3 / 4, area / height**2), min(4 / 3, width**2 / area)
    ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
    box_width, box_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, upper = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return left, upper, left + box_width, upper + box_height


def _resample(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    grey = image.shape[-1] == 1
    resized = Image.fromarray(image[..., 0] if grey else image).resize((size, size), Image.Resampling.BICUBIC, box)
    pixels = np.asarray(resized)
    return pixels[..., None] if grey else pixels
