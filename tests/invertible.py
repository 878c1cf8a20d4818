"""What the tests of flows share: variables away from their initialisation, and the determinant by brute force."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.trees import map_with_path


def random_variables(module: nn.Module, *args: Any, scale: float = 0.1) -> Any:
    """As initialised, and each parameter moved at random but the permutations, which never train."""
    random = np.random.default_rng(0)

    def move(path: str, leaf: jax.Array) -> jax.Array:
        return leaf if "permutation" in path else leaf + scale * random.normal(size=leaf.shape).astype(np.float32)

    return map_with_path(move, jax.jit(module.init)(jax.random.key(0), *args))


def jacobian_log_det(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """log |det| of a function of one image, in float64."""
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda x: function(x).ravel()))(x), np.float64)
    return np.linalg.slogdet(jacobian.reshape(x.size, x.size))[1]
