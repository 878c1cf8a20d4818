"""What a model is: a few pure functions, their inputs, and how their parameters lie on a mesh.

A family of models is a function `build(config) -> Model`. Training, checkpoints, evaluations and tools see a
`Model` and nothing behind it, as optimizers are seen through `optax.GradientTransformation`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vlm_jax.errors import UserError

Batch = Mapping[str, jax.Array]
"""Named arrays whose leading axis is the global batch."""

Variables = Mapping[str, Any]
"""`{"params": tree, **mutable collections}`, as linen's `init` returns it."""

Rule = tuple[str, tuple[str | None, ...]]
"""A regular expression searched in a parameter's path, and logical axes of the trailing dimensions it names."""


class Input(NamedTuple):
    """What a model expects of one field of a batch."""

    shape: tuple[int, ...]
    """Of one example, without the batch axis."""
    dtype: str
    limit: int | None = None
    """Values are integers in `[0, limit)`; None: any value."""
    contains: int | None = None
    """Every example has this value somewhere, such as the token that ends a text; None: it need not."""


class Aux(NamedTuple):
    """What a loss returns beside its value."""

    metrics: dict[str, jax.Array]
    """Scalars; like the loss, each is a mean over `weight` items."""
    weight: jax.Array | None = None
    """The loss is a mean over this many items; None: it is not a mean over items and cannot be split."""
    state: Mapping[str, Any] = {}
    """The mutable collections after the call."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A family at one configuration. Capabilities that it lacks are None."""

    inputs: Mapping[str, Input]
    """The fields of a batch that `loss` reads."""
    init: Callable[[jax.Array, Batch], Variables]
    """`(key, batch) -> variables`"""
    loss: Callable[..., tuple[jax.Array, Aux]]
    """`(variables, batch, key, step, *, train) -> (loss, Aux)`; `step` is there for warm-ups and curricula."""
    rules: tuple[Rule, ...]
    """How parameters lie on the mesh: the first rule whose expression is found in a leaf's path."""
    frozen: tuple[str, ...] = ()
    """Regular expressions of the paths of parameters that never train."""

    encode_image: Callable[..., jax.Array] | None = None
    """`(variables, image) -> [B, D]`, unit length"""
    encode_text: Callable[..., jax.Array] | None = None
    """`(variables, tokens) -> [B, D]`, unit length"""
    log_likelihood: Callable[..., jax.Array] | None = None
    """`(variables, batch, key) -> [B]`, nats"""
    bound: Literal["exact", "lower", "estimate"] | None = None
    """What `log_likelihood` returns: the value itself, a lower bound in expectation over `key`, or an estimate that is
    neither, such as a numerical solution's"""
    dequantisation: Literal["uniform", "variational"] | None = None
    """The noise by which `log_likelihood` makes real numbers of integers; None: it is of the integers themselves"""
    log_weight: Callable[..., jax.Array] | None = None
    """`(variables, batch, key) -> [B]`, nats: the logarithm of an unbiased estimate of the likelihood, so that the
    logarithm of the mean of several tightens the bound (1509.00519)"""
    reconstruct: Callable[..., jax.Array] | None = None
    """`(variables, image) -> image` of the same shape and dtype"""
    sample: Callable[..., jax.Array] | None = None
    """`(variables, key, conditioning, *, num, temperature=1.0) -> [num, H, W, C]`; `conditioning` is a mapping, empty
    for none; of classes its `label` is int32 [num], and without it they are drawn uniformly; at temperature 1 a draw
    from the model, below it one with less noise"""
    sampling_steps: int | None = None
    """Steps of a `sample` that also takes `on_step(steps done, state)`, called on the host after each of them; None: it
    does not"""
    complete: Callable[..., jax.Array] | None = None
    """`(variables, key, image, known, *, temperature=1.0) -> image`: draws the pixels that are not known given those
    that are; `known` is a NumPy array of bool [H, W], the same for all images"""
    generate: Callable[..., jax.Array] | None = None
    """`(variables, batch, key, **static) -> tokens`"""


CAPABILITIES = (
    "encode_image",
    "encode_text",
    "log_likelihood",
    "log_weight",
    "reconstruct",
    "sample",
    "complete",
    "generate",
)


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
    return {name: batch[name] for name in inputs}
