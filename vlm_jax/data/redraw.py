"""Drawings as other artists might have made them: smaller, outlined in black, in other colours."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import grey_dilation, grey_erosion

from vlm_jax.data.transforms import Box
from vlm_jax.errors import UserError

PAPER = (255, 255, 255)
"""What lies around a drawing."""
EDGE, BLACK = 40, 100
"""Levels by which neighbouring pixels differ where a line begins to show, and where it is black."""
WIDTHS = (1, 2)
"""Of lines, in pixels of the image that is read."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue (ITU-R BT.601)."""


@dataclass(frozen=True, kw_only=True)
class Redraw:
    """In what styles of drawing differ first. A model that hears of drawings in one style, and is asked about those in
    another, learns that it does not matter."""

    smallest: float = 1.0
    """A drawing fills this share of the side at least, anywhere on white paper; 1.0: all of it."""
    outlined: float = 0.0
    """Share of the drawings whose edges become black lines; 0.0: none."""
    tint: float = 0.0
    """Red, green and blue are raised to powers whose logarithms are up to this, which leaves white and black; 0.0: they
    stay as they are."""
    fade: float = 0.0
    """Colours lose up to this share of their distance to the grey of their luminance; 0.0: none."""

    def __post_init__(self) -> None:
        if not 0.0 < self.smallest <= 1.0:
            raise UserError(f"redraw.smallest is {self.smallest}: it must lie in (0, 1], and 1 means no smaller")
        for name in ("outlined", "fade"):
            if not 0.0 <= (share := getattr(self, name)) <= 1.0:
                raise UserError(f"redraw.{name} is {share}: a share lies in [0, 1]")
        if not 0.0 <= self.tint < math.inf:
            raise UserError(f"redraw.tint is {self.tint}: it must be at least 0, and 0 means no other colours")

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """A square around the whole drawing, of which the longer side fills a uniform share."""
        side = max(height, width) / rng.uniform(self.smallest, 1.0)
        left, upper = rng.uniform(width - side, 0.0), rng.uniform(height - side, 0.0)
        return left, upper, left + side, upper + side

    def restyled(self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
        """With other colours, and maybe lines."""
        channels = image.shape[-1]
        colours = (image / 255) ** np.exp(rng.uniform(-self.tint, self.tint, channels))
        grey = colours @ (LUMINANCE if channels == 3 else np.ones(1))
        colours += rng.uniform(0.0, self.fade) * (grey[..., None] - colours)
        image = np.rint(255 * colours).astype(np.uint8)
        return outline(image, rng.choice(WIDTHS)) if rng.random() < self.outlined else image


AS_IT_IS = Redraw()
"""Changes nothing."""


def outline(image: UInt8[np.ndarray, "H W C"], width: int) -> UInt8[np.ndarray, "H W C"]:
    """Black lines of a width in pixels wherever a colour changes: by the morphological gradient."""
    near = (width + 1, width + 1, 1)
    change = (grey_dilation(image, near).astype(np.int16) - grey_erosion(image, near)).max(axis=-1, keepdims=True)
    line = np.clip((change - EDGE) / (BLACK - EDGE), 0.0, 1.0)
    return np.rint(image * (1 - line)).astype(np.uint8)
