"""What a model is: a few pure functions, their inputs, and how their parameters lie on a mesh.

A family of models is a function `build(config) -> Model`. Training, checkpoints, evaluations and tools see a
`Model` and nothing behind it, as optimizers are seen through `optax.GradientTransformation`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.inputs import SEQUENCE, Batch, Input, abstract_batch, beginning, blank, check_batch, read_fields

__all__ = [
    "CAPABILITIES",
    "SEQUENCE",
    "Aux",
    "Axis",
    "Batch",
    "Input",
    "Model",
    "Rule",
    "Variables",
    "abstract_batch",
    "check_batch",
    "check_sampling",
    "without_loss",
]

Variables = Mapping[str, Any]
"""`{"params": tree, **mutable collections}`, as linen's `init` returns it."""

Axis = str | tuple[str, int] | None
"""A logical axis; with a number, that of the heads whose features the dimension holds, which stay together."""
Rule = tuple[str, tuple[Axis, ...]]
"""A regular expression searched in a parameter's path, and logical axes of the trailing dimensions it names."""


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
    """A family at one configuration. Capabilities that it lacks are None.

    The others look at what they are told before they use it, for nothing behind them would: a misspelt name is a draw
    without it, and indexing clamps what is outside a table. Names, shapes and kinds are refused by a `UserError`, and
    so are values where they are known. Under `jax.jit` they are not: there the row of an unfit value comes out as NaN,
    and where integers come out as 0.
    """

    inputs: Mapping[str, Input]
    """The fields of a batch that `loss` reads."""
    init: Callable[[jax.Array, Batch], Variables]
    """`(key, batch) -> variables`"""
    loss: Callable[..., tuple[jax.Array, Aux]]
    """`(variables, batch, key, step, *, train) -> (loss, Aux)`; `step` is there for warm-ups and curricula."""
    rules: tuple[Rule, ...]
    """How parameters lie on the mesh: the first rule whose expression is found in a leaf's path."""

    embed_image: Callable[..., jax.Array] | None = None
    """`(variables, image) -> [B, D]`, unit length"""
    embed_text: Callable[..., jax.Array] | None = None
    """`(variables, tokens) -> [B, D]`, unit length"""
    image_features: Callable[..., jax.Array] | None = None
    """`(variables, image) -> float32 [B, T, D]`, of each part of the image before pooling, at the layer that the
    configuration names"""
    text_features: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    """`(variables, tokens) -> (float32 [B, T, D], bool [B, T])`, of each token, and which belong to the text"""
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
    count: Callable[[Batch], jax.Array] | None = None
    """`(batch) -> int32 [B]`: of how many sub-pixels, or tokens to predict, `log_likelihood` is"""
    latents: Input | Mapping[str, Input] | None = None
    """What `encode` makes of an image: one array, or several by name"""
    encode: Callable[..., Any] | None = None
    """`(variables, image, key=None) -> latents`: the mean of what the image may stand for, or with a key a draw"""
    decode: Callable[..., jax.Array] | None = None
    """`(variables, latents) -> image`, of the shape and dtype that the model reads"""
    posterior: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    """`(variables, image) -> (mean, log_variance)`, of the Gaussian that `encode` draws from, each like `latents`"""
    log_likelihood_given: Callable[..., jax.Array] | None = None
    """`(variables, image, latents) -> [B]`, nats: log p(image | latents)"""
    stage: Callable[..., Any] | None = None
    """`(variables, image) -> array`: all that `loss` reads of an image, by parameters that do not train; a batch may
    hold it as `stage` in the place of `image`"""
    conditions: Mapping[str, Input] = field(default_factory=dict)
    """What `sample` can be told, one of each for an image; what it is not told of these it draws, labels uniformly."""
    sampling: Any = None
    """The settings of `sample` and `generate`, such as solver, steps and guidance, at the family's defaults: a frozen
    dataclass of its own; None: there are none. No part of what is trained, and so of no `Config`"""
    sample: Callable[..., jax.Array] | None = None
    """`(variables, key, given, *, num, temperature=1.0, sampling=None, on_step=None) -> [num, H, W, C]`; `given` maps
    some of `conditions` to `num` values each and is empty for none; at temperature 1 a draw from the model, below it
    one with less noise; `sampling` is of the type of the model's, None: the model's; where that has `steps`,
    `on_step(steps done, state)` is called on the host after each of them"""
    complete: Callable[..., jax.Array] | None = None
    """`(variables, key, image, known, *, temperature=1.0) -> image`: draws the pixels that are not known given those
    that are; `known` is a NumPy array of bool [H, W], the same for all images"""
    generate: Callable[..., Batch] | None = None
    """`(variables, key, batch, *, order=("text",), temperature=1.0, sampling=None) -> batch`: goes on where the
    sequences of `batch` end, which may be shorter than `inputs` say and are padded on the left, with a segment of each
    modality that the static `order` names"""

    def __post_init__(self) -> None:
        for name in CAPABILITIES:
            function = getattr(self, name)
            if function is not None:
                object.__setattr__(self, name, _attentive(self, name, function))


CAPABILITIES = (
    "embed_image",
    "embed_text",
    "image_features",
    "text_features",
    "log_likelihood",
    "log_weight",
    "encode",
    "decode",
    "posterior",
    "log_likelihood_given",
    "stage",
    "sample",
    "complete",
    "generate",
)


FIELDS_ALONE = (
    *("embed_image", "embed_text", "image_features", "text_features"),
    *("encode", "posterior", "stage", "log_likelihood_given"),
)
"""Capabilities whose first argument is images or tokens."""

MODALITIES = ("text", "image")
"""What `generate` makes segments of."""


def without_loss(why: str) -> Callable[..., tuple[jax.Array, Aux]]:
    """The `loss` of what is trained as a part of other models alone: a `UserError` that says so."""

    def loss(variables: Variables, batch: Batch, key: jax.Array, step: Any, *, train: bool) -> tuple[jax.Array, Aux]:
        raise UserError(why)

    return loss


def _attentive(model: Model, capability: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A capability that checks what it is told."""
    if capability in FIELDS_ALONE:
        name = "tokens" if capability in ("embed_text", "text_features") else "image"

        def of_field(variables: Variables, value: jax.Array, *rest: Any, **named: Any) -> Any:
            given, fits = read_fields(model.inputs, {name: value}, (name,))
            return jax.tree.map(lambda y: blank(y, fits), function(variables, given[name], *rest, **named))

        return of_field

    if capability == "decode":

        def decode(variables: Variables, latents: Any) -> jax.Array:
            alone = isinstance(model.latents, Input)
            specs: Any = {"latents": model.latents} if alone else model.latents
            values, _ = read_fields(specs, {"latents": latents} if alone else latents, tuple(specs))
            return function(variables, values["latents"] if alone else values)

        return decode

    if capability == "sample":

        def sample(
            variables: Variables,
            key: jax.Array,
            given: Batch,
            *,
            num: int,
            temperature: Any = 1.0,
            sampling: Any = None,
            on_step: Callable[..., None] | None = None,
        ) -> jax.Array:
            _check_temperature(temperature)
            for name in given:
                if name not in model.conditions:
                    known = ", ".join(model.conditions) or "nothing"
                    raise UserError(f"the model is told {name!r} and can be told {known}: leave it out, or correct it")
            told = _settings(model, sampling)
            if on_step is not None:
                if not hasattr(model.sampling, "steps"):
                    raise UserError("the model draws in no steps that `on_step` could be told of: leave it out")
                told["on_step"] = on_step
            values, fits = read_fields(model.conditions, given, tuple(given), num)
            return blank(function(variables, key, values, num=num, temperature=temperature, **told), fits)

        return sample

    if capability == "generate":

        def generate(
            variables: Variables,
            key: jax.Array,
            batch: Batch,
            *,
            order: tuple[str, ...] = ("text",),
            temperature: Any = 1.0,
            sampling: Any = None,
        ) -> Batch:
            _check_temperature(temperature)
            if not order or not set(order) <= set(MODALITIES):
                raise UserError(f"`order` is {order}: it must name segments to generate, each text or image")
            told = _settings(model, sampling)
            values, fits = read_fields(beginning(model.inputs, batch), batch, tuple(model.inputs))
            generated = function(variables, key, values, order=order, temperature=temperature, **told)
            return {name: blank(field, fits) for name, field in generated.items()}

        return generate

    if capability == "complete":

        def complete(
            variables: Variables, key: jax.Array, image: jax.Array, known: np.ndarray, *, temperature: Any = 1.0
        ) -> jax.Array:
            _check_temperature(temperature)
            given, fits = read_fields(model.inputs, {"image": image}, ("image",))
            if known.dtype != bool or known.shape != model.inputs["image"].shape[:2]:
                raise UserError(
                    f"`known` holds {known.dtype}{list(known.shape)} and must say of each of the "
                    f"{list(model.inputs['image'].shape[:2])} pixels whether it is known, as bool"
                )
            return blank(function(variables, key, given["image"], known, temperature=temperature), fits)

        return complete

    def of_batch(variables: Variables, batch: Batch, key: jax.Array, **rest: Any) -> jax.Array:
        given, fits = read_fields(model.inputs, batch, tuple(model.inputs))
        return blank(function(variables, given, key, **rest), fits)

    return of_batch


def check_sampling(model: Model, sampling: Any) -> None:
    """Refuses settings of sampling that are another family's.

    Raises:
      UserError: they are not of the type of `model.sampling`; None, for the model's own, always is.
    """
    if sampling is not None and type(sampling) is not type(model.sampling):
        own = "has none" if model.sampling is None else f"has {_type_name(model.sampling)}"
        raise UserError(
            f"the settings of sampling are {_type_name(sampling)} and the model {own}: give it its own, or None"
        )


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _settings(model: Model, sampling: Any) -> dict[str, Any]:
    """The keyword arguments that tell a capability how to draw; none where there is nothing to tell."""
    check_sampling(model, sampling)
    return {} if model.sampling is None else {"sampling": model.sampling if sampling is None else sampling}


def _check_temperature(temperature: Any) -> None:
    if not isinstance(temperature, jax.core.Tracer) and not 0 <= temperature < math.inf:
        raise UserError(f"the temperature is {temperature}: it must be a number, at least 0")
