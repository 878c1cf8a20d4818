"""Loops of seconds, compiled to run fast: the tests' other programs are compiled to compile fast (`conftest.py`)."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

OPTIONS = {"xla_backend_optimization_level": 1}


def mapped(function: Callable[[Any], jax.Array], arguments: Any, batch_size: int | None = None) -> np.ndarray:
    """[N, ...] in float64: the function of each of N arguments, such as keys, one or `batch_size` at a time."""
    loop = jax.jit(lambda xs: jax.lax.map(function, xs, batch_size=batch_size), compiler_options=OPTIONS)
    return np.asarray(loop(arguments), np.float64)
