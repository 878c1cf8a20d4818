"""The network of a row of texts and noisy images: a language model, and what it reads and draws images by."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Batch
from vlm_jax.models import language
from vlm_jax.models.language import Language
from vlm_jax.nn.attention import Cache
from vlm_jax.nn.image_patches import Patches, PatchReader, PatchWriter
from vlm_jax.nn.sequence import attention_mask, image_numbers, place_images, positions, take_images
from vlm_jax.objectives.language import Scores


class MixedNetwork(nn.Module):
    """A row of tokens and noisy images -> a distribution of each token, and an output for each image."""

    config: language.Config
    sizes: Patches
    channels: int
    """Of what is noised."""
    length: int
    """Patches of an image."""
    codes: int = 0
    """Tokens between what begins an image and its patches."""
    masks: bool = False
    """Whether patches may be masked."""

    def setup(self) -> None:
        width, dtype = self.config.decoder.width, self.config.decoder.dtype
        self.reader = PatchReader(self.sizes, width, dtype)
        self.writer = PatchWriter(self.sizes, self.channels)
        self.language = Language(self.config)
        if self.masks:
            self.mask = self.param("mask", nn.initializers.normal(0.02), (width,))

    def patches(
        self, x: Float[Array, "R h w c"], time: Float[Array, " R"], *, train: bool = False
    ) -> tuple[Float[Array, "R L D"], tuple[Array, ...]]:
        """Tokens of images, and what `image` sees of them."""
        return self.reader(x, time, train=train)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.language.embed(tokens)

    def image(
        self, hidden: Float[Array, "R L D"], seen: tuple[Array, ...], *, train: bool = False
    ) -> Float[Array, "R h w c"]:
        """The output of what the decoder makes of an image's patches."""
        return self.writer(hidden, seen, train=train)

    def __call__(
        self,
        batch: Batch,
        x: Float[Array, "B N h w c"],
        time: Float[Array, "B N"],
        masked: Bool[Array, "B N L"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Scores, Float[Array, "B N h w c"]]:
        """Of the token that follows each place, and of each image.

        Args:
          masked: patches in whose place a learned vector stands.
        """
        tokens, segment, first = batch["tokens"], batch["segment"], batch["image_at"] + 1 + self.codes
        rows, images = first.shape
        read, seen = self.patches(x.reshape(rows * images, *x.shape[2:]), time.reshape(-1), train=train)
        read = read.reshape(rows, images, *read.shape[1:])
        if masked is not None:
            read = jnp.where(masked[..., None], self.mask.astype(read.dtype), read)
        inside = image_numbers(first, self.length, tokens.shape[1])
        told = positions(segment), attention_mask(segment, inside)
        y = place_images(self.embed(tokens), read, first)
        y, _ = self.language.decoder(y, *told, image=inside >= 0, train=train)
        hidden = take_images(y, first, self.length).reshape(rows * images, self.length, -1)
        output = self.image(hidden, seen, train=train)
        return self.language.scored(y, jnp.roll(tokens, -1, axis=1)), output.reshape(x.shape)

    def look(self, x: Float[Array, "R h w c"], time: Float[Array, " R"]) -> Float[Array, "R L D"]:
        """What the decoder makes of an image alone."""
        y, _ = self.patches(x, time)
        places = jnp.broadcast_to(jnp.arange(self.length), y.shape[:2])
        y, _ = self.language.decoder(y, places, image=jnp.ones(y.shape[:2], bool))
        return y.astype(jnp.float32)

    def feed(self, *args: Any) -> tuple[Float[Array, "B n D"], tuple[Cache, ...]]:
        """As `Language.feed`."""
        return self.language.feed(*args)

    def logits(self, y: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Of what follows one place."""
        return self.language.logits(y)
