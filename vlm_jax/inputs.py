"""What a model reads: the fields of a batch, and what is asked of their values before they are read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError

Batch = Mapping[str, jax.Array]
"""Named arrays whose leading axis is the global batch."""


class Input(NamedTuple):
    """What a model expects of one field of a batch."""

    shape: tuple[int, ...]
    """Of one example, without the batch axis."""
    dtype: str
    limit: int | None = None
    """Values are integers in `[0, limit)`; None: any value."""
    contains: int | None = None
    """Every example has this value somewhere, such as the token that ends a text; None: it need not."""
    span: int | None = None
    """Values are places of the sequence, of so many of which each is the first, or limit - 1: of none."""


def abstract_batch(inputs: Mapping[str, Input], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch, for tracing without data."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *spec.shape), np.dtype(spec.dtype)) for name, spec in inputs.items()
    }


def check_batch(inputs: Mapping[str, Input], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields of a host batch that the model reads, checked before any compute is spent on them.

    Runs on the host because nothing on the device would tell: an embedding turns an id outside its table into
    NaN, and plain indexing clamps it.

    Raises:
      UserError: a field is missing, or has another shape or dtype, or values outside `[0, limit)`, or lacks one.
    """
    for name, spec in inputs.items():
        if name not in batch:
            raise UserError(
                f"the model reads the field {name!r} and the data have {sorted(batch)}: "
                f"choose a data set that has it, or another model"
            )
        array = batch[name]
        if array.shape[1:] != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise UserError(
                f"the field {name!r} holds {array.dtype}{list(array.shape[1:])} an example and the model expects "
                f"{spec.dtype}{list(spec.shape)}: make the data and model settings agree"
            )
        _check_values(name, spec, array)
    return {name: batch[name] for name in inputs}


def _check_values(name: str, spec: Input, array: np.ndarray) -> None:
    if spec.limit is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= spec.limit:
            raise UserError(
                f"the field {name!r} holds the value {low if low < 0 else high}, outside [0, {spec.limit}): for "
                f"tokens, the tokenizer's vocabulary must not exceed the model's; for images, their levels"
            )
    if spec.contains is not None and not (array == spec.contains).any(axis=tuple(range(1, array.ndim))).all():
        raise UserError(
            f"an example's field {name!r} lacks the value {spec.contains}, by which the model finds the end: the "
            f"tokenizer's end token must be the model's eos_id"
        )
    if spec.span is not None and not (apart := _apart(spec, array)).all():
        raise UserError(
            f"the field {name!r} holds {array[int(np.argmin(apart))].tolist()}, where each image takes {spec.span} "
            f"places: they must not overlap, nor end beyond the {(spec.limit or 0) - 1} that there are"
        )


def _apart(spec: Input, array: Any) -> Any:
    """bool [B]: whether the images that begin at [B, N] end within the sequence, and no two share a place."""
    none, span = (spec.limit or 0) - 1, spec.span or 0
    ends = (array == none) | (array + span <= none)
    both = (array[:, :, None] < none) & (array[:, None] < none) & ~np.eye(array.shape[1], dtype=bool)
    shared = both & (abs(array[:, :, None] - array[:, None]) < span)
    return ends.all(axis=1) & ~shared.any(axis=(1, 2))


SEQUENCE = ("tokens", "target", "segment")
"""Fields with a value for each place of a sequence."""

Fits = jax.Array | None
"""Which rows hold values that the model can read; None: all, as was seen on the host."""


def beginning(specs: Mapping[str, Input], batch: Batch) -> dict[str, Input]:
    """What `generate` goes on from: fields of a sequence are as long as the given tokens, which may leave room."""
    shape = np.shape(batch.get("tokens", ()))
    if "tokens" not in specs or len(shape) != 2 or shape[1] > specs["tokens"].shape[0]:
        return dict(specs)
    sequence = {name: specs[name]._replace(shape=shape[1:]) for name in SEQUENCE if name in specs}
    places = {name: spec._replace(limit=shape[1] + 1) for name, spec in specs.items() if spec.span is not None}
    return {**specs, **sequence, **places}


def read_fields(
    specs: Mapping[str, Input], given: Mapping[str, Any], names: tuple[str, ...], num: int | None = None
) -> tuple[dict[str, jax.Array], Fits]:
    """The named values in the dtypes of their specification, and which rows of them the model can read.

    Integers of any width will do, as lists and libraries have them, for their values are looked at.
    """
    values, fits = {}, None
    for name in names:
        if name not in given:
            raise UserError(f"the model reads the field {name!r} and is given {sorted(given)}: give it as well")
        spec, value = specs[name], given[name]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
        known = not traced and getattr(value, "is_fully_addressable", True)
        array: Any = np.asarray(value) if known else jnp.asarray(value)
        integers = np.issubdtype(spec.dtype, np.integer)
        kind: Any = np.integer if integers else np.bool_ if spec.dtype == "bool" else np.floating
        if array.shape[1:] != spec.shape or not np.issubdtype(array.dtype, kind):
            raise UserError(
                f"the field {name!r} holds {array.dtype}{list(array.shape[1:])} an example and the model expects "
                f"{spec.dtype}{list(spec.shape)}: give it that"
            )
        num = len(array) if num is None else num
        if len(array) != num:
            raise UserError(f"the field {name!r} holds {len(array)} examples and {num} are due: give one for each")
        if known:
            _check_values(name, spec, array)
        elif integers:
            one = _fit(spec, array)
            fits = one if fits is None else fits & one
        values[name] = jnp.asarray(value if isinstance(value, jax.Array) else array, spec.dtype)  # where it lies
    return values, fits


def _fit(spec: Input, array: Any) -> jax.Array:
    """bool [B]: what `_check_values` asks, of an array that is not known yet."""
    pixels = tuple(range(1, array.ndim))
    fits = jnp.ones(len(array), bool)
    if jnp.issubdtype(array.dtype, jnp.signedinteger):  # of the others XLA would fold a constant as large as the images
        fits &= jnp.all(array >= 0, axis=pixels)
    if spec.limit is not None and spec.limit <= np.iinfo(array.dtype).max:
        fits &= jnp.all(array < spec.limit, axis=pixels)
    if spec.contains is not None:
        fits &= jnp.any(array == spec.contains, axis=pixels)
    if spec.span is not None:
        fits &= _apart(spec, array)
    return fits


def blank(y: jax.Array, fits: Fits) -> jax.Array:
    if fits is None:
        return y
    nothing = jnp.nan if jnp.issubdtype(y.dtype, jnp.floating) else 0
    return jnp.where(fits.reshape(-1, *[1] * (y.ndim - 1)), y, jnp.asarray(nothing, y.dtype))
