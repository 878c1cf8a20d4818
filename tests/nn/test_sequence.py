"""Interleaved sequences: beside loops over places, with packed documents, two images and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn.sequence import (
    attention_mask,
    documents,
    image_numbers,
    next_tokens,
    place_images,
    positions,
    prefix_numbers,
    up_to_end,
)

LENGTH = 3
"""Tokens of an image."""
SEGMENT = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0],  # text, two images, text; a second document; padding
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # padding on the left; an image that two documents cannot share
        [3, 3, 1, 1, 3, 3, 0, 2, 2, 2, 2, 2, 5, 5],  # numbers in no order, one of them twice
    ],
    np.int32,
)
IMAGE_AT = np.array([[1, 5], [4, 14], [11, 13]], np.int32)
"""The last row's first reaches into another document; its second hides a part of it and is cut off by the row."""
ROWS, PLACES = SEGMENT.shape


def document(row: int, place: int) -> tuple[int, int]:
    """The first and the last place of its stretch."""
    first = last = place
    while first and SEGMENT[row, first - 1] == SEGMENT[row, place]:
        first -= 1
    while last < PLACES - 1 and SEGMENT[row, last + 1] == SEGMENT[row, place]:
        last += 1
    return first, last


def image(row: int, place: int) -> int:
    found = [n for n, at in enumerate(IMAGE_AT[row]) if at <= place < at + LENGTH]
    return found[-1] if found else -1


def test_positions_count_from_a_documents_first_token_and_documents_from_the_rows():
    expected = [[t - document(b, t)[0] for t in range(PLACES)] for b in range(ROWS)]
    np.testing.assert_array_equal(jax.jit(positions)(SEGMENT), expected)
    firsts = [[len({document(b, s) for s in range(t + 1)}) for t in range(PLACES)] for b in range(ROWS)]
    np.testing.assert_array_equal(jax.jit(documents)(SEGMENT), firsts)


def test_an_image_lies_at_each_of_its_places_and_the_later_hides_the_earlier():
    expected = [[image(b, t) for t in range(PLACES)] for b in range(ROWS)]
    numbers = jax.jit(lambda at: image_numbers(at, LENGTH, PLACES))
    np.testing.assert_array_equal(numbers(IMAGE_AT), expected)
    assert expected[0] == [-1, 0, 0, 0, -1, 1, 1, 1, -1, -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(numbers(np.zeros((2, 0), np.int32)), -1)


@pytest.mark.parametrize("images", [False, True])
def test_a_token_attends_to_its_documents_past_and_to_its_whole_image(images: bool):
    expected = np.zeros((ROWS, 1, PLACES, PLACES), bool)
    for b, t, s in np.ndindex(ROWS, PLACES, PLACES):
        together = images and image(b, t) >= 0 and image(b, t) == image(b, s)
        expected[b, 0, t, s] = document(b, t) == document(b, s) and (s <= t or together)
    numbers = image_numbers(jnp.asarray(IMAGE_AT), LENGTH, PLACES) if images else None
    mask = jax.jit(attention_mask)(SEGMENT, numbers)
    np.testing.assert_array_equal(mask, expected)
    assert mask.any(axis=-1).all()  # or a softmax over nothing would be NaN


def test_a_prefix_is_the_places_of_a_document_before_its_first_target():
    target = np.random.default_rng(0).random(SEGMENT.shape) < 0.2
    expected = [[-target[b, document(b, t)[0] : t + 1].any().astype(int) for t in range(PLACES)] for b in range(ROWS)]
    np.testing.assert_array_equal(jax.jit(prefix_numbers)(target, SEGMENT), expected)
    assert 0 < -np.sum(expected) < SEGMENT.size


def test_a_target_is_predicted_by_the_place_before_it_in_its_document():
    random = np.random.default_rng(0)
    tokens, target = random.integers(0, 50, SEGMENT.shape), random.random(SEGMENT.shape) < 0.7
    expected = {}
    for b, t in np.ndindex(ROWS, PLACES):
        if target[b, t] and SEGMENT[b, t] and t > document(b, t)[0]:
            expected[b, t - 1] = tokens[b, t]
    found, predicted = jax.jit(next_tokens)(tokens, target, SEGMENT)
    found = np.asarray(found)
    assert {(b, t): found[b, t] for b, t in np.argwhere(predicted).tolist()} == expected
    assert 0 < len(expected) < target.sum()


def test_a_text_goes_up_to_its_first_end_and_without_one_to_the_last_place():
    tokens = np.array([[5, 2, 7, 2], [2, 2, 2, 2], [0, 1, 3, 4], [1, 3, 4, 2]])
    lengths = [2, 1, 4, 4]
    found = jax.jit(up_to_end, static_argnums=1)(tokens, 2)
    np.testing.assert_array_equal(found, [[place < length for place in range(4)] for length in lengths])


def test_features_stand_in_their_places_and_nothing_else_moves():
    random = np.random.default_rng(0)
    x, features = random.normal(size=(ROWS, PLACES, 4)), random.normal(size=(ROWS, 2, LENGTH, 4))
    expected = np.float32(x)
    for b, t in np.ndindex(ROWS, PLACES):
        if (n := image(b, t)) >= 0:
            expected[b, t] = features[b, n, t - IMAGE_AT[b, n]]
    placed = jax.jit(place_images)(np.float32(x), np.float32(features), IMAGE_AT)
    np.testing.assert_array_equal(placed, expected)
    none = np.zeros((ROWS, 0, LENGTH, 4), np.float32)
    np.testing.assert_array_equal(place_images(np.float32(x), none, IMAGE_AT[:, :0]), np.float32(x))


def test_the_gradient_reaches_the_features_that_are_seen_and_the_text_that_is_not_hidden():
    def loss(x: jax.Array, features: jax.Array) -> jax.Array:
        return place_images(x, features, jnp.asarray(IMAGE_AT)).sum()

    text, images = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        jnp.zeros((ROWS, PLACES, 1)), jnp.zeros((ROWS, 2, LENGTH, 1))
    )
    hidden = [[image(b, t) >= 0 for t in range(PLACES)] for b in range(ROWS)]
    np.testing.assert_array_equal(text[..., 0], ~np.array(hidden))
    seen = [[[image(b, at + i) == n for i in range(LENGTH)] for n, at in enumerate(IMAGE_AT[b])] for b in range(ROWS)]
    inside = IMAGE_AT[..., None] + np.arange(LENGTH) < PLACES
    np.testing.assert_array_equal(images[..., 0], np.array(seen) & inside)
