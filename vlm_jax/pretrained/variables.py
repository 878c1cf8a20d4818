"""All that a model keeps, of published weights: what files hold, what they say, and what they leave to the model."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import abstract_batch
from vlm_jax.models import build
from vlm_jax.pretrained.layout import Layout, Source, abstract_variables, nested, read_params
from vlm_jax.trees import leaves_by_path


def read_variables(layout: Layout, config: Any, source: Source) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The variables of a `Config`'s model, as NumPy arrays; parameters all bfloat16 or all float32.

    Returns:
      The variables, and those of the parameters by their paths that are drawn, for no file of the layout holds them.

    Raises:
      UserError: as `read_params`, or the settings beside the file are none.
    """
    abstract = leaves_by_path(dict(abstract_variables(config)))
    params = leaves_by_path(read_params(layout, config, source.tensors))
    found = {f"params/{path}": array for path, array in params.items()} | dict(layout.collections(source, config))
    assert {path: array.shape for path, array in found.items() if array.shape != abstract[path].shape} == {}
    rest = begun(config, abstract.keys() - found.keys())
    dtype = next(iter(params.values())).dtype
    drawn = {path: array.astype(dtype) for path, array in rest.items() if path.startswith("params/")}
    return nested(found | rest | drawn), {path.removeprefix("params/"): array for path, array in drawn.items()}


def begun(config: Any, paths: Collection[str]) -> dict[str, np.ndarray]:
    """What a model of a `Config` begins with at these paths, of the seed 0. XLA computes nothing else for it."""
    if not paths:
        return {}
    model = build(config)
    batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_batch(model.inputs, 1).items()}

    def those(key: jax.Array) -> dict[str, jax.Array]:
        variables = leaves_by_path(dict(model.init(key, batch)))
        return {path: variables[path] for path in paths}

    return {path: np.asarray(leaf) for path, leaf in jax.jit(those)(jax.random.key(0)).items()}
