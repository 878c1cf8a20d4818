"""What a model of images says of them: squares of pixels, and what a sub-pixel holds."""

from dataclasses import dataclass

from vlm_jax.contract import Input


@dataclass(frozen=True, kw_only=True)
class Square:
    """Images of one height and width."""

    image_size: int
    channels: int = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.channels


@dataclass(frozen=True, kw_only=True)
class Images(Square):
    """Images of integers."""

    levels: int = 256
    """Values of a sub-pixel: 0 ... levels - 1."""

    @property
    def image(self) -> Input:
        """The field of a batch."""
        return Input(self.shape, "uint8", self.levels)


@dataclass(frozen=True, kw_only=True)
class ImagesOrLatents(Square):
    """Images of integers, or of real numbers."""

    levels: int | None = 256
    """Values of a sub-pixel: 0 ... levels - 1. None: the data are real vectors, such as an autoencoder's latents, of
    about unit variance; the model then has no likelihood of images."""

    @property
    def image(self) -> Input:
        """The field of a batch."""
        return Input(self.shape, "float32") if self.levels is None else Input(self.shape, "uint8", self.levels)
