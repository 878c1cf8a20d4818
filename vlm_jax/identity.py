"""What makes a run this run and no other: facts by their names, such as "model.levels" and "data.name"."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

RUN_FIELDS = (
    "workdir",
    "data_dir",
    "distributed",
    "zero_shot",
    "sampling",
    "training.mesh",
    "training.steps",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_last",
)
"""Dotted paths of what may change between one start of a run and the next: none of it changes the value of any step."""


def identity(record: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a run's record, as dotted paths to JSON texts."""
    facts = flatten(record)
    return {path: fact for path, fact in facts.items() if not any(f"{path}.".startswith(f"{f}.") for f in RUN_FIELDS)}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The facts that make these two different runs, as "path: old -> new"."""
    return [
        f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def listed(items: Sequence[str], most: int = 5) -> str:
    """The first of them in a sentence, and how many more there are."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """JSON objects as dotted paths to JSON texts."""
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value)}
    leaves: dict[str, str] = {}
    for name, branch in value.items():
        leaves |= flatten(branch, f"{prefix}.{name}" if prefix else name)
    return leaves
