"""The autoregressive image transformer: an exact likelihood, pixel after pixel.

As in the Image Transformer (Parmar et al. 2018, 1802.05751) and iGPT, a causal transformer reads the image in raster
order. One position of the transformer is a patch of `patch_size` x `patch_size` pixels (1: a pixel), which a masked
convolution tells the patches just before and above it, so that attention is free for what is far; the sub-pixels within
it are predicted one after the other by a neural autoregressive density estimator (NADE: Uria et al. 2016,
1605.02226) on the transformer's output, each with a softmax over its levels. A pixel's channels may have a mixture of
discretised logistics instead (PixelCNN++, 1701.05517). The product of all these conditionals is the probability of
the image, whatever the patch size.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.images import Images
from vlm_jax.nn.labels import check_classes, inferred_labels, label_input, sampling_labels
from vlm_jax.nn.stack import unrolled
from vlm_jax.nn.subpixels import MixtureHead, PatchEmbedding, SoftmaxHead, known_prefix, subpixel_rules
from vlm_jax.nn.transformer import TRANSFORMER_RULES, Transformer, TransformerStack
from vlm_jax.nn.vision import check_patches, patchify, unpatchify
from vlm_jax.objectives.language import token_log_probs
from vlm_jax.objectives.likelihood import (
    logistic_mixture_log_prob,
    mixture_channels,
    nats_to_bits_per_dim,
    sample_logistic_mixture,
    subpixels,
)
from vlm_jax.sampling.autoregressive import decode


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """A causal transformer over the patches of an image."""

    patch_size: int = 1
    mixtures: int | None = None
    """Logistics in each pixel's mixture; None: a softmax over the levels of each sub-pixel."""
    classes: int | None = None
    """Labels that images are drawn given; None: images have none."""
    transformer: Transformer

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)
        if self.mixtures is not None and self.patch_size != 1:
            raise UserError(
                f"a mixture of logistics describes one pixel and the patches are {self.patch_size} pixels a side: set "
                f"patch_size to 1, or mixtures to None"
            )
        if self.mixtures is not None and self.mixtures < 1:
            raise UserError(f"mixtures is {self.mixtures}: it must be at least 1, or None")
        check_classes(self.classes)


ABOVE = (-1, 0, 1)
"""Columns from a patch to those in the row above that it is fed."""


class Autoregressive(nn.Module):
    """A sequence of patches -> the log-probability of each sub-pixel given all before it."""

    config: Config

    def setup(self) -> None:
        c, t, size = self.config, self.config.transformer, self.config.image_size // self.config.patch_size
        init = nn.initializers.normal(0.02)
        self.table = PatchEmbedding(patch_length(c), c.levels, t.width)
        self.context = nn.Dense(t.width, dtype=t.dtype)
        self.row = self.param("row", init, (size, t.width))
        self.column = self.param("column", init, (size, t.width))
        if c.classes is not None:
            self.label = self.param("label", init, (c.classes, t.width))
        self.transformer = TransformerStack(t)
        self.head: Any  # of one or the other type
        if c.mixtures is None:
            self.head = SoftmaxHead(patch_length(c), c.levels, t.width, t.norm_eps, t.dtype)
        else:
            self.head = MixtureHead(mixture_channels(c.mixtures, c.channels), t.width, t.norm_eps, t.dtype)

    def positions(self) -> Float[Array, "T D"]:
        return (self.row[:, None] + self.column).reshape(-1, self.config.transformer.width)

    def inputs(self, patches: Int[Array, "B T N"], label: Int[Array, " B"] | None) -> Float[Array, "B T D"]:
        """A masked convolution: each position is fed the patch before it and the nearest three in the row above.

        Its place and, as in the Image Transformer, the class are added.
        """
        size = self.config.image_size // self.config.patch_size
        x = jnp.sum(self.table(patches), axis=-2)
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        rows = jnp.pad(x.reshape(-1, size, size, x.shape[-1])[:, :-1], ((0, 0), (1, 0), (1, 1), (0, 0)))
        above = [rows[:, :, 1 + j : 1 + j + size].reshape(x.shape) for j in ABOVE]
        x = self.context(jnp.concatenate([before, *above], axis=-1)) + self.positions()
        return x if label is None else x + self.label[label][:, None]

    def input_at(
        self, patches: Int[Array, "B T N"], position: Int[Array, ""], label: Int[Array, " B"] | None
    ) -> Float[Array, "B D"]:
        """What `inputs` gives at one position."""
        size = self.config.image_size // self.config.patch_size
        sources = [(position - 1, position > 0)]
        for j in ABOVE:
            column = position % size + j
            sources.append((position - size + j, (position >= size) & (column >= 0) & (column < size)))
        around = []
        for index, inside in sources:
            patch = jnp.take(patches, jnp.where(inside, index, 0), axis=1)
            around.append(jnp.where(inside, jnp.sum(self.table(patch), axis=-2), 0))
        x = self.context(jnp.concatenate(around, axis=-1)) + self.positions()[position]
        return x if label is None else x + self.label[label]

    def __call__(
        self, image: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None, *, train: bool = False
    ) -> Float[Array, "B T N"]:
        """log p of every sub-pixel, nats; of every pixel (N = 1) where a mixture describes its channels jointly."""
        patches = patchify(image, self.config.patch_size).astype(jnp.int32)
        x, _ = self.transformer(self.inputs(patches, label), causal=True, train=train)
        if self.config.mixtures is None:
            return token_log_probs(self.head(x, patches), patches)
        return logistic_mixture_log_prob(self.head(x), patches, self.config.levels)[..., None]

    def fill(
        self, cache: tuple[Cache, ...], patches: Int[Array, "B T N"], count: int, label: Int[Array, " B"] | None
    ) -> tuple[Cache, ...]:
        """The cache of the first `count` positions."""
        _, filled = self.transformer(self.inputs(patches, label)[:, :count], causal=True, cache=cache)
        assert filled is not None
        return filled

    def decode(
        self,
        cache: tuple[Cache, ...],
        patches: Int[Array, "B T N"],
        position: Int[Array, ""],
        key: Array,
        temperature: float,
        label: Int[Array, " B"] | None,
    ) -> tuple[tuple[Cache, ...], Int[Array, "B N"]]:
        """Draws the patch at `position` given those before it, and the cache of the positions before it."""
        c = self.config
        x = self.input_at(patches, position, label)
        x, filled = self.transformer(x[:, None], cache=cache, slot=position)
        assert filled is not None
        if c.mixtures is None:
            return filled, self.head.draw(x[:, 0], key, temperature)
        pixel = sample_logistic_mixture(key, self.head(x[:, 0]), c.channels, c.levels, temperature)
        return filled, pixel.astype(jnp.int32)


def patch_length(config: Config) -> int:
    """Sub-pixels of a patch."""
    return config.patch_size**2 * config.channels


def build(config: Config) -> Model:
    """An exact density over images."""
    module: Any = Autoregressive(config)  # linen types what `apply` returns as a union
    shape = config.shape
    length = (config.image_size // config.patch_size) ** 2
    conditions = label_input(config.classes)
    inputs = {"image": config.image, **conditions}

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, *(batch[name] for name in inputs))

    def log_probs(variables: Variables, batch: Batch, **settings: Any) -> Float[Array, "B T N"]:
        return module.apply(variables, *(batch[name] for name in inputs), **settings)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood in bits a dimension."""
        del step
        values = log_probs(variables, batch, train=train, rngs={"dropout": key})
        value = nats_to_bits_per_dim(jnp.mean(jnp.sum(values, axis=(1, 2))), shape)
        return value, Aux({}, weight=jnp.float32(len(values)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the image given its label, where there are labels."""
        del key
        return jnp.sum(log_probs(variables, batch), axis=(1, 2))

    def extend(
        variables: Variables,
        key: Array,
        patches: Int[Array, "B T N"],
        known: int,
        label: Int[Array, " B"] | None,
        temperature: float,
    ) -> Int[Array, "B H W C"]:
        """Keeps the first `known` patches and draws the others."""
        t, stack = unrolled(config.transformer, variables["params"]["transformer"])
        decoder: Any = Autoregressive(replace(config, transformer=t))
        variables = {"params": {**variables["params"], "transformer": stack}}
        cache = empty_cache(len(patches), length, t.heads, t.width // t.heads, layers=t.depth, dtype=t.dtype)
        if known:
            cache = decoder.apply(variables, cache, patches, known, label, method="fill")

        def step(carry: tuple[tuple[Cache, ...], Array], previous: Array, position: Array, key: Array) -> Any:
            cache, patches = carry
            patches = patches.at[:, jnp.maximum(position - 1, 0)].set(previous)
            cache, patch = decoder.apply(variables, cache, patches, position, key, temperature, label, method="decode")
            return (cache, patches), patch

        drawn = decode(step, (cache, patches), patches[:, max(known - 1, 0)], length, key, start=known)
        patches = jnp.concatenate([patches[:, :known], drawn], axis=1)
        return unpatchify(patches, config.patch_size, config.channels).astype(jnp.uint8)

    def label_key(key: Array) -> Array:
        return jax.random.fold_in(key, length)  # patches have the keys before it

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of each sub-pixel's softmax, or of each pixel's mixture."""
        label = sampling_labels(label_key(key), given.get("label"), config.classes, num)
        blank = jnp.zeros((num, length, patch_length(config)), jnp.int32)
        return extend(variables, key, blank, 0, label, temperature)

    def complete(
        variables: Variables, key: Array, image: Int[Array, "B H W C"], known: np.ndarray, *, temperature: float = 1.0
    ) -> Int[Array, "B H W C"]:
        """Where images have labels, each is given one drawn from their probabilities given the known pixels.

        Raises:
          UserError: `known` is not whole patches, all those from the first to some other in raster order.
        """
        count = known_prefix(known, config.patch_size)

        def of_known(label: Int[Array, " B"]) -> Float[Array, " B"]:
            return jnp.sum(log_probs(variables, {"image": image, "label": label})[:, :count], axis=(1, 2))

        label = inferred_labels(label_key(key), of_known, config.classes, len(image))
        patches = patchify(image, config.patch_size).astype(jnp.int32)
        return extend(variables, key, patches, count, label, temperature)

    rules = (
        *subpixel_rules(mixture=config.mixtures is not None),
        (r"context/kernel$", (None, "embed")),
        (r"context/bias$", (None,)),
        (r"(row|column|label)$", (None,)),
        *TRANSFORMER_RULES,
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
