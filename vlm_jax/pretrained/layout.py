"""A layout: how published files of a kind are a family's variables, in and out, one array at a time.

A layout is a table: each of its entries is an array of ours and where it lies in theirs. Both directions go by the same
table, which has a place for every array of the model and of the file, and for no other.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.contract import Variables, abstract_batch
from vlm_jax.data import Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.identity import listed
from vlm_jax.models import build
from vlm_jax.pretrained.source import Source, tokenizer_beside
from vlm_jax.pretrained.tensors import BFLOAT16, Tensors
from vlm_jax.trees import leaves_by_path, partition

HALF = 1e-3
"""Numbers of up to 1 in half precision are right to within it."""
ALIGNMENT = 64
"""Bytes, of arrays in the memory of a host (XLA's minimum)."""
Move = Callable[[np.ndarray], np.ndarray]
Derive = Callable[[Any, Mapping[str, Any], Tokenizer | None], np.ndarray]
"""`(config, params, tokenizer) -> array`, of parameters that are all there but for those that are derived."""


def same(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Entry:
    """One array of ours in one of theirs."""

    path: str
    """Among our parameters, layers apart: "decoder/block_0/attention/query/kernel"."""
    key: str
    """Theirs."""
    read: Move = same
    """Theirs, or the part of it, as ours."""
    write: Move = same
    """The inverse."""
    part: tuple[int, int] = (0, 1)
    """(i, n): it is the i-th of n equal parts along the first axis of theirs; each of the n has an entry."""
    repeats: bool = False
    """The file may hold it, or not, and what it holds must be what another entry of this path has, to the rounding of
    the coarser of the two; it is not written. So may one table that reads and predicts be there twice."""
    copies: bool = False
    """As `repeats`, of what every file holds as often: it is due, and written."""


def linear(path: str, key: str, *, bias: bool = True, part: tuple[int, int] = (0, 1)) -> list[Entry]:
    """A dense layer, whose kernel PyTorch keeps as `KEY.weight` [out, in] and flax as [in, out], and its bias."""
    kernel = Entry(f"{path}/kernel", f"{key}.weight", np.transpose, np.transpose, part)
    return [kernel, *([Entry(f"{path}/bias", f"{key}.bias", part=part)] if bias else [])]


def norm(path: str, key: str, *, bias: bool = True) -> list[Entry]:
    """A layer's or a root mean square's normalisation: scale, and bias where it has one."""
    return [Entry(f"{path}/scale", f"{key}.weight"), *([Entry(f"{path}/bias", f"{key}.bias")] if bias else [])]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published layout of a family's weights."""

    name: str
    """By which `tools.convert --layout` knows it."""
    family: str
    """Of the models that it holds: the file of their `Config` in `vlm_jax.models`."""
    recognises: Callable[[Source], bool]
    """Whether files are of this layout."""
    config: Callable[[Source], Any]
    """The family's `Config`; raises a `UserError` that names a setting that the family cannot express."""
    entries: Callable[[Any], Iterable[Entry]]
    """Of a `Config`, the table."""
    fields: Callable[[Source], tuple[Field, ...]]
    """How the model is to be shown images and texts."""
    sampling: Callable[[Any], Any] = lambda config: None
    """Of a `Config`, how images are drawn where nothing else is said; None: as the family does."""
    tokenizer: Callable[[Source], Tokenizer | None] = tokenizer_beside
    """Its own; None: it reads no text, or none was published with it."""
    idle: tuple[str, ...] = ()
    """Regular expressions, each of a whole key, of what is in some files and gives the model nothing."""
    known_as: Callable[[str], str] = str
    """From a key of a file to that of the table, where older files, or larger ones, differ in names alone."""
    fresh: tuple[str, ...] = ()
    """Regular expressions of the paths of parameters that no file holds: they begin as the model draws them, and are
    left out of what is written."""
    fixed: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    """Of a `Config`, the arrays by key that every file holds and that the model computes for itself: a file's must be
    the same, within the rounding of half precision."""
    derived: Mapping[str, Derive] = field(default_factory=dict)
    """Parameters by path that are computed of the others where a file does not hold them, as no file does if they have
    no entry. They are written where they have come to be others than that, and refused where they have no entry."""
    collections: Callable[[Source, Any], Mapping[str, np.ndarray]] = lambda source, config: {}
    """What files say of what the model keeps beside its parameters, by its paths, as "moments/mean"; the rest is as
    the model begins it."""
    told: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]] = lambda collections: {}
    """The inverse: settings by the JSON files that `export` gives, which they are added to."""
    export: Callable[[Experiment, Tokenizer | None], Mapping[str, Mapping[str, Any]]] | None = None
    """The JSON files beside the weights, by their names; raises a `UserError` that names what the layout cannot
    express. None: the layout is read, and not written."""
    weights: Mapping[str, str] = field(default_factory=lambda: {"": "model.safetensors"})
    """The files of the weights as they are written, by what the keys in them begin with, which is the directory of the
    file: that of "unet/conv_in.weight" lies in unet/ and holds conv_in.weight."""
    tokenizer_directory: str = ""
    """Where the tokenizer is written, with a slash at its end."""


def recognised(source: Source, layouts: Sequence[Layout], name: str | None = None) -> Layout:
    """The layout of files, or the one of a name.

    Raises:
      UserError: there is none, or there are several.
    """
    if name is not None:
        return named(layouts, name)
    found = [layout for layout in layouts if layout.recognises(source)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{source.path} could be {' or '.join(each.name for each in found)}: say which by --layout")
    raise UserError(
        f"{source.path} is of no layout that is known here ({source.described}): there are "
        f"{', '.join(layout.name for layout in layouts)}"
    )


def named(layouts: Sequence[Layout], name: str) -> Layout:
    """Raises a `UserError` where there is none of that name."""
    for layout in layouts:
        if layout.name == name:
            return layout
    raise UserError(f"there is no layout {name}: choose one of {', '.join(layout.name for layout in layouts)}")


@dataclass(frozen=True)
class _Place:
    """A leaf of ours, of which an entry fills all or a layer."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]


def _places(abstract: Mapping[str, Any]) -> dict[str, _Place]:
    """By the paths of entries: layers that a scan runs through, `blocks/...` [L, ...], are `block_0/...` and so on."""
    places = {}
    for path, leaf in leaves_by_path(abstract).items():
        if not re.search(r"(^|/)blocks/", path):
            places[path] = _Place(path, None, leaf.shape)
            continue
        for i in range(leaf.shape[0]):
            places[re.sub(r"(^|/)blocks/", rf"\1block_{i}/", path)] = _Place(path, i, leaf.shape[1:])
    return places


@lru_cache(maxsize=1)
def abstract_variables(config: Any) -> Variables:
    """All that a `Config`'s model keeps, as shapes."""
    model = build(config)
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), abstract_batch(model.inputs, 1))


def abstract_params(config: Any) -> Mapping[str, Any]:
    """Its parameters alone."""
    return abstract_variables(config)["params"]


def held(layout: Layout, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a model's parameters, or their shapes, that files of a layout hold."""
    return partition(params, layout.fresh)[1]


def _table(layout: Layout, config: Any, places: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The entries by key; every place is filled once, those of what is derived at most."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    entries = list(layout.entries(config))
    for entry in entries:
        by_key[entry.key].append(entry)
    paths = [entry.path for entry in entries if not (entry.repeats or entry.copies)]
    optional = layout.derived.keys() - set(paths)
    assert sorted([*paths, *optional]) == sorted(places), f"{layout.name}: {set(paths) ^ set(places)}"
    assert all([e.part for e in group] == [(i, len(group)) for i in range(len(group))] for group in by_key.values())
    return by_key


def stored_dtype(tensors: Tensors, keys: Iterable[str]) -> np.dtype[Any]:
    """That in which a run keeps weights: bfloat16 where all of them are, else float32, which holds any of them."""
    return BFLOAT16 if all(tensors.dtype(key) == BFLOAT16 for key in keys) else np.dtype(np.float32)


def read_params(layout: Layout, config: Any, tensors: Tensors) -> dict[str, Any]:
    """Our parameters, filled from one array of theirs after the other: in memory there is never more than they and one.

    Returns:
      A tree of NumPy arrays, all bfloat16 or all float32, as `stored_dtype` says; without those that are `fresh`, and
      those that are `derived` and not in the file.

    Raises:
      UserError: the file lacks an array, or has one that the layout does not know, or one is of another shape or
        damaged.
    """
    places = _places(abstract := held(layout, abstract_params(config)))
    table, tensors = _table(layout, config, places), tensors.renamed(layout.known_as)
    fixed = layout.fixed(config)
    optional = {key for key, group in table.items() if all(e.repeats or e.path in layout.derived for e in group)}
    due = table.keys() - optional
    idle = {key for key in tensors if any(re.fullmatch(pattern, key) for pattern in layout.idle)}
    if missing := sorted((due | fixed.keys()) - set(tensors)):
        raise UserError(f"{tensors.path} lacks {listed(missing)}, which {layout.name} has: fetch all of it")
    if unknown := sorted(set(tensors) - idle - table.keys() - fixed.keys()):
        raise UserError(
            f"{tensors.path} holds {listed(unknown)}, which {layout.name} of these settings has not: it is of another "
            f"layout, or its config.json belongs to other weights"
        )
    for key, value in fixed.items():
        if tensors.shape(key) != value.shape or not np.allclose(tensors[key].astype(np.float32), value, atol=HALF):
            raise UserError(f"{key} in {tensors.path} is not what the model computes in its place: it is another's")
    dtype, there = stored_dtype(tensors, due), set(table) & set(tensors)
    filled = {places[entry.path].leaf for key in there for entry in table[key]}
    params = {path: aligned(leaf.shape, dtype) for path, leaf in leaves_by_path(abstract).items() if path in filled}
    # What is there again is compared with what it repeats, and so comes last.
    for key in sorted(there, key=lambda key: (again(table[key][0]), key)):
        theirs = tensors[key]
        for entry in table[key]:
            place = places[entry.path]
            array = _moved(entry, theirs, place.shape, tensors.path)
            ours = params[place.leaf][... if place.layer is None else (place.layer, ...)]
            if not again(entry):
                ours[...] = array
            elif not alike(array, ours):
                raise UserError(
                    f"{key} in {tensors.path} is another table than it repeats: the settings are others', or the files"
                    f" are not all of one release"
                )
    return nested(params)


def again(entry: Entry) -> bool:
    """Whether another entry has the same path, and is the one that fills it."""
    return entry.repeats or entry.copies


def alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays hold the same, in the type of the two that has fewer bytes."""
    dtype = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(np.asarray(first, dtype), np.asarray(second, dtype))


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array to be filled, which begins where JAX can take it for one of its own instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _moved(entry: Entry, theirs: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """An entry's part of an array of theirs as ours; raises a `UserError` where it is of another shape."""
    i, n = entry.part
    if n > 1 and (theirs.ndim == 0 or len(theirs) % n):
        raise UserError(f"{entry.key} in {path} is {list(theirs.shape)}, which is not {n} parts: the settings differ")
    try:
        array = entry.read(theirs if n == 1 else np.split(theirs, n)[i])
    except ValueError as error:
        raise UserError(f"{entry.key} in {path} is {list(theirs.shape)}: the settings are others' ({error})") from error
    if array.shape != shape:
        raise UserError(
            f"{entry.key} in {path} is {list(theirs.shape)} and would be {list(array.shape)} where the model has "
            f"{list(shape)}: the settings are those of other weights"
        )
    return array


def written_keys(layout: Layout, config: Any, params: Mapping[str, Any]) -> dict[str, int]:
    """The keys that `written` gives, in order, and the bytes of each.

    Args:
      params: without what is derived, where that is not to be written.
    """
    places, leaves = _places(held(layout, params)), leaves_by_path(params)
    sizes = {key: value.nbytes for key, value in layout.fixed(config).items()}
    for key, group in _table(layout, config, places | dict.fromkeys(layout.derived)).items():
        if not group[0].repeats and group[0].path in places:
            shapes = [(places[entry.path].shape, leaves[places[entry.path].leaf].dtype) for entry in group]
            sizes[key] = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes)
    return sizes


def written(
    layout: Layout, config: Any, params: Mapping[str, Any], keys: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of theirs by key, made one after the other of our parameters."""
    places, leaves = _places(held(layout, params)), leaves_by_path(params)
    table, fixed = _table(layout, config, places | dict.fromkeys(layout.derived)), layout.fixed(config)
    for key in keys:
        if key in fixed:
            yield key, fixed[key]
            continue
        parts = []
        for entry in table[key]:
            place = places[entry.path]
            leaf = np.asarray(leaves[place.leaf])
            parts.append(entry.write(leaf if place.layer is None else leaf[place.layer]))
        yield key, np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of leaves by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree
