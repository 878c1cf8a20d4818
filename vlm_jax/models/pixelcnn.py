"""PixelCNN with gated convolutions (van den Oord et al. 2016, 1606.05328): an exact likelihood, pixel after pixel.

A stack of masked convolutions reads the image; from what comes before a pixel in raster order it predicts the pixel.
The channels follow one another within the head: each with a softmax over its levels given those before it, or all of
them with a mixture of discretised logistics (PixelCNN++, 1701.05517).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.images import Images
from vlm_jax.nn.labels import check_classes, inferred_labels, label_input, sampling_labels
from vlm_jax.nn.masked import GatedStack, Pixels, Rows, check_kernel, masked_rules
from vlm_jax.nn.subpixels import MixtureHead, PatchEmbedding, SoftmaxHead, known_prefix, subpixel_rules
from vlm_jax.objectives.language import token_log_probs
from vlm_jax.objectives.likelihood import (
    logistic_mixture_log_prob,
    mixture_channels,
    nats_to_bits_per_dim,
    sample_logistic_mixture,
    subpixels,
)
from vlm_jax.sampling.autoregressive import decode
from vlm_jax.trees import unstack


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """Gated masked convolutions over the pixels of an image."""

    mixtures: int | None = None
    """Logistics in each pixel's mixture; None: a softmax over the levels of each sub-pixel."""
    classes: int | None = None
    """Labels that images are drawn given; None: images have none."""
    width: int
    """Features of each of the two stacks."""
    depth: int
    """Layers."""
    kernel: int = 3
    """Height and width of the window that the mask cuts down."""
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions; parameters and likelihoods are float32."""

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if self.mixtures is not None and self.mixtures < 1:
            raise UserError(f"mixtures is {self.mixtures}: it must be at least 1, or None")
        check_classes(self.classes)


class PixelCNN(nn.Module):
    """An image -> the log-probability of each sub-pixel given all before it."""

    config: Config
    scan: bool = True
    """False for `row` and `pixel`: see `GatedStack`."""

    def setup(self) -> None:
        c = self.config
        self.table = PatchEmbedding(c.channels, c.levels, c.width)
        self.stack = GatedStack(c.width, c.depth, c.kernel, c.classes, c.dropout, c.dtype, self.scan)
        self.head: Any  # of one or the other type
        if c.mixtures is None:
            self.head = SoftmaxHead(c.channels, c.levels, c.width, dtype=c.dtype)
        else:
            self.head = MixtureHead(mixture_channels(c.mixtures, c.channels), c.width, dtype=c.dtype)

    def embed(self, pixels: Int[Array, "*B C"]) -> Float[Array, "*B D"]:
        return jnp.sum(self.table(pixels.astype(jnp.int32)), axis=-2)

    def __call__(
        self, image: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None, *, train: bool = False
    ) -> Float[Array, "B H W N"]:
        """log p of every sub-pixel, nats; of every pixel (N = 1) where a mixture describes its channels jointly."""
        pixels = image.astype(jnp.int32)
        x = self.stack(self.embed(pixels), label, train=train)
        if self.config.mixtures is None:
            return token_log_probs(self.head(x, pixels), pixels)
        return logistic_mixture_log_prob(self.head(x), pixels, self.config.levels)[..., None]

    def empty_rows(self, batch: int) -> tuple[Rows, ...]:
        return self.stack.empty_rows(batch, self.config.image_size, self.config.image_size)

    def row(
        self,
        caches: tuple[Rows, ...],
        previous: Int[Array, "B W C"],
        position: Int[Array, ""],
        label: Int[Array, " B"] | None,
    ) -> tuple[tuple[Rows, ...], tuple[Pixels, ...]]:
        """Feeds the row before `position` to the vertical stack."""
        return self.stack.row(caches, jnp.where(position == 0, 0, self.embed(previous)), position, label)

    def pixel(
        self,
        caches: tuple[Pixels, ...],
        previous: Int[Array, "B C"],
        position: Int[Array, ""],
        key: Array,
        temperature: float,
        label: Int[Array, " B"] | None,
    ) -> tuple[tuple[Pixels, ...], Int[Array, "B C"]]:
        """Feeds the pixel before `position` to the horizontal stack and draws the one at it."""
        c = self.config
        caches, x = self.stack.pixel(caches, jnp.where(position == 0, 0, self.embed(previous)), position, label)
        if c.mixtures is None:
            return caches, self.head.draw(x, key, temperature)
        pixel = sample_logistic_mixture(key, self.head(x), c.channels, c.levels, temperature)
        return caches, pixel.astype(jnp.int32)


def build(config: Config) -> Model:
    """An exact density over images."""
    module: Any = PixelCNN(config)  # linen types what `apply` returns as a union
    size, shape = config.image_size, config.shape
    conditions = label_input(config.classes)
    inputs = {"image": config.image, **conditions}

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, *(batch[name] for name in inputs))

    def log_probs(variables: Variables, batch: Batch, **settings: Any) -> Float[Array, "B H W N"]:
        return module.apply(variables, *(batch[name] for name in inputs), **settings)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood in bits a dimension."""
        del step
        values = log_probs(variables, batch, train=train, rngs={"dropout": key})
        value = nats_to_bits_per_dim(jnp.mean(jnp.sum(values, axis=(1, 2, 3))), shape)
        return value, Aux({}, weight=jnp.float32(len(values)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the image given its label, where there are labels."""
        del key
        return jnp.sum(log_probs(variables, batch), axis=(1, 2, 3))

    def extend(
        variables: Variables,
        key: Array,
        image: Int[Array, "B H W C"],
        known: int,
        label: Int[Array, " B"] | None,
        temperature: float,
    ) -> Int[Array, "B H W C"]:
        """Keeps the first `known` pixels and draws the others.

        Each row passes the vertical stack once, and each pixel that is not in a known row the horizontal one once.
        """
        image = image.astype(jnp.int32)
        first = known // size
        stack = unstack(variables["params"]["stack"], "layers", "layer")
        apply: Any = partial(PixelCNN(config, scan=False).apply, {"params": {**variables["params"], "stack": stack}})

        def fill(rows: tuple[Rows, ...], position: Array) -> Any:
            previous = image[:, jnp.maximum(position - 1, 0)]
            return apply(rows, previous, position, label, method="row")[0], None

        def draw_row(rows: tuple[Rows, ...], previous: Array, row: Array, key: Array) -> Any:
            rows, pixels = apply(rows, previous, row, label, method="row")

            def draw_pixel(pixels: tuple[Pixels, ...], previous: Array, column: Array, key: Array) -> Any:
                pixels, pixel = apply(pixels, previous, column, key, temperature, label, method="pixel")
                return pixels, jnp.where(row * size + column < known, image[:, row, column], pixel)

            return rows, decode(draw_pixel, pixels, previous[:, 0], size, key)

        rows = apply(len(image), method="empty_rows")
        rows, _ = jax.lax.scan(fill, rows, jnp.arange(first))
        drawn = decode(draw_row, rows, image[:, max(first - 1, 0)], size, key, start=first)
        return jnp.concatenate([image[:, :first], drawn], axis=1).astype(jnp.uint8)

    def label_key(key: Array) -> Array:
        return jax.random.fold_in(key, size)  # rows have the keys before it

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of each sub-pixel's softmax, or of each pixel's mixture."""
        label = sampling_labels(label_key(key), given.get("label"), config.classes, num)
        return extend(variables, key, jnp.zeros((num, *shape), jnp.uint8), 0, label, temperature)

    def complete(
        variables: Variables, key: Array, image: Int[Array, "B H W C"], known: np.ndarray, *, temperature: float = 1.0
    ) -> Int[Array, "B H W C"]:
        """Where images have labels, each is given one drawn from their probabilities given the known pixels.

        Raises:
          UserError: `known` is not all pixels from the first to some other in raster order.
        """
        count = known_prefix(known, 1)

        def of_known(label: Int[Array, " B"]) -> Float[Array, " B"]:
            values = log_probs(variables, {"image": image, "label": label})
            return jnp.sum(values, axis=(1, 2, 3), where=known[..., None])

        label = inferred_labels(label_key(key), of_known, config.classes, len(image))
        return extend(variables, key, image, count, label, temperature)

    rules = (
        *subpixel_rules(mixture=config.mixtures is not None),
        *masked_rules(classes=config.classes is not None),
    )
    return Model(
        inputs=inputs,
        init=init,
        loss=loss,
        rules=rules,
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="exact",
        conditions=conditions,
        sample=sample,
        complete=complete,
    )
