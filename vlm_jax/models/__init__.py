"""The families. Each file exports `Config`, a frozen dataclass, and `build(config) -> Model`."""

import importlib
import pkgutil
import sys
from typing import Any

import msgspec

from vlm_jax.contract import Model
from vlm_jax.errors import UserError

FAMILIES = tuple(module.name for module in pkgutil.iter_modules(__path__))


def family_of(config: Any) -> str:
    """The name of the file that a family's `Config` stands in."""
    return type(config).__module__.rpartition(".")[2]


def build(config: Any) -> Model:
    """The model of any family's `Config`."""
    return sys.modules[type(config).__module__].build(config)


def read_config(family: str, fields: Any) -> Any:
    """The inverse of serialising a `Config` to JSON.

    Raises:
      UserError: no such family, or fields that its `Config` does not have.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no model family {family!r}: there are {', '.join(FAMILIES)}")
    try:
        return msgspec.convert(fields, importlib.import_module(f"{__name__}.{family}").Config)
    except msgspec.ValidationError as error:
        raise UserError(f"the configuration does not describe a model of the family {family!r}: {error}") from error
