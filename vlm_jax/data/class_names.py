"""What the classes of a data set are called in words, for sentences that describe them."""

import functools
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.errors import UserError
from vlm_jax.files import parse_json


def class_names(label_names: Sequence[str]) -> tuple[str, ...]:
    """The names of a data set's labels in words: `maple_tree` is a maple tree, `n01440764` what CLIP calls it.

    Raises:
      UserError: a name is a number or a code, which describes nothing.
    """
    names = []
    for label in label_names:
        code, words = re.fullmatch(r"(n\d{8}(?=[-_ ]|$))?(.*)", label, re.DOTALL).groups()  # type: ignore[union-attr]
        name = imagenet_names().get(code, "") if code and not words else words.replace("_", " ").strip(" -")
        if not name or name.isdigit():
            raise UserError(
                f"the class {label!r} is a code and not a name, which describes nothing: give the {len(label_names)} "
                f"names by --zero-shot-names FILE, one a line in the order of the labels"
            )
        names.append(name)
    return tuple(names)


def read_class_names(path: Path, label_names: Sequence[str]) -> tuple[str, ...]:
    """Names from a file: one a line in the order of the labels, or a JSON list of them, or an object by label.

    Raises:
      UserError: the file cannot be read, or does not name each class.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = parse_json(text) if path.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the names of the classes in {path} cannot be read ({reason}): give another file") from error
    if isinstance(names, dict):
        names = [names.get(label) for label in label_names]
    if not isinstance(names, list) or len(names) != len(label_names):
        held = f"{len(names)} names" if isinstance(names, list) else "no list of names"
        raise UserError(f"{path} holds {held} and there are {len(label_names)} classes: give one for each, in order")
    for label, name in zip(label_names, names, strict=True):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path} has no name for the class {label!r}: give one for each class")
    return tuple(name.strip() for name in names)


@functools.cache
def imagenet_names() -> dict[str, str]:
    """WordNet code -> CLIP's name, of the 1,000 classes of ImageNet."""
    return dict(line.split("\t") for line in _lines("imagenet_names.tsv"))


@functools.cache
def imagenet_prompts() -> tuple[str, ...]:
    """The 80 sentences by which CLIP describes a class of ImageNet."""
    return tuple(_lines("imagenet_prompts.txt"))


def _lines(name: str) -> list[str]:
    text = importlib.resources.files("vlm_jax.data").joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]
