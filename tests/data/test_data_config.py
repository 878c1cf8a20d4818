"""What data cannot be."""

import pytest

from vlm_jax.data import Data, Image
from vlm_jax.errors import UserError


@pytest.mark.parametrize("area", [0.0, 1.5, float("nan")])
def test_a_crop_is_a_share_of_the_image(area):
    with pytest.raises(UserError, match=rf"crop_min_area is {area}: it must lie in \(0, 1\]"):
        Image(crop_min_area=area)


def test_what_takes_the_whole_picture_crops_nothing():
    with pytest.raises(UserError, match=r"crop_min_area is 0\.5 and resize squash, which crops nothing: choose one"):
        Image(resize="squash", crop_min_area=0.5)


def test_a_colour_has_256_levels():
    with pytest.raises(UserError, match=r"pad_colour is \[0, 256, 0\]: each must lie in \[0, 255\]"):
        Image(resize="pad", pad_colour=(0, 256, 0))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_a_number_above_0(weight):
    with pytest.raises(UserError, match=f"the weight of easy_vqa in the mixture is {weight}"):
        Data(name="openmoji", mixture=(("easy_vqa", weight),))


@pytest.mark.parametrize("mixture", [(("openmoji", 1.0),), (("digits", 1.0), ("digits", 2.0))])
def test_a_data_set_stands_once_in_a_mixture(mixture):
    with pytest.raises(UserError, match=f"{mixture[0][0]} is twice in the mixture"):
        Data(name="openmoji", mixture=mixture)
