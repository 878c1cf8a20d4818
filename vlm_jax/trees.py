"""Trees of parameters addressed by path: `"image/blocks/attention/query/kernel"`."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax

PyTree = Any


def path_string(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Every leaf under its path."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`tree` with each leaf replaced by `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_string(path), leaf), tree)


def unmatched(patterns: Iterable[str], paths: Collection[str]) -> list[str]:
    """The patterns that are found in none of the paths."""
    return [pattern for pattern in patterns if not any(re.search(pattern, path) for path in paths)]


def partition(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a nested mapping into the leaves whose path matches any of `patterns` and the others.

    Each part keeps the nesting and drops the branches that it has no leaf in, so that optimizers and averages over
    one part hold nothing for the other.
    """
    patterns = tuple(patterns)
    matching: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for path, leaf in leaves_by_path(tree).items():
        target = matching if any(re.search(pattern, path) for pattern in patterns) else others
        *parents, name = path.split("/")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = leaf
    return matching, others


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the two parts that `partition` made."""
    merged = dict(first)
    for name, branch in second.items():
        merged[name] = merge(merged[name], branch) if name in merged else branch
    return merged


def part(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A part's own variables: of each collection that has one, the subtree of that path."""
    for name in path.split("/"):
        variables = {collection: tree[name] for collection, tree in variables.items() if name in tree}
    return dict(variables)


def assembled(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The inverse of `part`: the variables of a whole, from those of each part by its path."""
    whole: dict[str, Any] = {}
    for path, variables in parts.items():
        for name in reversed(path.split("/")):
            variables = {collection: {name: tree} for collection, tree in variables.items()}
        whole = merge(whole, variables)
    return {collection: whole[collection] for collection in sorted(whole)}


def unstack(tree: Mapping[str, Any], stacked: str, layer: str) -> dict[str, Any]:
    """`tree` with what a scan over layers runs through, `stacked/...` [L, ...], as `layer_0/...` to `layer_{L-1}/...`.

    A module whose layers are unrolled has its parameters so. A tree that has no such branch is so already.
    """
    rest = dict(tree)
    stack = rest.pop(stacked, {})
    depth = max((len(leaf) for leaf in jax.tree.leaves(stack)), default=0)
    return rest | {f"{layer}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(depth)}


def count_parameters(tree: PyTree) -> int:
    """The number of scalars in all leaves, arrays or `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
