"""What makes a run this run and no other: facts by their names, such as "model.levels" and "data.name"."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlm_jax.records import join

RUN_FIELDS = (
    "cached",
    "watch",
    "workdir",
    "data_dir",
    "distributed",
    "zero_shot",
    "sampling",
    "start.*.workdir",
    "start.*.step",
    "training.mesh",
    "training.steps",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_last",
)
"""Dotted paths, * for any number, of what may change between one start of a run and the next.

None of it changes the value of any step: of what another run gave, the digest is a fact, not the place.
"""


def identity(record: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a run's record, as dotted paths to JSON texts."""

    def changes_nothing(path: str) -> bool:
        numbered = re.sub(r"\.\d+(?=\.)", ".*", path) + "."
        return any(numbered.startswith(f"{field}.") for field in RUN_FIELDS)

    return {path: fact for path, fact in flatten(record).items() if not changes_nothing(path)}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The facts that make these two different runs, as "path: old -> new"."""
    return [
        f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def as_begun(record: Any, absent: Collection[str], prefix: str = "") -> Any:
    """A record without the facts of these paths: those that the version which began the run did not know."""
    if isinstance(record, list):
        return [as_begun(each, absent, join(prefix, index)) for index, each in enumerate(record)]
    if not isinstance(record, Mapping):
        return record
    branches = {name: (each, join(prefix, name)) for name, each in record.items()}
    kept = {name: as_begun(each, absent, path) for name, (each, path) in branches.items() if path not in absent}
    return {name: each for name, each in kept.items() if each != {} or record[name] == {}}


def listed(items: Sequence[str], most: int = 5) -> str:
    """The first of them in a sentence, and how many more there are."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """JSON objects, and arrays of objects by their indices, as dotted paths to JSON texts."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        value = {str(index): each for index, each in enumerate(value)}
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}
    for name, branch in value.items():
        leaves |= flatten(branch, join(prefix, name))
    return leaves
