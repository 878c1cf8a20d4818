"""LLaVA: a language model that sees (2304.08485; 2310.03744).

The features of an image tower go through a projector and stand in the places of tokens of a language model, which
predicts the answers. With attention "prefix" it is trained as PaliGemma is (2407.07726), with a pixel shuffle an image
takes as few places as in SmolVLM (2504.05299).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.models import clip, language
from vlm_jax.models.language import Language, Sampling
from vlm_jax.nn.projector import Kind, Projector, projector_rules
from vlm_jax.nn.sequence import (
    attention_mask,
    documents,
    image_numbers,
    next_tokens,
    place_images,
    positions,
    prefix_numbers,
)
from vlm_jax.nn.vision import VisionTower, VisionTransformer, normalised, vision_rules
from vlm_jax.objectives.language import Scores, cross_entropy, shares
from vlm_jax.sharding import under


@dataclass(frozen=True, kw_only=True)
class Config:
    """Three parts, and how they are put together."""

    vision: VisionTransformer
    """`features` says which layer is read: 1, before the last block, is that of LLaVA and CLIP's towers."""
    projector: Kind = "mlp2x_gelu"
    language: language.Config
    shuffle: int = 1
    """The patches of a square of so many a side are one token (2504.05299)."""
    images: int = 1
    """Of a row, at most."""
    attention: Literal["causal", "prefix"] = "causal"
    """prefix: the places of a document before its first target, image and question, all attend to one another, and the
    loss is a mean over documents of the means over their targets, as in PaliGemma (2407.07726). causal: none attends to
    what comes after it, and each target counts alike."""

    def __post_init__(self) -> None:
        side = self.vision.image_size // self.vision.patch_size
        if self.shuffle < 1 or side % self.shuffle:
            raise UserError(
                f"{side} patches a side cannot be put together in squares of {self.shuffle}: choose a shuffle that "
                f"divides {side}"
            )
        if self.images < 1:
            raise UserError(f"images is {self.images}: a row must have room for 1 at least")
        if self.image_tokens >= self.language.context_length:
            raise UserError(
                f"an image takes {self.image_tokens} places and the context_length is {self.language.context_length}: "
                f"choose a longer one, or a shuffle"
            )

    @property
    def image_tokens(self) -> int:
        """Places that an image takes in a row."""
        return (self.vision.image_size // self.vision.patch_size // self.shuffle) ** 2


def published(width: int, depth: int, heads: int, mlp: int) -> Config:
    """A LLaVA-1.5: CLIP ViT-L/14 at 336 pixels and Vicuna v1.5, the sizes of Llama 2.

    The vocabulary is that of the weights on the hub: 32,000 tokens, one for an image and one for padding, and room up
    to a multiple of 64.
    """
    decoder = replace(
        language.LLAMA_2_7B.decoder, width=width, depth=depth, heads=heads, kv_heads=heads, head_width=128, mlp=mlp
    )
    return Config(
        vision=replace(clip.CLIP_VIT_L14.image, image_size=336, mean=clip.OPENAI_MEAN, std=clip.OPENAI_STD, features=1),
        language=replace(language.LLAMA_2_7B, vocab_size=32_064, context_length=2048, decoder=decoder),
    )


LLAVA_1_5_7B = published(4096, 32, 32, 11_008)
"""7.06 billion parameters."""
LLAVA_1_5_13B = published(5120, 40, 40, 13_824)
"""13.35 billion parameters."""


class LLaVA(nn.Module):
    """A row of tokens and images -> a distribution of each token given what stands before it in its document."""

    config: Config

    def setup(self) -> None:
        c = self.config
        decoder = c.language.decoder
        self.vision = VisionTower(c.vision)
        self.projector = Projector(decoder.width, c.projector, c.shuffle, decoder.dtype)
        self.language = Language(c.language)

    def initialise(
        self, tokens: Int[Array, "B T"], segment: Int[Array, "B T"], image: Int[Array, "B N H W C"]
    ) -> Float[Array, "B T"]:
        """Each part as a whole: features do not reach a tower's last layers, which a published tower has."""
        vision = self.config.vision
        self.vision(normalised(image[:, 0], vision))
        self.projector(jnp.zeros((1, (vision.image_size // vision.patch_size) ** 2, vision.transformer.width)))
        return self.language(tokens, segment, tokens).log_prob

    def embed(
        self,
        tokens: Int[Array, "B T"],
        image: Int[Array, "B N H W C"],
        image_at: Int[Array, "B N"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Tokens, and images in their places."""
        batch, images = image.shape[:2]
        pixels = normalised(image.reshape(-1, *image.shape[2:]), self.config.vision)
        features = self.vision(pixels, pooled=False, train=train)
        features = self.projector(features)
        features = features.reshape(batch, images, *features.shape[1:])
        return place_images(self.language.embed(tokens), features, image_at)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        image: Int[Array, "B N H W C"],
        image_at: Int[Array, "B N"],
        position: Int[Array, "B T"],
        mask: Bool[Array, "B 1 T T"],
        following: Int[Array, "B T"],
        *,
        train: bool = False,
    ) -> Scores:
        """Of the token that follows each place."""
        x = self.embed(tokens, image, image_at, train=train)
        return self.language.scores(x, position, mask, following, train=train)


def build(config: Config) -> Model:
    """An exact density over the target tokens of a row, given its others and its images."""
    module: Any = LLaVA(config)  # linen types what `apply` returns as a union

    def target_of(batch: Batch) -> Bool[Array, "B T"]:
        """Nothing predicts the places of an image, whatever `target` says of them."""
        image = image_numbers(batch["image_at"], config.image_tokens, batch["tokens"].shape[1])
        return batch["target"] & (image < 0)

    def mask_of(batch: Batch) -> Bool[Array, "B 1 T T"]:
        segment = batch["segment"]
        group = None if config.attention == "causal" else prefix_numbers(target_of(batch), segment)
        return attention_mask(segment, group)

    def scores(variables: Variables, batch: Batch, **settings: Any) -> tuple[Scores, Bool[Array, "B T"]]:
        following, predicted = next_tokens(batch["tokens"], target_of(batch), batch["segment"])
        images = batch["image"], batch["image_at"]
        where = positions(batch["segment"]), mask_of(batch)
        return module.apply(variables, batch["tokens"], *images, *where, following, **settings), predicted

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["tokens"], batch["segment"], batch["image"], method="initialise")

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy in nats a target token."""
        del step
        found, predicted = scores(variables, batch, train=train, rngs={"dropout": key})
        weights = predicted if config.attention == "causal" else shares(predicted, documents(batch["segment"]))
        value, metrics, weight = cross_entropy(found, weights)
        return value, Aux(metrics, weight)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the target tokens of each row, each given what it attends to."""
        del key
        found, predicted = scores(variables, batch)
        return jnp.sum(jnp.where(predicted, found.log_prob, 0), axis=1)

    def count(batch: Batch) -> Int[Array, " B"]:
        """The target tokens of each row that something predicts."""
        _, predicted = next_tokens(batch["tokens"], target_of(batch), batch["segment"])
        return jnp.sum(predicted, axis=1, dtype=jnp.int32)

    def generate(
        variables: Variables,
        key: Array,
        batch: Batch,
        *,
        order: tuple[str, ...] = ("text",),
        temperature: float = 1.0,
        sampling: Sampling = Sampling(),
    ) -> dict[str, Array]:
        """`language.continued` texts, of `sampling.length` tokens at most.

        Rows are padded on the left, and their images are moved with them; `image_at` is their length where there is no
        image, of what is given and of what is returned.
        """
        given, more = batch["tokens"].shape[1], language.room_to_draw(config.language, batch, order, sampling)
        x = module.apply(variables, batch["tokens"], batch["image"], batch["image_at"], method="embed")
        settings: dict[str, Any] = {"more": more, "temperature": temperature, "sampling": sampling}
        params = variables["params"]["language"]
        text = language.continued(config.language, params, batch, x, mask_of(batch), key, **settings)
        places = jnp.where(batch["image_at"] < given, batch["image_at"], given + more)
        return {**text, "image": batch["image"], "image_at": places}

    vision = config.vision
    image = Input((vision.image_size, vision.image_size, vision.channels), "uint8", 256)
    return Model(
        inputs=language.inputs_with_images(config.language, image, config.images, config.image_tokens),
        init=init,
        loss=loss,
        rules=(
            *under("vision", vision_rules(vision)),
            *under("projector", projector_rules(config.projector)),
            *under("language", language.rules_of(config.language)),
        ),
        log_likelihood=log_likelihood,
        bound="exact",
        count=count,
        sampling=Sampling(),
        generate=generate,
    )
