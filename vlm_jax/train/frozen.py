"""The parameters that a run does not train: saved once, beside its steps, as a checkpoint of their own."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.errors import UserError
from vlm_jax.train.checkpoint import Checkpoints

PyTree = Any

FROZEN = "frozen"


def save_frozen(directory: Path, frozen: PyTree, identity: Mapping[str, str] | None = None) -> None:
    """Writes them into the directory of a run's checkpoints, before the first of these, and waits until it is done.

    What is there is of a start that came to no checkpoint, and is deleted.

    Raises:
      UserError: as `Checkpoints.save`.
    """
    if not jax.tree.leaves(frozen):
        return
    if jax.process_index() == 0:
        shutil.rmtree(directory / FROZEN, ignore_errors=True)
    with Checkpoints(directory / FROZEN, identity=identity) as once:
        once.save(0, {FROZEN: frozen})


def restore_frozen(directory: Path, abstract: PyTree, identity: Mapping[str, str] | None = None) -> PyTree:
    """What `save_frozen` wrote, verified, laid out as `abstract` says.

    Raises:
      UserError: it is not there, or damaged, or of another run.
    """
    if not jax.tree.leaves(abstract):
        return abstract
    with Checkpoints(directory / FROZEN, read_only=True, identity=identity) as once:
        restored = once.restore({FROZEN: abstract})
    if restored is None:
        raise UserError(
            f"{directory / FROZEN} is not there, which holds the parameters that the run does not train: bring it back "
            f"from a copy, no checkpoint in {directory} is of use without it"
        )
    return restored[1][FROZEN]
