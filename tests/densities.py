"""What the tests of densities over images share: every image there is, and what is known of all of them together."""

import itertools
import math
from typing import Any

import jax
import numpy as np
import optax

from vlm_jax.contract import Model
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


def check_copies(model: Model) -> None:
    """Trained on two images alone, by their distortion, a model tells them apart and copies them."""
    images = np.array([[0, 2, 2, 0], [2, 0, 1, 2]], np.uint8).reshape(2, 2, 2, 1)
    optimizer = optax.adam(1e-2)
    assert model.encode is not None and model.decode is not None
    encode, decode = model.encode, model.decode

    @jax.jit
    def train(key: jax.Array) -> Any:
        variables = model.init(key, {"image": images})

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            def distortion(params: Any) -> jax.Array:
                _, aux = model.loss({**variables, "params": params}, {"image": images}, key, 0, train=True)
                return aux.metrics["distortion_bits_per_dim"]

            params, moments = carry
            updates, moments = optimizer.update(jax.grad(distortion)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        start = variables["params"], optimizer.init(variables["params"])
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, 300))
        return {**variables, "params": params}

    variables = train(jax.random.key(1))
    copies = jax.jit(lambda variables: decode(variables, encode(variables, images)))(variables)
    np.testing.assert_array_equal(copies, images, strict=True)
