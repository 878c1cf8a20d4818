"""The distance of two sets of images in the eyes of a judge: Gaussians in closed form, and what the judge is shown."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judging import Sampling, corner, sampler, seeing
from scipy.linalg import sqrtm

from vlm_jax.errors import UserError
from vlm_jax.evals import frechet
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


@pytest.mark.parametrize(("channels", "seen"), [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_a_judge_is_shown_images_of_its_size_colours_and_range(channels: int, seen: int) -> None:
    """White is white, whatever its number; 8 of 0 to 16 is the middle of 0 to 255."""
    judge = seeing(4, seen, 256)
    shown = [np.full((2, 8, 8, channels), 16, np.uint8), np.full((1, 8, 8, channels), 8, np.uint8)]
    np.testing.assert_array_equal(judge.embeddings(shown, 17), np.repeat([[255.0], [255.0], [128.0]], seen, axis=1))


def test_what_is_seen_of_an_image_hangs_on_no_other_of_its_batch() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 4, 4, 1), np.uint8)
    np.testing.assert_array_equal(seeing(4, 1, 256).embeddings([images[:3], images[3:]], 256)[:, 0], np.arange(5))


def test_of_features_a_judge_sees_the_mean_as_long_as_it_is() -> None:
    judge = seeing(4, 3, 256, features=True)
    assert judge.sees == "features" and not judge.reads and seeing(4, 3, 256).sees == "embeddings"
    np.testing.assert_array_equal(judge.embeddings([np.full((2, 4, 4, 3), 7, np.uint8)], 256), np.full((2, 3), 7))


def test_as_many_samples_are_drawn_as_there_are_held_out_images() -> None:
    images = np.zeros((4, 2, 2, 1), np.uint8)
    images[1::2] = 20
    subject = sampler(images, 40, 2)
    # Of 0, 20, 0, 20 and 0, 20 the mean is 10 and the variance 120; samples of one value have none.
    assert frechet.run(subject) == {"distance_of_embeddings": pytest.approx(30**2 + 120), "samples": 6}
    told = replace(subject, sampling=Sampling(brighter=10))  # as the run's settings say
    assert frechet.run(told)["distance_of_embeddings"] == pytest.approx(40**2 + 120)


def test_each_of_several_judges_says_how_far_it_finds_the_same_samples() -> None:
    subject = sampler(np.zeros((3, 2, 2, 1), np.uint8), 40)
    twice = seeing(2, 1, 256, lambda _, image: 2 * corner(_, image), "other")
    found = frechet.run(replace(subject, judges=(*subject.judges, twice)))
    assert found == {
        "distance_of_embeddings_by_judge": pytest.approx(40**2),
        "distance_of_embeddings_by_other": pytest.approx(80**2),
        "samples": 3,
    }


def test_it_is_called_fid_in_the_eyes_of_one_network_alone() -> None:
    subject = sampler(np.zeros((3, 2, 2, 1), np.uint8), 40)
    judges = (
        seeing(2, 1, 256, name="clip"),
        seeing(2, 1, 256, name="other", features=True),
        seeing(2, 1, 256, name="inception", features=True, fid=True),
    )
    names = ("distance_of_embeddings_by_clip", "distance_of_features_by_other", "fid_by_inception", "samples")
    assert tuple(frechet.run(replace(subject, judges=judges))) == names
    alone = frechet.run(replace(subject, judges=judges[2:]))
    assert alone == {"fid": pytest.approx(40**2), "samples": 3}


def test_what_a_judge_cannot_look_at_is_told() -> None:
    subject = sampler(np.zeros((1, 2, 2, 1), np.uint8), 0)
    with pytest.raises(UserError, match="one image has no covariance"):
        frechet.run(subject)
