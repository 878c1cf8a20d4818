"""vlm_jax: vision-language and image generative models in JAX, under one contract and one train step."""

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.workdir import Loaded, load

__all__ = ["Aux", "Batch", "Input", "Loaded", "Model", "UserError", "Variables", "load"]
