"""An encoded image, decoded once it is known how much of it is needed, to what a viewer shows."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from vlm_jax.data.transforms import Box, resample
from vlm_jax.errors import UserError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what turns an image stored in it upright."""
_LEAST = 2
"""Pixels for each of the result, at least, that a JPEG which is decoded smaller must keep: as in `Image.thumbnail`."""


@dataclass(frozen=True, eq=False)
class Picture:
    """The image of one record, which is read as a viewer shows it:

    - upright, as its EXIF says; of an animation the first frame;
    - in the colours of its palette, and on white, the paper of most pages, where it is transparent;
    - of 16 bits a channel the upper eight; colour profiles are not applied.
    """

    encoded: bytes = field(repr=False)
    """PNG, JPEG or what else Pillow opens."""
    record: str
    """What errors call the record."""
    mend: str = "leave it out of the data set, or choose another data set"
    """What to do about damage."""

    def pixels(self, channels: int) -> np.ndarray:
        """All of it: uint8 [H, W, channels], of 1 (grey: ITU-R 601 luma) or 3 (RGB).

        Raises:
          UserError: the image is damaged, or of a kind whose white nobody knows.
        """
        with self._told(), Image.open(io.BytesIO(self.encoded)) as image:
            shown = _shown(image, channels)
            return np.asarray(shown).reshape(shown.height, shown.width, channels)

    def view(
        self,
        size: int,
        channels: int,
        choose: Callable[[int, int], Box],
        scale: Callable[[Image.Image, Box, int], np.ndarray] = resample,
    ) -> np.ndarray:
        """The box `choose(height, width)` of it, scaled to uint8 [size, size, channels] by `scale`.

        A JPEG that is much larger is decoded at a half, a quarter or an eighth of its size, which takes less time and
        hardly changes the result.

        Raises:
          UserError: as `pixels`.
        """
        with self._told(), Image.open(io.BytesIO(self.encoded)) as image:
            if image.format not in ("JPEG", "MPO"):
                shown = _shown(image, channels)
                return scale(shown, choose(shown.height, shown.width), size)
            width, height = image.size
            box = choose(width, height) if _orientation(image) in (5, 6, 7, 8) else choose(height, width)
            spare = min(box[2] - box[0], box[3] - box[1]) / (_LEAST * size)
            factor = max(candidate for candidate in (1, 2, 4, 8) if candidate <= max(1, spare))
            image.draft("L" if channels == 1 else None, (width // factor, height // factor))
            left, upper, right, lower = (edge / factor for edge in box)
            return scale(_shown(image, channels), (left, upper, right, lower), size)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Names the record in whatever goes wrong: on damaged bytes Pillow's parsers raise all kinds of exceptions."""
        try:
            yield
        except Exception as error:
            reason = "no kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"{self.record} has an image that cannot be used ({reason}): {self.mend}") from error


def picture_of(image: str | Path | Picture | np.ndarray) -> Picture:
    """An image by its file, or of pixels, uint8 [H, W], [H, W, 1] or [H, W, 3].

    Raises:
      UserError: there is no such file, or it is no image, or the pixels are of another kind.
    """
    if isinstance(image, Picture):
        return image
    stored = io.BytesIO()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (1,), (3,)) or image.ndim not in (2, 3):
            raise UserError(f"an image is {image.dtype}{list(image.shape)}: give uint8 [H, W], [H, W, 1] or [H, W, 3]")
        Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image).save(stored, "png")
        return Picture(stored.getvalue(), "an array", "give another")
    path = Path(image)
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise UserError(f"the image {path} cannot be read ({error.strerror}): give the path of a picture") from error
    try:
        Image.open(io.BytesIO(encoded)).close()
    except Exception as error:  # of many kinds, from Pillow's parsers
        raise UserError(
            f"{path} is no image of a kind that Pillow knows: give a PNG, a JPEG or another such"
        ) from error
    return Picture(encoded, str(path), "give another picture")


def _shown(stored: ImageFile, channels: int) -> Image.Image:
    """The image decoded, opaque, of mode L or RGB, and upright."""
    bits = stored.tile[0].args if stored.tile else None
    stored.load()
    # Pillow compares such pixels with a transparent colour of another depth, and lets the wrong ones vanish.
    if "transparency" in stored.info and bits in ("L;2", "L;4", "I;16B", "RGB;16B"):
        raise ValueError(f"it has a transparent colour and pixels of the unusual depth {bits}")
    image: Image.Image = stored
    if stored.mode == "I;16" and stored.format == "PNG":
        image = Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8))
    elif stored.mode[0] in "IF":
        raise ValueError(f"it is a {stored.format} of mode {stored.mode}, where no value is known to be white")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    orientation = _orientation(stored)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
