"""Settings that a published architecture, or a model here, has in one way only."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError


def expects(told: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Refuses what is not the only one that the model expresses, which it is where nothing is told."""
    for name, only in settings.items():
        if told.get(name, only) != only:
            raise UserError(f"{name} in {where} is {told[name]!r}, which the model cannot express: {only!r} is")


def require(settings: Mapping[str, tuple[Any, Any]], whose: str) -> None:
    """Refuses to write settings, by their names, that are not the only ones that a layout has."""
    for name, (found, only) in settings.items():
        if found != only:
            raise UserError(f"{name} is {found!r} and {whose}'s layouts have {only!r} alone: the model stays a run")
