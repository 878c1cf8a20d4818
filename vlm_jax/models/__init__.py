"""The families: each file exports `Config`, a frozen dataclass, and `build(config) -> Model`; `parts` are shared."""

import dataclasses
import pkgutil
import sys
from typing import Any

from vlm_jax.contract import Model
from vlm_jax.errors import UserError

FAMILIES = tuple(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def family_of(config: Any) -> str:
    """The name of the file that a family's `Config` stands in."""
    return type(config).__module__.rpartition(".")[2]


SIZES = (
    *("image_size", "channels", "levels", "vocab_size", "context_length"),
    *("size", "width", "widths", "hidden", "latent", "embedding", "mlp", "depth", "heads"),
)
"""Of these every family and every part of one has at least 1."""
SHARES = ("dropout", "class_dropout", "condition_dropout")
"""Of training's examples or outputs; all of them would leave nothing to learn from."""


def build(config: Any) -> Model:
    """The model of any family's `Config`.

    Raises:
      UserError: a size is below 1, a number of something below 0, a share outside [0, 1), or a norm's epsilon 0.
    """
    check_ranges(config, "model")
    return sys.modules[type(config).__module__].build(config)


def check_ranges(config: Any, path: str) -> None:
    """Refuses what would otherwise fail as arithmetic, somewhere within the model, or train to nothing."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, name)
            continue
        least = 1 if field.name in SIZES else 0
        if any(isinstance(part, int) and part < least for part in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name} is {value}: it must be at least {least}")
        if field.name in SHARES and not 0 <= value < 1:
            raise UserError(f"{name} is {value}: it must be at least 0 and less than 1")
        if field.name == "norm_eps" and not value > 0:
            raise UserError(f"{name} is {value}: it must be above 0")
