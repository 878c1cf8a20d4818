"""The ends of an autoregressive network over pixels: tables of levels in front of it, and heads behind it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.vision import patchify
from vlm_jax.sharding import constrain


def waves(levels: int) -> Float[Array, "V K"]:
    """Vectors of unit length that are the nearer each other the nearer their levels: sines and cosines of the level.

    Tables and output layers that start as random combinations of them know the order of the levels; independent ones
    would have to learn from scratch, for every rare level, that it looks like its neighbours.
    """
    frequencies = jnp.arange(1, min(levels, 64) + 1)
    angles = jnp.pi * frequencies * jnp.linspace(0, 1, levels)[:, None]
    values = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1) * jnp.tile(frequencies, 2) ** -0.5
    return values / jnp.linalg.norm(values, axis=1, keepdims=True)


def smooth_tables(key: Array, shape: tuple[int, int, int]) -> Float[Array, "N V D"]:
    """Initial vectors of variance 1 / N for each level."""
    size, levels, width = shape
    basis = waves(levels)
    return jnp.einsum("vk,nkd->nvd", basis, jax.random.normal(key, (size, basis.shape[1], width))) * size**-0.5


def smooth_outputs(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "D V"]:
    """The initial kernel of a layer whose outputs are the logits of levels: of variance 1 / D."""
    width, levels = shape
    basis = waves(levels)
    return (jax.random.normal(key, (width, basis.shape[1])) @ basis.T * width**-0.5).astype(dtype)


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


class SoftmaxHead(nn.Module):
    """The sub-pixels of a patch given the network's output for it, each given those before it.

    A neural autoregressive density estimator (NADE: Uria et al. 2016, 1605.02226) with a softmax over the levels.
    """

    size: int
    """Sub-pixels of a patch."""
    levels: int
    width: int
    norm_eps: float = 1e-6
    dtype: str = "float32"

    def setup(self) -> None:
        if self.size > 1:  # nothing comes after the last sub-pixel
            self.table = PatchEmbedding(self.size - 1, self.levels, self.width)
        self.query = self.param("query", nn.initializers.normal(0.02), (self.size, self.width))
        self.norm = nn.LayerNorm(self.norm_eps, dtype=self.dtype)
        self.up = nn.Dense(self.width, dtype=self.dtype)
        self.logits = nn.Dense(self.levels, kernel_init=smooth_outputs)

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
            logits = self.predict(x + query)
            if temperature == 0:
                patch.append(jnp.argmax(logits, axis=-1))
            else:
                patch.append(jax.random.categorical(jax.random.fold_in(key, i), logits / temperature))
        return jnp.stack(patch, axis=-1)

    def predict(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return self.logits(nn.gelu(self.up(self.norm(x))).astype(jnp.float32))


class MixtureHead(nn.Module):
    """The parameters of a pixel's mixture of logistics, its channels jointly, given the network's output for it."""

    outputs: int
    """As many as `objectives.likelihood.mixture_channels` says."""
    width: int
    norm_eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B O"]:
        x = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(x)
        x = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="up")(x))
        return nn.Dense(self.outputs, name="mixture")(x.astype(jnp.float32))


def known_prefix(known: Any, patch_size: int) -> int:
    """How many patches, from the first in raster order, are known.

    Args:
      known: a NumPy array of bool [H, W]

    Raises:
      UserError: others are known as well, or part of one, which no order of drawing that starts at the top respects.
    """
    patches = patchify(known[None, ..., None], patch_size)[0]
    whole = patches.all(axis=1)
    count = int(whole.sum())
    if not whole[:count].all() or patches[count:].any():
        units = "pixels" if patch_size == 1 else f"whole patches of {patch_size}x{patch_size} pixels"
        raise UserError(
            f"an autoregressive model can complete an image only from its first {units} in raster order, and `known` "
            f"has others: choose whole rows from the top"
        )
    return count


def subpixel_rules(*, mixture: bool) -> tuple[Rule, ...]:
    """Sharding rules of a module with the fields `table` and `head`."""
    outputs = "mixture" if mixture else "logits"
    return (
        (r"table/embedding$", (None, None, "embed")),
        *(() if mixture else ((r"query$", (None,)),)),
        (r"head/up/kernel$", ("embed", "mlp")),
        (r"head/up/bias$", ("mlp",)),
        (r"head/norm/(scale|bias)$", (None,)),
        (rf"{outputs}/kernel$", ("embed", None)),
        (rf"{outputs}/bias$", (None,)),
    )
