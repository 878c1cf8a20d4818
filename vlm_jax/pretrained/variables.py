"""All that a model keeps, of published weights: what files hold, what they say, and what they leave to the model."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import abstract_batch
from vlm_jax.data import Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.models import build
from vlm_jax.pretrained.layout import Layout, abstract_variables, nested, read_params
from vlm_jax.pretrained.source import Source
from vlm_jax.trees import leaves_by_path

SAME = 0.01
"""Of the deviation of what is derived: within it, it is what it was derived as, in bfloat16 and on other hardware."""


def read_variables(
    layout: Layout, config: Any, source: Source, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The variables of a `Config`'s model, as NumPy arrays; parameters all bfloat16 or all float32.

    Args:
      tokenizer: of the model, by which what is derived of a text is.

    Returns:
      The variables, and those of the parameters by their paths that are drawn, for no file of the layout holds them.

    Raises:
      UserError: as `read_params`, or the settings beside the file are none, or what is derived needs a tokenizer.
    """
    abstract = leaves_by_path(dict(abstract_variables(config)))
    tree = read_params(layout, config, source.tensors)
    params = leaves_by_path(tree)
    dtype = next(iter(params.values())).dtype
    for path in layout.derived.keys() - params.keys():
        params[path] = np.asarray(layout.derived[path](config, tree, tokenizer), dtype)
    found = {f"params/{path}": array for path, array in params.items()} | dict(layout.collections(source, config))
    assert {path: array.shape for path, array in found.items() if array.shape != abstract[path].shape} == {}
    rest = begun(config, abstract.keys() - found.keys())
    drawn = {path: array.astype(dtype) for path, array in rest.items() if path.startswith("params/")}
    return nested(found | rest | drawn), {path.removeprefix("params/"): array for path, array in drawn.items()}


def begun(config: Any, paths: Collection[str]) -> dict[str, np.ndarray]:
    """What a model of a `Config` begins with at these paths, of the seed 0. XLA computes nothing else for it."""
    if not paths:
        return {}
    model = build(config)
    batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_batch(model.inputs, 1).items()}

    def those(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        variables = leaves_by_path(dict(model.init(key, batch)))
        return {path: variables[path] for path in paths}

    # An argument, for of what is one no values are checked: zeros are no text, which ends.
    return {path: np.asarray(leaf) for path, leaf in jax.jit(those)(jax.random.key(0), batch).items()}


def without_derived(
    layout: Layout, config: Any, params: Mapping[str, Any], tokenizer: Tokenizer | None
) -> Mapping[str, Any]:
    """The parameters that are to be written: of those that can be derived the ones that have come to be others.

    Raises:
      UserError: one of these has no place in the layout.
    """
    leaves = leaves_by_path(params)
    others = nested({path: leaf for path, leaf in leaves.items() if path not in layout.derived})
    placed = {entry.path for entry in layout.entries(config)}
    for path, derive in layout.derived.items():
        expected = derive(config, others, tokenizer)
        if np.allclose(np.asarray(leaves[path], np.float32), expected, rtol=0, atol=SAME * float(np.std(expected))):
            del leaves[path]
        elif path not in placed:
            raise UserError(
                f"{path} has been trained and the layout {layout.name} has no place for it: freeze ^{path}$ as the "
                f"others train, or the model stays a run"
            )
    return nested(leaves)
