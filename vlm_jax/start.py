"""Start: variables that a run begins with instead of drawing them, taken from another run or a part of it.

A part's subtree of the variables and its field of the family's `Config` bear one name, so that what is taken is
compared in its settings, and not in its shapes alone: a network of another epsilon has the same shapes. The order at
the beginning of a run is that of big_vision's `train.py`: what was saved, else what a start gives, else what is drawn.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Variables
from vlm_jax.errors import UserError, pattern_fault
from vlm_jax.identity import listed
from vlm_jax.trees import leaves_by_path, part, unmatched

COMPUTED = ("scan", "remat", "dtype", "dropout", "class_dropout", "condition_dropout", "features")
"""Settings that may differ: they say how a function is computed, to its rounding, what training leaves out of it, or
where features are read."""
SIZED = ("classes", "embedding", "objective")
"""Settings that may differ where some paths are left: shapes tell of them, and shapes are compared."""
RESIZED = ("image_size", "vocab_size", "context_length", "images")
"""Settings that may differ always: position tables are resized, tables of tokens grow, other shapes are compared."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Variables that a run begins with instead of drawing them."""

    workdir: str
    """The run that they are taken from, averaged where it keeps an average."""
    take: str = ""
    """The part of its model, such as image or image/transformer; empty: all of it."""
    into: str = ""
    """The part of this run's model that it becomes; empty: all of it."""
    leave: tuple[str, ...] = ()
    """Regular expressions of the paths of this model that are drawn all the same, such as a head of another size."""
    step: int | None = None
    """Of a checkpoint; None: the one of least validation loss where that run kept score, else the newest."""

    def __post_init__(self) -> None:
        for pattern in self.leave:
            if fault := pattern_fault(pattern):
                raise UserError(f"start.leave {pattern!r} is not a regular expression ({fault})")


def part_of(config: Any, name: str) -> Any:
    """The field of a `Config` that a part's path names; None: the part has no settings of its own."""
    for field in filter(None, name.split("/")):
        config = getattr(config, field, None)
    return config


def check_configs(start: Start, source: Any, config: Any) -> None:
    """Refuses to take a part for another one.

    Args:
      source: the `Config` of the model of the run that is taken from.
      config: that of this run.

    Raises:
      UserError: the two describe different functions, which is shown.
    """
    old, new = part_of(source, start.take), part_of(config, start.into)
    if (old is None) != (new is None):
        lacking = f"{start.workdir} describes {start.take}" if old is None else f"this run describes {start.into}"
        raise UserError(
            f"nothing in the configuration of {lacking}, with which the part could be compared: name parts that are "
            f"fields of both models' configurations in start.take and start.into"
        )
    except_for = (*COMPUTED, *RESIZED, *(SIZED if start.leave else ()))
    if found := differences(old, new, start.into.replace("/", "."), except_for):
        raise UserError(
            f"{start.take or 'the model'} of {start.workdir} is not {start.into or 'the model'} of this run "
            f"({listed(found)}): give this run the settings that it has there, or start from another run"
        )


def differences(old: Any, new: Any, path: str, except_for: tuple[str, ...]) -> list[str]:
    """Where two configurations differ, as "image.transformer.norm_eps: 1e-05 -> 1e-06"."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        names = [field.name for field in dataclasses.fields(old) if field.name not in except_for]
        inner = [(getattr(old, name), getattr(new, name), f"{path}.{name}".lstrip(".")) for name in names]
        return [difference for pair in inner for difference in differences(*pair, except_for)]
    return [] if old == new else [f"{path or 'model'}: {shown(old)} -> {shown(new)}"]


def shown(value: Any) -> str:
    """A setting in a sentence; a part's by its type."""
    return f"{type(value).__module__}.{type(value).__qualname__}" if dataclasses.is_dataclass(value) else str(value)


def reads_tokens(config: Any) -> bool:
    """Whether a part of a model gives meaning to the ids of a tokenizer: something in its settings has a vocabulary."""
    if not dataclasses.is_dataclass(config):
        return False
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "vocab_size" in values or any(map(reads_tokens, values.values()))


def taken(
    start: Start, source: Any, variables: Variables, config: Any, abstract: Variables
) -> tuple[dict[str, jax.Array], list[str]]:
    """What a start gives, under its paths among this model's variables, and what is to be told of it.

    Layers that a scan runs through are stacked or taken apart, as this model has them; the position tables of another
    resolution are resized.

    Args:
      source: the `Config` of the model that `variables` are of; `check_configs` has compared it with `config`.
      abstract: this model's variables, as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: there is no such part, or an array has no place or another shape or kind, or a place has no array.
    """
    for name in filter(None, start.take.split("/")):
        variables = part(variables, name)
    found = {placed_path(path, start.into): leaf for path, leaf in leaves_by_path(dict(variables)).items()}
    prefix = re.compile(rf"[^/]+/{re.escape(start.into)}(/|$)" if start.into else "")
    places = {path: leaf for path, leaf in leaves_by_path(dict(abstract)).items() if prefix.match(path)}
    for name, there, whose in ((start.take, found, start.workdir), (start.into, places, "this run's model")):
        if not there:
            raise UserError(f"{whose} has no part {name}: correct start.{'take' if there is found else 'into'}")
    found = relaid(found, places)
    names = {path: path.partition("/")[2] for path in sorted(places.keys() | found.keys())}
    if unused := unmatched(start.leave, names.values()):
        raise UserError(f"start.leave names {unused[0]}, which no path matches: {listed([*names.values()])}")
    told, given = [], {}
    for path, name in names.items():
        if any(re.search(pattern, name) for pattern in start.leave):
            continue
        if path not in found:
            raise UserError(f"{start.workdir} has nothing for {name}: add it to start.leave, and it is drawn")
        if path not in places:
            raise UserError(f"this run's model has no {name}, which {start.workdir} has: add it to start.leave")
        leaf, place = found[path], places[path]
        if leaf.shape != place.shape and (grids := position_grids(start, name, source, config, leaf, place)):
            leaf = resized(leaf, *grids)
            told.append(f"{name} is resized from {grids[0]}x{grids[0]} to {grids[1]}x{grids[1]} positions")
        if grows(name, leaf, place):
            told.append(
                f"{name} grows from {len(leaf)} to {len(place)} tokens, each of the new ones the mean of the others"
            )
            leaf = grown(leaf, len(place))
        floating = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.issubdtype(place.dtype, jnp.floating)
        if leaf.shape != place.shape or (leaf.dtype != place.dtype and not floating):
            raise UserError(
                f"{name} is {leaf.dtype}{list(leaf.shape)} in {start.workdir} and {place.dtype}{list(place.shape)} "
                f"here: make the settings agree, or add it to start.leave, and it is drawn"
            )
        given[path] = leaf.astype(place.dtype)
    return given, told


def placed_path(path: str, into: str) -> str:
    """The path of a leaf, its collection in front, in the part `into` of a model."""
    collection, _, rest = path.partition("/")
    return "/".join(filter(None, (collection, into, rest)))


def relaid(found: Mapping[str, jax.Array], places: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves with layers stacked, `blocks/...` [L, ...], or apart, `block_0/...`, as their places have them."""
    given = dict(found)
    for path, place in places.items():
        if path in found:
            continue
        for layer in re.finditer(r"(?<=/)([a-z_]+)_(\d+)(?=/)", path):
            stacked = f"{path[: layer.start()]}{layer[1]}s{path[layer.end() :]}"
            if stacked in found and int(layer[2]) < len(found[stacked]):
                given[path] = found[stacked][int(layer[2])]
                given.pop(stacked, None)
        for stack in re.finditer(r"(?<=/)([a-z_]+)s(?=/)", path):
            layers = [f"{path[: stack.start()]}{stack[1]}_{i}{path[stack.end() :]}" for i in range(place.shape[0])]
            if all(layer in found for layer in layers):
                given[path] = jnp.stack([given.pop(layer) for layer in layers])
    return given


def position_grids(
    start: Start, path: str, source: Any, config: Any, leaf: jax.Array, place: Any
) -> tuple[int, int] | None:
    """The sides of the grids of patches that two tables of positions are of; None: they are not of such."""
    inner = path.removeprefix(start.into).strip("/")
    parent, _, name = inner.rpartition("/")
    sides = []
    for whole, where, table in ((source, start.take, leaf), (config, start.into, place)):
        owner = part_of(part_of(whole, where), parent)
        image, patch = getattr(owner, "image_size", None), getattr(owner, "patch_size", None)
        if name != "position" or table.ndim != 3 or image is None or patch is None:
            return None
        sides.append(image // patch)
    extra = leaf.shape[1] - sides[0] ** 2
    return (sides[0], sides[1]) if extra in (0, 1) and extra == place.shape[1] - sides[1] ** 2 else None


def resized(table: Float[Array, "1 N D"], old: int, new: int) -> Float[Array, "1 M D"]:
    """Positions of a grid of old x old patches, by antialiased bicubic interpolation of one of new x new.

    The position of a class token stands before them and is kept.
    """
    first, grid = jnp.split(table, [table.shape[1] - old**2], axis=1)
    grid = grid.reshape(1, old, old, -1)
    grid = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic", antialias=True)
    return jnp.concatenate([first, grid.reshape(1, new**2, -1)], axis=1)


def grows(path: str, leaf: jax.Array, place: Any) -> bool:
    """Whether they are tables of the vectors of tokens, the second of the larger vocabulary."""
    tables = re.search(r"(^|/)(token|head)/embedding$", path) is not None and leaf.ndim == place.ndim == 2
    return tables and len(leaf) < len(place) and leaf.shape[1:] == place.shape[1:]


def grown(table: Float[Array, "V D"], rows: int) -> Float[Array, "W D"]:
    """With the mean of the tokens in the further rows, as LLaVA's release adds tokens."""
    mean = jnp.mean(table.astype(jnp.float32), axis=0, keepdims=True).astype(table.dtype)
    return jnp.concatenate([table, jnp.repeat(mean, rows - len(table), axis=0)])
