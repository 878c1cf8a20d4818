"""Models whose functions are compiled whole: one operation after the other takes several times as long to compile."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from vlm_jax.contract import CAPABILITIES, Model
from vlm_jax.models import build as plain

STATIC = ("train", "num", "temperature", "sampling")


def program(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the contract, or of a module, compiled."""
    return jax.jit(lambda *args, **kwargs: function(*args, **kwargs), static_argnames=STATIC)


def build(config: Any) -> Model:
    """As the library's, with a compiled loss and capabilities; values that they are told are then not looked at."""
    model = plain(config)
    able = {name: program(function) for name in CAPABILITIES if (function := getattr(model, name)) is not None}
    return replace(model, loss=program(model.loss), **able)
