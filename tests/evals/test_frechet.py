"""The distance of two sets of images in the eyes of a judge: Gaussians in closed form, and what the judge is shown."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

from vlm_jax.contract import Input, Model
from vlm_jax.errors import UserError
from vlm_jax.evals import Judge, Pictures, Subject, frechet
from vlm_jax.evals.frechet import frechet_distance


def with_moments(mean: Any, covariance: Any, count: int = 50, seed: int = 0) -> np.ndarray:
    """Points with exactly these."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(raw, rowvar=False)))).T
    return white @ np.linalg.cholesky(np.asarray(covariance, float)).T + mean


def test_in_one_dimension_it_is_the_difference_of_means_and_of_deviations() -> None:
    one, other = with_moments([1.0], [[4.0]]), with_moments([3.0], [[9.0]], 80, 1)
    assert frechet_distance(one, other) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_covariances_that_do_not_commute_have_a_root_of_their_product() -> None:
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    expected = 2 + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(with_moments([0, 0], a), with_moments([1, 1], b, seed=1)) == pytest.approx(expected)


def test_it_is_symmetric_and_that_of_a_set_from_itself_is_0_though_fewer_than_its_dimensions() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 5, 20))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x)) and frechet_distance(x, y) > 1


def seeing(size: int, channels: int, limit: int, look: Any, name: str = "judge") -> Judge:
    inputs = {"image": Input((size, size, channels), "uint8", limit)}
    model = Model(inputs=inputs, init=lambda *_: {}, loss=lambda *_, **__: None, rules=(), embed_image=look)
    return Judge(model, {}, name=name)


def corner(_: Any, image: jax.Array) -> jax.Array:
    return image[:, 0, 0].astype(jnp.float32)


@pytest.mark.parametrize(("channels", "seen"), [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_a_judge_is_shown_images_of_its_size_colours_and_range(channels: int, seen: int) -> None:
    """White is white, whatever its number; 8 of 0 to 16 is the middle of 0 to 255."""
    judge = seeing(4, seen, 256, corner)
    shown = [np.full((2, 8, 8, channels), 16, np.uint8), np.full((1, 8, 8, channels), 8, np.uint8)]
    np.testing.assert_array_equal(judge.embeddings(shown, 17), np.repeat([[255.0], [255.0], [128.0]], seen, axis=1))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of sampling."""

    brighter: int = 0


def sampling(images: np.ndarray, valid: int, value: int) -> Subject:
    """A model all of whose samples have one value."""

    def sample(_: Any, key: jax.Array, given: Any, *, num: int, temperature: float, sampling: Any) -> jax.Array:
        return jnp.full((num, 2, 2, 1), value + sampling.brighter, jnp.uint8)

    inputs = {"image": Input((2, 2, 1), "uint8", 256)}
    return Subject(
        model=Model(
            inputs=inputs,
            init=lambda *_: {},
            loss=lambda *_, **__: None,
            rules=(),
            sampling=Settings(),
            sample=sample,
        ),
        variables={},
        batches=lambda: iter(()),
        examples=len(images) + valid,
        pictures=Pictures(levels=256, held_out=lambda: iter([images, images[:valid]][: 1 + (valid > 0)])),
        judges=(seeing(2, 1, 256, corner),),
    )


def test_as_many_samples_are_drawn_as_there_are_held_out_images() -> None:
    images = np.zeros((4, 2, 2, 1), np.uint8)
    images[1::2] = 20
    subject = sampling(images, 2, 40)
    # Of 0, 20, 0, 20 and 0, 20 the mean is 10 and the variance 120; samples of one value have none.
    assert frechet.run(subject) == {"distance_of_embeddings": pytest.approx(30**2 + 120), "samples": 6}
    told = replace(subject, sampling=Settings(brighter=10))  # as the run's settings say
    assert frechet.run(told)["distance_of_embeddings"] == pytest.approx(40**2 + 120)


def test_each_of_several_judges_says_how_far_it_finds_the_same_samples() -> None:
    subject = sampling(np.zeros((3, 2, 2, 1), np.uint8), 0, 40)
    twice = seeing(2, 1, 256, lambda _, image: 2 * corner(_, image), "other")
    found = frechet.run(replace(subject, judges=(*subject.judges, twice)))
    assert found == {
        "distance_of_embeddings_by_judge": pytest.approx(40**2),
        "distance_of_embeddings_by_other": pytest.approx(80**2),
        "samples": 3,
    }


def test_what_a_judge_cannot_look_at_is_told() -> None:
    subject = sampling(np.zeros((1, 2, 2, 1), np.uint8), 0, 0)
    with pytest.raises(UserError, match="one image has no covariance"):
        frechet.run(subject)
