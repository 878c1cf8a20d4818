"""Which part of an image is taken, and how it becomes the array that a model reads."""

import math
from typing import Literal

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""
Method = Literal["bicubic", "bilinear", "lanczos"]
"""The filter by which an image is scaled."""


def centre_box(height: int, width: int, *, size: int) -> Box:
    """The square in the middle, as CLIP's images are cropped, which is not always the very middle.

    The image is thought of as scaled until its shorter side is `size`, the longer one a whole number of pixels, and cut
    at a whole pixel.
    """
    if height > width:
        upper, left, lower, right = centre_box(width, height, size=size)
        return left, upper, right, lower
    scaled = size * width // height
    first = (scaled - size) // 2
    return first * width / scaled, 0, (first + size) * width / scaled, height


def whole_box(height: int, width: int) -> Box:
    """All of it, whatever its shape."""
    return 0, 0, width, height


def square_box(height: int, width: int) -> Box:
    """The smallest square around it; of an odd number of pixels outside, one more lies after it than before."""
    side = max(height, width)
    left, upper = -((side - width) // 2), -((side - height) // 2)
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


def resample(
    image: Image.Image,
    box: Box,
    size: int,
    *,
    levels: int = 256,
    method: Method = "bicubic",
    around: tuple[int, int, int] = (0, 0, 0),
) -> np.ndarray:
    """The box of an image of mode L or RGB, scaled to uint8 [size, size, C] with antialiasing.

    A whole image of that size comes back as it is, so its values never change.

    Args:
      levels: where there are fewer than 256, no value exceeds the image's largest.
      around: the colour of what of the box lies outside the image.
    """
    image, box = extended(image, box, around)
    pixels = np.asarray(image.resize((size, size), Image.Resampling[method.upper()], box))
    if levels < 256:
        # The filter overshoots at edges: of 17 levels it would make some that there are not.
        pixels = np.minimum(pixels, np.uint8(np.max(image.getextrema())))
    return pixels.reshape(size, size, -1)


def extended(image: Image.Image, box: Box, colour: tuple[int, int, int]) -> tuple[Image.Image, Box]:
    """The image with as much of a colour around it as holds the box, and where the box is then."""
    # A box that was drawn up to an edge may lie beyond it by a rounding: of that nothing is shown.
    left, upper = (max(0, math.ceil(-edge - 1e-6)) for edge in box[:2])
    right, lower = (max(0, math.ceil(edge - side - 1e-6)) for edge, side in zip(box[2:], image.size, strict=True))
    width, height = image.width + left + right, image.height + upper + lower
    box = (max(0, box[0] + left), max(0, box[1] + upper), min(width, box[2] + left), min(height, box[3] + upper))
    if left == upper == right == lower == 0:
        return image, box
    canvas = Image.new("RGB", (width, height), colour).convert(image.mode)
    canvas.paste(image, (left, upper))
    return canvas, box


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image [H, W, C] or its mirror image, with equal probability."""
    return image[:, ::-1] if rng.random() < 0.5 else image
