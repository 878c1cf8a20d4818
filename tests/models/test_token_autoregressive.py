"""Autoregressive models of codes: of four codes of three kinds all 81 rows are known, and each is checked."""

import itertools
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from compiled import build, program
from reference import random_params
from smallest import AUTOENCODER, CLIP, DECODER, VQVAE
from vlm_jax.errors import UserError
from vlm_jax.models import token_autoregressive
from vlm_jax.models.token_autoregressive import Codes, Config, Sampling
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import FSQ, LFQ, Residual
from vlm_jax.nn.told import Conditions
from vlm_jax.trees import leaves_by_path, part

KEY = jax.random.key(0)
FIRST = replace(
    VQVAE, network=Pyramid(widths=(4,), blocks=1, groups=2), quantizer=FSQ(levels=(3,)), image_size=2, channels=1
)
TOLD = {
    "nothing": Config(first=FIRST, decoder=DECODER),
    "a class": Config(first=FIRST, decoder=DECODER, classes=2),
    "a text": Config(first=FIRST, decoder=DECODER, text=CLIP),
}
ROWS = np.array([*itertools.product(range(3), repeat=4)], np.int32)
TOKENS = np.int32([1, 2, 0])
"""A text of two tokens, and padding."""


class Case:
    def __init__(self, config: Config) -> None:
        self.config, self.model = config, build(config)
        self.apply = program(Codes(config, 2, 3).apply)
        batch = self.batch(np.zeros((3, 2, 2, 1), np.uint8))
        shapes = jax.eval_shape(self.model.init, KEY, batch)
        self.variables = jax.tree.map(jnp.asarray, random_params(shapes, scale=0.7))
        reader = None if config.text is None else build(config.text)
        self.conditions = Conditions(config.classes, 0.1, reader)

    def batch(self, image: np.ndarray) -> dict[str, np.ndarray]:
        count = len(image)
        told = {"label": np.arange(count, dtype=np.int32) % 2, "tokens": np.tile(TOKENS, (count, 1))}
        return {"image": image} | {name: told[name] for name in self.model.inputs if name != "image"}

    def log_probs(self, codes: np.ndarray, **given: np.ndarray) -> np.ndarray:
        """Of each code, told what is given, or nothing."""
        told = self.conditions.in_drawing(self.variables, given, KEY, len(codes))
        return np.asarray(self.apply(self.variables, codes, told), np.float64)


@pytest.fixture(
    scope="module",
    params=["a text", *(pytest.param(name, marks=pytest.mark.slow) for name in TOLD if name != "a text")],
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(TOLD[request.param])


def told_of(case: Case, count: int) -> dict[str, np.ndarray]:
    return {name: value for name, value in case.batch(np.zeros((count, 2, 2, 1), np.uint8)).items() if name != "image"}


def test_the_probabilities_of_all_rows_sum_to_one(case):
    given = {name: np.repeat(value[1:2], 81, axis=0) for name, value in told_of(case, 2).items()}
    log_prob = case.log_probs(ROWS, **given).sum(axis=1)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1, rtol=1e-4)
    assert log_prob.std() > 0.3


def test_a_code_depends_on_those_before_it_alone_and_on_what_is_told(case):
    given = told_of(case, 81)
    found = case.log_probs(ROWS, **given)
    for place in range(4):
        changed = ROWS.copy()
        changed[:, place] = (changed[:, place] + 1) % 3
        other = case.log_probs(changed, **given)
        np.testing.assert_allclose(other[:, :place], found[:, :place], atol=1e-5)
        assert (np.abs(other[:, place:] - found[:, place:]).max(axis=0) > 1e-3).all()
    for name, value in given.items():
        moved = (value + 1) % 2 if name == "label" else np.tile(np.int32([3, 2, 0]), (81, 1))
        assert np.abs(case.log_probs(ROWS, **{name: moved}) - found).max(axis=0).min() > 1e-4
        if name == "tokens":  # after the end of a text nothing is read
            padded = np.tile(np.int32([1, 2, 4]), (81, 1))
            np.testing.assert_allclose(case.log_probs(ROWS, tokens=padded), found, atol=1e-5)


def test_the_likelihood_is_that_of_the_codes_and_of_the_image_given_them(case):
    """A lower bound: of all 81 images the probabilities sum to at most one."""
    images = ROWS.reshape(81, 2, 2, 1).astype(np.uint8)
    batch = case.batch(images) | {name: np.repeat(v[:1], 81, axis=0) for name, v in told_of(case, 2).items()}
    found = np.asarray(case.model.log_likelihood(case.variables, batch, KEY), np.float64)
    first = build(FIRST)
    own = part(case.variables, "first")
    codes = np.asarray(first.encode(own, images))
    prior = case.log_probs(codes.reshape(81, 4), **{n: v for n, v in batch.items() if n != "image"}).sum(axis=1)
    nats = 4 * np.log(3)  # of codes that are all alike, as the first stage has them
    expected = np.asarray(first.log_likelihood(own, {"image": images}, KEY)) + nats + prior
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert scipy.special.logsumexp(found) < 0 and case.model.bound == "lower"


def test_the_loss_is_nats_a_code_of_images_or_of_their_codes(case):
    batch = case.batch(np.random.default_rng(0).integers(0, 3, (6, 2, 2, 1)).astype(np.uint8))
    loss, aux = case.model.loss(case.variables, batch, KEY, 0, train=False)
    codes = case.model.stage(case.variables, batch["image"])
    given = {name: value for name, value in batch.items() if name != "image"}
    np.testing.assert_allclose(loss, -case.log_probs(codes.reshape(6, 4), **given).mean(), rtol=1e-4)
    again, _ = case.model.loss(case.variables, {**given, "stage": codes}, KEY, 0, train=False)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert aux.weight == 6
    jax.tree.map(np.testing.assert_array_equal, aux.state, {"use": case.variables["use"]})
    gradient = jax.grad(lambda p: case.model.loss({**case.variables, "params": p}, batch, KEY, 0, train=True)[0])(
        case.variables["params"]
    )
    still = {path for path, leaf in leaves_by_path(gradient).items() if not np.abs(leaf).any()}
    assert {path for path in still if not path.startswith(("text/", "untold/", "start"))} == {
        path for path in leaves_by_path(gradient) if path.startswith("first/")
    }


@pytest.fixture
def drawing(case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`sample`, of a first stage that decodes codes as they are."""
    first = build(FIRST)
    bare = replace(first, decode=lambda variables, codes: codes[..., None].astype(jnp.uint8))
    monkeypatch.setattr(
        token_autoregressive, "models", SimpleNamespace(build=lambda config: bare if config == FIRST else build(config))
    )
    model = build(case.config)

    def draw(key: jax.Array, given: Any, num: int, temperature: float = 1.0, **sampling: Any) -> np.ndarray:
        sample = partial(model.sample, num=num, temperature=temperature, sampling=Sampling(**sampling))
        return np.asarray(jax.jit(sample)(case.variables, key, given)).reshape(num, 4)

    return draw


def test_codes_are_drawn_with_their_probabilities(case, drawing):
    """By a cache, of a prefix that is told: what the whole row at once says of them."""
    count = 20_000
    given = {name: np.repeat(value[1:2], count, axis=0) for name, value in told_of(case, 2).items()}
    one = {name: value[:81] for name, value in given.items()}
    expected = np.exp(case.log_probs(ROWS, **one).sum(axis=1))
    observed = np.bincount(drawing(KEY, given, count) @ [27, 9, 3, 1], minlength=81) / count
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected / count) + 1e-3).all()


@pytest.mark.parametrize("first_codes", [None, 2])
def test_guidance_goes_away_from_logits_that_are_told_nothing_for_the_first_codes(case, drawing, first_codes):
    """The likeliest code after the other, by whole rows."""
    given = told_of(case, 3)
    if not given:
        with pytest.raises(UserError, match=r"this model is told none: leave sampling\.guidance at 1, not 3\.0"):
            drawing(KEY, given, 3, guidance=3.0)
        return
    untold = case.conditions.in_drawing(case.variables, {}, KEY, 3)
    untold = untold._replace(label=None if untold.label is None else jnp.full(3, 2))

    def log_probs_of_next(codes: np.ndarray, told: Any) -> np.ndarray:
        """[3 rows, 3 codes], given the codes before."""
        place = codes.shape[1]
        found = []
        for code in range(3):
            row = np.zeros((3, 4), np.int32)
            row[:, :place], row[:, place] = codes, code
            found.append(np.asarray(case.apply(case.variables, row, told))[:, place])
        return np.stack(found, axis=1)

    told = case.conditions.in_drawing(case.variables, given, KEY, 3)
    codes = np.zeros((3, 0), np.int32)
    for place in range(4):
        with_told, without = (log_probs_of_next(codes, each) for each in (told, untold))
        scale = 3.0 if first_codes is None or place < first_codes else 1.0
        codes = np.append(codes, np.argmax(without + scale * (with_told - without), axis=1)[:, None], axis=1)
    drawn = drawing(KEY, given, 3, temperature=0.0, guidance=3.0, guidance_codes=first_codes)
    np.testing.assert_array_equal(drawn, codes)


def test_codes_lie_in_rows_and_columns():
    """Of a map of 3x3 the first code is at 0 and 0 as the prefix is, the fifth at 1 and 1."""
    places = Codes(TOLD["nothing"], 3, 3).places(2)
    assert places.tolist() == [[0, 0], [0, 0], *([row, column] for row in range(3) for column in range(3))]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (partial(Config, first=AUTOENCODER, decoder=DECODER), "does not encode images as codes and decode them"),
        (
            partial(Config, first=replace(FIRST, quantizer=Residual(book=LFQ(width=2), books=2)), decoder=DECODER),
            "makes codes [2, 2, 2] and must make a square of them: choose one book",
        ),
        (
            partial(Config, first=FIRST, decoder=replace(DECODER, head_width=6)),
            "a head of 6 features has no pairs for both rows and columns",
        ),
        (partial(Sampling, guidance=-1.0), "sampling.guidance is -1.0: it must be a number, at least 0"),
        (partial(Sampling, top_k=0), "sampling.top_k is 0: it must be at least 1, or None"),
        (partial(Sampling, guidance_codes=0), "sampling.guidance_codes is 0"),
        (partial(Sampling, top_p=0.0), "sampling.top_p is 0.0: it must be above 0 and at most 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Any, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


def check(config: Any) -> None:
    made = config()
    if isinstance(made, Config):
        build(made)
