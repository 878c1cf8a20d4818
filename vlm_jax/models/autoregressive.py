"""The autoregressive image transformer: an exact likelihood, pixel after pixel.

As in the Image Transformer (Parmar et al. 2018, 1802.05751) and iGPT, a causal transformer reads the image in raster
order and each sub-pixel has a softmax over its levels. One position of the transformer is a patch of
`patch_size` x `patch_size` pixels (1: a pixel); the sub-pixels within it are predicted one after the other by a
neural autoregressive density estimator (NADE: Uria et al. 2016, 1605.02226) on the transformer's output. The product
of all these conditionals is the probability of the image, whatever the patch size.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.transformer import TRANSFORMER_RULES, Transformer, TransformerStack
from vlm_jax.nn.vision import check_patches, patchify, unpatchify
from vlm_jax.objectives.language import token_log_probs
from vlm_jax.objectives.likelihood import nats_to_bits_per_dim
from vlm_jax.sampling.autoregressive import decode
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Config:
    """A causal transformer over the patches of an image."""

    image_size: int
    channels: int = 3
    levels: int = 256
    """Values of a sub-pixel: 0 ... levels - 1."""
    patch_size: int = 1
    transformer: Transformer

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)


def smooth_tables(key: Array, shape: tuple[int, int, int]) -> Float[Array, "N V D"]:
    """Initial vectors of variance 1 / N that are near each other for near levels: random waves over the level.

    Independent ones would have to learn from scratch, for every rare level, that it looks like its neighbours.
    """
    size, levels, width = shape
    frequencies = jnp.arange(1, 9)
    angles = jnp.pi * frequencies * jnp.linspace(0, 1, levels)[:, None]
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1) / jnp.tile(frequencies, 2)
    waves = waves / jnp.linalg.norm(waves, axis=1, keepdims=True)
    return jnp.einsum("vk,nkd->nvd", waves, jax.random.normal(key, (size, 16, width))) * size**-0.5


class PatchEmbedding(nn.Module):
    """A table of vectors for each sub-pixel of a patch."""

    size: int
    levels: int
    width: int

    def setup(self) -> None:
        embedding = self.param("embedding", smooth_tables, (self.size, self.levels, self.width))
        # Its width is gathered before the lookup: of a table split by width the partitioner would look up the whole
        # batch on every device.
        self.embedding = constrain(embedding, None, None, None)

    def __call__(self, patches: Int[Array, "*B N"]) -> Float[Array, "*B N D"]:
        return self.embedding[jnp.arange(self.size), patches]

    def at(self, i: int, values: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.embedding[i, values]


class PatchHead(nn.Module):
    """The sub-pixels of a patch given the transformer's output, each given those before it (1605.02226)."""

    config: Config

    def setup(self) -> None:
        c, size = self.config, patch_length(self.config)
        if size > 1:  # nothing comes after the last sub-pixel
            self.table = PatchEmbedding(size - 1, c.levels, c.transformer.width)
        self.query = self.param("query", nn.initializers.normal(0.02), (size, c.transformer.width))
        self.norm = nn.LayerNorm(c.transformer.norm_eps, dtype=c.transformer.dtype)
        self.up = nn.Dense(c.transformer.width, dtype=c.transformer.dtype)
        self.logits = nn.Dense(c.levels, dtype=c.transformer.dtype)

    def __call__(self, x: Float[Array, "*B D"], patches: Int[Array, "*B N"]) -> Float[Array, "*B N V"]:
        """Logits of every sub-pixel, those before it read from `patches`."""
        x = x[..., None, :] + self.query
        if patches.shape[-1] > 1:
            x = x.at[..., 1:, :].add(jnp.cumsum(self.table(patches[..., :-1]), axis=-2))
        return self.predict(x)

    def draw(self, x: Float[Array, "B D"], key: Array, temperature: float) -> Int[Array, "B N"]:
        """A patch, sub-pixel by sub-pixel."""
        patch: list[Array] = []
        for i, query in enumerate(self.query):
            if i:
                x = x + self.table.at(i - 1, patch[-1])
            logits = self.predict(x + query).astype(jnp.float32)
            if temperature == 0:
                patch.append(jnp.argmax(logits, axis=-1))
            else:
                patch.append(jax.random.categorical(jax.random.fold_in(key, i), logits / temperature))
        return jnp.stack(patch, axis=-1)

    def predict(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return self.logits(nn.gelu(self.up(self.norm(x))))


class Autoregressive(nn.Module):
    """A sequence of patches -> the log-probability of each sub-pixel given all before it."""

    config: Config

    def setup(self) -> None:
        c, t, size = self.config, self.config.transformer, self.config.image_size // self.config.patch_size
        init = nn.initializers.normal(0.02)
        self.table = PatchEmbedding(patch_length(c), c.levels, t.width)
        self.start = self.param("start", init, (t.width,))
        self.row = self.param("row", init, (size, t.width))
        self.column = self.param("column", init, (size, t.width))
        self.transformer = TransformerStack(t)
        self.head = PatchHead(c)

    def positions(self) -> Float[Array, "T D"]:
        return (self.row[:, None] + self.column).reshape(-1, self.config.transformer.width)

    def __call__(self, image: Int[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B T N"]:
        """log p of every sub-pixel, nats."""
        patches = patchify(image, self.config.patch_size).astype(jnp.int32)
        x = jnp.sum(self.table(patches), axis=-2)
        start = jnp.broadcast_to(self.start, (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([start, x[:, :-1]], axis=1) + self.positions()
        x, _ = self.transformer(x, causal=True, train=train)
        return token_log_probs(self.head(x, patches), patches)

    def decode(
        self,
        cache: Cache,
        previous: Int[Array, "B N"],
        position: Int[Array, ""],
        key: Array,
        temperature: float = 1.0,
    ) -> tuple[Cache | None, Int[Array, "B N"]]:
        """Draws the patch at `position` given the one before it and the cache of those before that."""
        x = jnp.where(position == 0, self.start, jnp.sum(self.table(previous), axis=-2)) + self.positions()[position]
        x, filled = self.transformer(x[:, None], cache=cache, position=position)
        return filled, self.head.draw(x[:, 0], key, temperature)


def patch_length(config: Config) -> int:
    """Sub-pixels of a patch."""
    return config.patch_size**2 * config.channels


def build(config: Config) -> Model:
    """An exact density over images."""
    module: Any = Autoregressive(config)  # linen types what `apply` returns as a union
    shape = (config.image_size, config.image_size, config.channels)

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["image"])

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood in bits a dimension."""
        del step
        log_probs = module.apply(variables, batch["image"], train=train, rngs={"dropout": key})
        value = nats_to_bits_per_dim(jnp.mean(jnp.sum(log_probs, axis=(1, 2))), shape)
        return value, Aux({}, weight=jnp.float32(len(log_probs)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        del key
        return jnp.sum(module.apply(variables, batch["image"]), axis=(1, 2))

    def sample(
        variables: Variables, key: Array, conditioning: Batch, *, num: int, temperature: float = 1.0
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of each sub-pixel's softmax."""
        del conditioning
        t, length = config.transformer, (config.image_size // config.patch_size) ** 2
        cache = empty_cache(num, length, t.heads, t.width // t.heads, layers=t.depth, dtype=t.dtype)

        def step(cache: Cache, previous: Array, position: Array, key: Array) -> tuple[Cache, Array]:
            return module.apply(variables, cache, previous, position, key, temperature, method="decode")

        first = jnp.zeros((num, patch_length(config)), jnp.int32)
        patches = decode(step, cache, first, length, key)
        return unpatchify(patches, config.patch_size, config.channels).astype(jnp.uint8)

    rules = (
        (r"table/embedding$", (None, None, "embed")),
        (r"(start|row|column|query)$", (None,)),
        (r"logits/kernel$", ("embed", None)),
        (r"logits/bias$", (None,)),
        *TRANSFORMER_RULES,
    )
    return Model(
        inputs={"image": Input(shape, "uint8", config.levels)},
        init=init,
        loss=loss,
        rules=rules,
        log_likelihood=log_likelihood,
        bound="exact",
        sample=sample,
    )
