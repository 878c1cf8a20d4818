"""What a run reads: a data set, its splits, and what is done to its images and captions."""

from dataclasses import dataclass

from vlm_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Text:
    """Captions as token ids."""

    context_length: int
    """Ids a caption, the beginning, the end and the padding included."""
    vocab_size: int
    """At most this many tokens in the BPE that is trained on the training captions; unused with a tokenizer given."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; None: train one."""

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise UserError(f"context_length is {self.context_length}: at least 3 leaves room for a token")


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set and how its records become examples."""

    name: str
    """openmoji, easy_vqa, easy_vqa/color, easy_vqa/shape, digits, or a data set that TFDS has prepared."""
    train: str = "train"
    """Split to train on, or part of one, such as train[:90%]."""
    validation: str | None = None
    """Split to watch during training, as many of its examples as fill batches; None: none."""
    test: str = "test"
    """Split to report on."""
    image_size: int
    """Height and width in pixels: images are scaled by the shorter side and cropped at the centre."""
    channels: int = 3
    """3: RGB; 1: grey."""
    flip: bool = False
    """Mirror half of the training images."""
    crop_min_area: float = 1.0
    """Random crops of training images keep at least this share of the area; 1.0: none."""
    text: Text | None = None
    """How captions are tokenized; None: the model reads none."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}: it must be at least 1 pixel")
        if self.channels not in (1, 3):
            raise UserError(f"channels is {self.channels}: it must be 1 (grey) or 3 (RGB)")
        if not 0.0 < self.crop_min_area <= 1.0:
            raise UserError(f"crop_min_area is {self.crop_min_area}: it must lie in (0, 1], and 1 means no crops")
