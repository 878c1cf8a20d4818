"""The items of a checkpoint: what arrays they hold, and these arrays.

Orbax would cast another dtype silently, and it may write what nobody can open: what is here compares shapes and
dtypes, of what was just saved and of what is restored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from vlm_jax.errors import UserError
from vlm_jax.trees import leaves_by_path

PyTree = Any


def described(items: Mapping[str, PyTree]) -> dict[str, str]:
    """The arrays of items by their paths, such as "params/kernel", as texts such as "float32[2, 3]"."""
    return {path: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves_by_path(dict(items)).items()}


def opened(checkpoint: Path, name: str) -> dict[str, str]:
    """The arrays of a saved item, as `described` has them; none if there is no such item.

    Raises:
      OSError: it cannot be opened.
      ValueError: likewise.
    """
    if not (checkpoint / name).is_dir():
        return {}
    handler = ocp.StandardCheckpointHandler()
    try:
        return described(handler.metadata(checkpoint / name).tree)
    finally:
        handler.close()


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Where two sets of arrays differ."""
    return [
        f"{found.get(path, 'nothing')} for {path} where {expected.get(path, 'nothing')} is expected"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def restore(checkpoint: Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The items, once all their leaves are known to be the expected ones.

    Raises:
      UserError: they are others, or cannot be opened.
    """
    for name, tree in abstract.items():
        try:
            found = opened(checkpoint, name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name} in {checkpoint} cannot be opened, though its files are what was written: {error}"
            ) from error
        if wrong := differences(found, described({name: tree})):
            raise UserError(
                f"{checkpoint} holds {wrong[0]}: use the settings that it was saved with, or another directory"
            )
    with ocp.StandardCheckpointer() as reader:
        return {
            name: reader.restore(checkpoint / name, {name: tree})[name] if described({name: tree}) else tree
            for name, tree in abstract.items()
        }
