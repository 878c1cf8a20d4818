"""Inception with weights of which none hides another, as ours and by the keys of their release."""

from typing import Any

import numpy as np

from vlm_jax.models import inception
from vlm_jax.pretrained.inception import LAYOUT
from vlm_jax.pretrained.layout import abstract_params, written, written_keys
from vlm_jax.trees import map_with_path


def random_params(config: inception.Config, seed: int = 0) -> Any:
    """Norms and biases are not where they begin, and variances so small that what is added to them counts."""
    random = np.random.default_rng(seed)

    def drawn(path: str, leaf: Any) -> np.ndarray:
        noise, name = random.normal(size=leaf.shape), path.rpartition("/")[2]
        values = {
            "kernel": noise * np.sqrt(0.05 / max(1, np.prod(leaf.shape[:-1]))),
            "variance": 0.02 * np.exp(noise),
            "scale": 1 + 0.3 * noise,
            "mean": 0.05 * noise,
            "bias": 0.1 * noise,
        }
        return values[name].astype(np.float32)

    return map_with_path(drawn, abstract_params(config))


def arrays_of(config: inception.Config, params: Any) -> dict[str, np.ndarray]:
    """As published, but for counts of batches."""
    return dict(written(LAYOUT, config, params, written_keys(LAYOUT, config, params)))
