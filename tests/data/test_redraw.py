"""Drawings in other styles: whole, of colours near their own, with lines where colours change."""

from typing import Any

import numpy as np
import pytest

from vlm_jax.contract import Input
from vlm_jax.data import Data, Image, Redraw, example
from vlm_jax.data.picture import picture_of
from vlm_jax.data.redraw import outline
from vlm_jax.errors import UserError

INPUTS = {"image": Input((64, 64, 3), "uint8", 256)}
RED = (200, 40, 40)


def square(side: int = 64) -> np.ndarray:
    """A red square on white."""
    image = np.full((side, side, 3), 255, np.uint8)
    image[side // 4 : -side // 4, side // 4 : -side // 4] = RED
    return image


def read(image: np.ndarray, rng: np.random.Generator | None, **settings: Any) -> np.ndarray:
    data = Data(name="x", fields=(Image(redraw=Redraw(**settings)),))
    return example({"record": "0", "image": picture_of(image)}, data, INPUTS, None, rng)["image"]


def test_nothing_changes_where_nothing_is_to_and_never_in_evaluation() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(read(square(), rng), square())
    np.testing.assert_array_equal(read(square(), None, smallest=0.5, outlined=1.0, tint=1.0, fade=1.0), square())


def test_what_makes_a_training_image_another_each_time_says_so() -> None:
    assert not Image(resize="pad").augments
    for settings in ({"smallest": 0.9}, {"outlined": 0.1}, {"tint": 0.1}, {"fade": 0.1}):
        assert Image(redraw=Redraw(**settings)).augments
    assert Image(flip=True).augments and Image(crop_min_area=0.9).augments


def test_a_drawing_is_whole_and_of_its_shape_whatever_its_place_and_size() -> None:
    """Of a uniform share of the side and anywhere; what is not square has paper beside it."""
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (64, 32), (100, 200)):
        image = np.zeros((height, width, 3), np.uint8)
        shares, places = [], []
        for _ in range(200):
            dark = 1 - read(image, rng, smallest=0.5)[..., 0] / 255
            rows, columns = dark.sum(axis=0).max(), dark.sum(axis=1).max()
            assert rows / columns == pytest.approx(height / width, rel=0.08)
            shares.append(max(rows, columns) / 64)
            places.append((dark.sum(axis=1) @ np.arange(64)) / dark.sum() + 0.5)
        assert (
            0.49 < min(shares) < 0.53 and 0.97 < max(shares) < 1.01 and np.mean(shares) == pytest.approx(0.75, abs=0.04)
        )
        assert np.mean(places) == pytest.approx(32, abs=2) and np.std(places) > 3


def test_lines_are_black_of_their_width_and_where_colours_change() -> None:
    for width in (1, 2):
        drawn = outline(square(), width)
        black = (drawn == 0).all(axis=-1)
        assert black[32].sum() == 2 * width
        np.testing.assert_array_equal(drawn[~black], square()[~black])
    np.testing.assert_array_equal(outline(np.full((8, 8, 3), 9, np.uint8), 2), 9)
    faint = np.full((8, 8, 3), 100, np.uint8)
    faint[:, 4:] = 139
    np.testing.assert_array_equal(outline(faint, 2), faint)


def test_so_many_have_lines() -> None:
    rng = np.random.default_rng(0)
    lined = [not read(square(), rng, outlined=0.25).min(axis=(0, 1)).any() for _ in range(400)]
    assert np.mean(lined) == pytest.approx(0.25, abs=0.07)


def test_a_tint_leaves_white_and_black_and_turns_each_colour_by_its_power() -> None:
    rng = np.random.default_rng(0)
    powers = []
    for _ in range(300):
        image = square()
        image[0] = 0
        drawn = read(image, rng, tint=0.3)
        assert (drawn[0] == 0).all() and (drawn[1] == 255).all()
        powers.append(np.log(np.log(drawn[32, 32] / 255) / np.log(np.array(RED) / 255)))
    assert np.abs(powers).max() < 0.32 and np.std(powers) == pytest.approx(0.3 / np.sqrt(3), rel=0.1)
    assert np.abs(np.corrcoef(np.array(powers).T) - np.eye(3)).max() < 0.2


def test_faded_colours_lie_between_themselves_and_their_grey() -> None:
    rng = np.random.default_rng(0)
    grey = np.dot(RED, [0.299, 0.587, 0.114])
    shares = []
    for _ in range(300):
        drawn = read(square(), rng, fade=0.8)
        assert (drawn[0] == 255).all()
        distance = (np.array(RED) - drawn[32, 32].astype(float)) / (np.array(RED) - grey)
        np.testing.assert_allclose(distance, distance.mean(), atol=0.01)
        shares.append(distance.mean())
    assert -0.01 < min(shares) < 0.03 and 0.77 < max(shares) < 0.81 and np.mean(shares) == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smallest": 0.0}, r"redraw.smallest is 0.0: it must lie in \(0, 1\]"),
        ({"outlined": 1.5}, r"redraw.outlined is 1.5: a share lies in \[0, 1\]"),
        ({"fade": -0.1}, r"redraw.fade is -0.1: a share lies in \[0, 1\]"),
        ({"tint": float("nan")}, "redraw.tint is nan: it must be at least 0"),
    ],
)
def test_what_is_no_share_is_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Redraw(**change)


def test_what_cuts_drawings_or_has_few_levels_is_refused() -> None:
    with pytest.raises(UserError, match=r"crop_min_area is 0.5 and redraw.smallest 0.9, which shows all"):
        Image(crop_min_area=0.5, redraw=Redraw(smallest=0.9))
    with pytest.raises(UserError, match="redraw is for images of 256 levels and the model reads 17"):
        Image(redraw=Redraw(outlined=0.5)).check({"image": Input((8, 8, 1), "uint8", 17)})
