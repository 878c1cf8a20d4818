"""The factors of an autoencoder's latents in published settings and in a run: there and back, in as few digits."""

from typing import Any

import numpy as np
import pytest

from converted import assert_trees_equal
from vlm_jax.errors import UserError
from vlm_jax.pretrained.moments import factors, moments


@pytest.mark.parametrize(
    ("told", "mean", "deviation"),
    [
        ({"scaling_factor": 0.18215}, [0.0] * 3, [1 / 0.18215] * 3),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, [0.1159] * 3, [1 / 0.3611] * 3),
        ({"scaling_factor": 2.0, "latents_mean": [1.5, 0.0, -2.0], "latents_std": [1.0, 2.0, 0.5]}, [1.5, 0, -2], None),
    ],
)
def test_factors_of_the_latents_are_their_moments(told: dict[str, Any], mean: list[float], deviation: Any):
    """A pipeline takes `shift_factor` from latents and multiplies the rest by `scaling_factor`."""
    deviation = [0.5, 1.0, 0.25] if deviation is None else deviation
    found = moments(told, 3, "config.json")
    np.testing.assert_allclose(found["moments/mean"], mean, rtol=1e-7)
    np.testing.assert_allclose(found["moments/square"], np.square(mean) + np.square(deviation), rtol=1e-7)
    back = factors({"moments": {name: found[f"moments/{name}"] for name in ("mean", "square")}})
    assert_trees_equal(moments(back, 3, "config.json"), found)
    if "latents_mean" in told:
        assert back == {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": deviation}
    else:
        assert back == {"shift_factor": None, **told}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"scaling_factor": 0}, "scaling_factor in here is 0, of latents of a deviation of inf"),
        ({"scaling_factor": -1.0}, r"scaling_factor in here is -1\.0"),
        ({"scaling_factor": "half"}, "scaling_factor in here is 'half'"),
        ({"scaling_factor": 2000.0}, r"that must be a number, at least 0\.001"),
        ({"scaling_factor": 1.0, "latents_mean": [0.0, 1.0]}, r"latents_mean in here is \[0.0, 1.0\]: .* 3 channels"),
        ({"scaling_factor": 1.0, "latents_mean": [0.0] * 3, "shift_factor": 1.0}, "stands beside a shift_factor"),
    ],
)
def test_factors_that_are_none_are_refused(told: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        moments(told, 3, "here")
