"""What the tests of densities over images share: every image there is, and what is known of all of them together."""

import itertools
import math

import numpy as np

from vlm_jax.nn.images import Images


def all_images(config: Images) -> np.ndarray:
    """uint8 [levels ** (H W C), H, W, C]"""
    values = itertools.product(range(config.levels), repeat=math.prod(config.shape))
    return np.array(list(values), np.uint8).reshape(-1, *config.shape)


IMAGES = all_images(Images(image_size=2, channels=1, levels=3))
"""81."""


def check_importance_weights(log_weights: np.ndarray, inside: tuple[float, float]) -> None:
    """Their means are estimates of each image's probability; an error of 0.005 bits a dimension is 0.0138 of it.

    The bars are half as wide, so that it shows whichever way the estimate errs.

    Args:
      log_weights: [draws, images]
      inside: the mass of the density within the range of the levels, and its error.
    """
    totals = np.exp(log_weights).sum(axis=1)
    error = math.hypot(totals.std(ddof=1) / math.sqrt(len(totals)), inside[1])
    assert 3.5 * error < 0.0069 * inside[0]
    assert abs(totals.mean() - inside[0]) < 3.5 * error
    assert inside[0] > 0.5


def check_bound(log_weights: np.ndarray) -> None:
    """Of [draws, images]: their mean is below the probability that they estimate."""
    bound, probability = log_weights.mean(axis=0), np.exp(log_weights).mean(axis=0)
    assert np.exp(bound).sum() <= 1 + 1e-5
    assert (np.exp(bound) < probability).all()
    # It is a bound that says something: a constant below all would pass what stands above.
    assert np.exp(bound).sum() > 0.1
