"""The presets of all families, found in the files beside this one."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace

import experiments
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
