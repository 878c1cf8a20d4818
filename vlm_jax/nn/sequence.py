"""What follows from the fields of an interleaved example: places, who attends to whom, what predicts what.

`segment` int32 [B, T] numbers the documents packed in a row 1, 2, ...; padding is 0. A document is a stretch of one
number, wherever it stands, and padding one more, of which nothing is predicted. `image_at` int32 [B, N] is the place
of each image's first token, T where there is none; what does not fit in the row is cut off. The shapes are static,
and every value in range has a meaning.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from vlm_jax.contract import Batch
from vlm_jax.errors import UserError


def beginnings(segment: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at each document's first token."""
    return segment != jnp.pad(segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def documents(segment: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Which document of its row a token belongs to: 1, 2, ..."""
    return jnp.cumsum(beginnings(segment), axis=1, dtype=jnp.int32)


def positions(segment: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each token in its document: 0, 1, ..."""
    place = jnp.arange(segment.shape[1], dtype=jnp.int32)
    return place - jax.lax.cummax(jnp.where(beginnings(segment), place, 0), axis=1)


def attention_mask(segment: Int[Array, "B T"], group: Int[Array, "B T"] | None = None) -> Bool[Array, "B 1 T T"]:
    """A token attends to those of its document that are not after it, and to all of its group.

    Args:
      group: of a number within its document, as `image_numbers` or `prefix_numbers` give it; -1, and None: of none.
    """
    document = documents(segment)
    sees = jnp.tri(segment.shape[1], dtype=bool)
    if group is not None:
        sees = sees | ((group[:, :, None] == group[:, None, :]) & (group[:, :, None] >= 0))
    return (sees & (document[:, :, None] == document[:, None, :]))[:, None]


def prefix_numbers(target: Bool[Array, "B T"], segment: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0 at the places of a document before its first target, which are its prefix; -1 at those after."""
    targets = jnp.cumsum(target, axis=1)
    before = jax.lax.cummax(jnp.where(beginnings(segment), targets - target, 0), axis=1)
    return jnp.where(targets > before, -1, 0)


def check_continued(segment: Int[Array, "B T"]) -> None:
    """Refuses rows that end in padding, where values are known.

    Raises:
      UserError: one does, and what follows it would belong to no document.
    """
    if not isinstance(segment, jax.core.Tracer) and not segment[:, -1].all():
        raise UserError("a row to be continued ends in padding (segment 0): pad on the left")


def up_to_end(tokens: Int[Array, "B T"], eos_id: int) -> Bool[Array, "B T"]:
    """True up to a row's first `eos_id`, that included; everywhere in a row that has none."""
    ends = tokens == eos_id
    return jnp.cumsum(ends, axis=1) - ends == 0


def next_tokens(
    tokens: Int[Array, "B T"], target: Bool[Array, "B T"], segment: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token that each place predicts, the one after it, and whether it is a target at all.

    Nothing predicts a document's first token, whatever `target` says of it.
    """
    predicted = target & ~beginnings(segment) & (segment > 0)
    return jnp.roll(tokens, -1, axis=1), jnp.roll(predicted, -1, axis=1)


def image_numbers(image_at: Int[Array, "B N"], length: int, places: int) -> Int[Array, "B T"]:
    """Which image lies at each of the `places`, 0 to N - 1; -1: none. Of two at one place it is the later.

    Args:
      length: tokens of an image.
    """
    offset = jnp.arange(places) - image_at[:, :, None]
    inside = (offset >= 0) & (offset < length)
    numbers = jnp.where(inside, jnp.arange(image_at.shape[1])[:, None], -1)
    return jnp.max(numbers, axis=1, initial=-1).astype(jnp.int32)


def place_images(
    x: Num[Array, "B T D"], features: Num[Array, "B N L D"], image_at: Int[Array, "B N"]
) -> Num[Array, "B T D"]:
    """`x` with the L features of each image, or its tokens, in the places from `image_at` on."""
    batch, images, length, width = features.shape
    if not images:
        return x
    image = image_numbers(image_at, length, x.shape[1])
    number = jnp.maximum(image, 0)
    row = number * length + jnp.arange(x.shape[1]) - jnp.take_along_axis(image_at, number, axis=1)
    row = jnp.clip(row, 0, images * length - 1)[..., None]  # where there is no image, any
    found = jnp.take_along_axis(features.reshape(batch, images * length, width), row, axis=1)
    return jnp.where((image >= 0)[..., None], found.astype(x.dtype), x)


def take_images(x: Num[Array, "B T D"], image_at: Int[Array, "B N"], length: int) -> Num[Array, "B N L D"]:
    """What stands in the `length` places of each image: the inverse of `place_images`; of none, anything."""
    batch, images = image_at.shape
    row = jnp.clip(image_at[..., None] + jnp.arange(length), 0, x.shape[1] - 1).reshape(batch, images * length, 1)
    return jnp.take_along_axis(x, row, axis=1).reshape(batch, images, length, x.shape[2])


def target_images(batch: Batch) -> Bool[Array, "B N"]:
    """Images that are to be predicted: the place after that of their beginning says so."""
    at, target = batch["image_at"], batch["target"] & (batch["segment"] > 0)
    length = target.shape[1]
    return jnp.take_along_axis(target, jnp.minimum(at + 1, length - 1), axis=1) & (at < length)


def followed_images(text: Bool[Array, "B T"], segment: Int[Array, "B T"], image_at: Int[Array, "B N"]) -> Array:
    """bool [B, N]: images after which some of `text` stands in their document."""
    number, places = documents(segment), jnp.arange(text.shape[1])
    own = jnp.take_along_axis(number, jnp.minimum(image_at, text.shape[1] - 1), axis=1)
    after = (places > image_at[..., None]) & (number[:, None] == own[..., None])
    return jnp.any(after & text[:, None], axis=2)
