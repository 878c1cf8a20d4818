"""What models of images are told: a share of it in training, what is given in drawing, and nothing where nothing is."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallest import CLIP, IMAGE
from vlm_jax.errors import UserError
from vlm_jax.models import build, vae
from vlm_jax.nn.told import Conditions

KEY = jax.random.key(0)
READER = build(CLIP)
COUNT = 2000
TOKENS = np.tile(np.int32([[1, 2, 0], [3, 4, 2]]), (COUNT // 2, 1))
BATCH = {"tokens": jnp.asarray(TOKENS), "label": jnp.arange(COUNT, dtype=jnp.int32) % 3}
CONDITIONS = Conditions(3, 0.3, READER)


@pytest.fixture(scope="module")
def variables() -> Any:
    return CONDITIONS.drawn(KEY)


def test_an_image_is_told_both_its_class_and_its_text_or_neither(variables):
    told = CONDITIONS.in_training(variables, BATCH, KEY)
    heard = np.asarray(told.text.known)
    assert abs(heard.mean() - 0.7) < 0.04
    np.testing.assert_array_equal(told.label, np.where(heard, BATCH["label"], 3))
    whole = replace(CONDITIONS, dropout=0.0).in_training(variables, BATCH, KEY)
    assert whole.text.known.all() and (whole.label == BATCH["label"]).all()


def test_texts_are_read_by_the_part_that_is_called_text(variables):
    told = CONDITIONS.everything(variables, BATCH)
    alone = {"params": variables["params"]["text"]}
    features, inside = READER.text_features(alone, BATCH["tokens"])
    np.testing.assert_array_equal(told.text.features, features)
    np.testing.assert_array_equal(told.text.inside, inside)
    assert inside[:2].tolist() == [[True, True, False], [True, True, True]]


def test_what_is_not_given_is_drawn_or_untold(variables):
    told = CONDITIONS.in_drawing(variables, {}, KEY, COUNT)
    np.testing.assert_allclose(np.bincount(told.label) / COUNT, 1 / 3, atol=0.05)
    assert told.text.features.shape == (COUNT, 3, 8) and not told.text.known.any()
    told = CONDITIONS.in_drawing(variables, {"tokens": BATCH["tokens"]}, KEY, COUNT)
    assert told.text.known.all() and len(told.label) == COUNT
    neither = Conditions(None, 0.1, None)
    assert neither.inputs == {} and neither.drawn(KEY) == {}
    assert neither.in_drawing({}, {}, KEY, 2) == neither.in_training({}, {}, KEY) == (None, None)


def test_guidance_of_what_was_never_untold_is_refused():
    CONDITIONS.check_guidance(3.0)
    Conditions(None, 0.0, None).check_guidance(1.0)
    with pytest.raises(UserError, match=r"this model is told none: leave sampling\.guidance at 1, not 3\.0"):
        Conditions(None, 0.1, None).check_guidance(3.0)
    with pytest.raises(UserError, match=r"which this model never had to make \(condition_dropout 0\): leave sampling"):
        replace(CONDITIONS, dropout=0.0).check_guidance(0.0)


def test_a_reader_that_reads_no_text_is_refused():
    with pytest.raises(UserError, match=r"the model that is to read texts has no text_features: choose another"):
        Conditions(None, 0.1, build(vae.Config(**IMAGE, latent=2, widths=(8,), mixtures=1)))
