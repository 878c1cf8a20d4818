"""vlm_jax: vision-language and image generative models in JAX, under one contract and one train step."""

from typing import TYPE_CHECKING, Any

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError

if TYPE_CHECKING:
    from vlm_jax.workdir import Loaded, load

__all__ = ["Aux", "Batch", "Input", "Loaded", "Model", "UserError", "Variables", "load"]


def __getattr__(name: str) -> Any:
    # What reads runs imports data sets and checkpoints, which a model alone needs not.
    if name in ("Loaded", "load"):
        from vlm_jax import workdir

        return getattr(workdir, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
