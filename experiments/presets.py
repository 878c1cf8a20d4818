"""The presets of all families, found in the files beside this one."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import experiments
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment


def presets() -> dict[str, tuple[str, Experiment]]:
    """Name -> description and experiment: each function in the `PRESETS` of each file, its name with dashes."""
    found: dict[str, tuple[str, Experiment]] = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name not in ("run", "presets"):
            family: tuple[Callable[[], Experiment], ...] = importlib.import_module(f"experiments.{module.name}").PRESETS
            for function in family:
                name = function.__name__.replace("_", "-")
                found[name] = (function.__doc__ or "", replace(function(), workdir=f"runs/{name}"))
    return found


def check_preset(arguments: Sequence[str], known: Collection[str]) -> None:
    """Refuses a command line whose first word is no preset, and names those most like it."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        near = difflib.get_close_matches(arguments[0], known, n=3, cutoff=0.3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"there is no preset {arguments[0]!r}: {meant}--help lists all")
