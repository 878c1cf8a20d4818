"""Settings that a published architecture, or a model here, has in one way only."""

from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import UserError


def expects(told: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Refuses what is not the only one that the model expresses, which it is where nothing is told."""
    for name, only in settings.items():
        if told.get(name, only) != only:
            raise UserError(f"{name} in {where} is {told[name]!r}, which the model cannot express: {only!r} is")


def known(
    told: Mapping[str, Any], usual: Mapping[str, Any], only: Mapping[str, Any], idle: Collection[str], where: str
) -> dict[str, Any]:
    """The settings with what is left out.

    Args:
      usual: what can be expressed, by name, and what each is where nothing is told.
      only: what can be expressed in one way.
      idle: names of what changes nothing, or not the function.
      where: the file, for messages.

    Raises:
      UserError: there is another one, which may change the function, or one has another value than its only one.
    """
    for name, value in told.items():
        if not (name.startswith("_") or value is None or name in usual or name in only or name in idle):
            raise UserError(
                f"{name} in {where} is {value!r}, which is not known here: leave it out if it changes nothing"
            )
    expects(told, only, where)
    return {**usual, **told}


def require(settings: Mapping[str, tuple[Any, Any]], whose: str) -> None:
    """Refuses to write settings, by their names, that are not the only ones that a layout has."""
    for name, (found, only) in settings.items():
        if found != only:
            raise UserError(f"{name} is {found!r} and {whose}'s layouts have {only!r} alone: the model stays a run")
