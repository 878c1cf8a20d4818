"""The presets of all families, found in the files beside this one, and the command line that changes their fields."""

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import tyro

import experiments
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment

T = TypeVar("T")


def functions(first: str = "") -> Iterator[tuple[str, Callable[[], Experiment]]]:
    """Each function in the `PRESETS` of each file under its name with dashes, unbuilt, and files imported as needed.

    Args:
      first: a preset's name; the files whose names it starts with come before the others.
    """
    names = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
    families = [name for name in names if name not in ("run", "presets", "data")]
    for family in sorted(families, key=lambda family: not first.replace("-", "_").startswith(family)):
        for function in importlib.import_module(f"experiments.{family}").PRESETS:
            yield function.__name__.replace("_", "-"), function


def presets() -> dict[str, tuple[str, Experiment]]:
    """Name -> description and experiment."""
    return {name: (inspect.getdoc(function) or "", built(name, function)) for name, function in functions()}


def built(name: str, function: Callable[[], Experiment]) -> Experiment:
    """The preset, in the directory of its name."""
    return replace(function(), workdir=f"runs/{name}")


def unknown_preset(name: str, known: Iterable[str]) -> UserError:
    """There is no preset of this name; those most like it."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"there is no preset {name!r}: {meant}--help lists all")


def from_command_line(program: str, purpose: str, make: Callable[[Experiment], T]) -> tuple[str, T]:
    """Reads `PRESET [--field.subfield VALUE ...]` from the command line; --help in its place lists all presets.

    Args:
      program: how the command is called, such as "python -m experiments.run".
      purpose: what it does with a preset, one sentence.
      make: from the preset to what the fields belong to, a dataclass.

    Returns:
      The preset's name, and `make` of it with the fields that the command line names changed.

    Raises:
      UserError: there is no such preset.
      SystemExit: after help, with status 0; or a field does not exist or does not take the value, with status 2.
    """
    name, *fields = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(listing(program, purpose))
        sys.exit(0)
    if not name or name.startswith("-"):
        raise UserError(f"the first word after {program} is a preset's name: --help lists all")
    for known, function in functions(name):
        if known == name:
            default = make(built(name, function))
            description = f"{purpose}\n\n{name}: {inspect.getdoc(function)}"
            return name, tyro.cli(
                type(default),
                default=default,
                prog=f"{program} {name}",
                description=description,
                args=fields,
                config=(tyro.conf.AvoidSubcommands,),  # a field that is a union takes the default's type
            )
    raise unknown_preset(name, (known for known, _ in functions()))


def listing(program: str, purpose: str) -> str:
    """How the command is used, and every preset with the first line of its description."""
    lines = [f"usage: {program} PRESET [--field.subfield VALUE ...]", "", purpose, ""]
    lines += ["PRESET --help lists the fields of a preset. The presets:", ""]
    described = {name: (inspect.getdoc(function) or "").split("\n")[0] for name, function in functions()}
    width = max(map(len, described))
    return "\n".join([*lines, *(f"  {name:<{width}}  {first}" for name, first in described.items())])
