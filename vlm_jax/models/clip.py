"""CLIP (Radford et al. 2021, 2103.00020) and SigLIP (Zhai et al. 2023, 2303.15343).

An image tower and a text tower whose unit vectors are compared by their inner product.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.nn.sequence import up_to_end
from vlm_jax.nn.stack import Remat
from vlm_jax.nn.text import TextTower, TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTower, VisionTransformer, normalised, vision_rules
from vlm_jax.objectives.contrastive import info_nce, sigmoid

MAX_SCALE = 100.0
"""The inverse temperature is clipped here (2103.00020, section 2.5)."""
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that OpenAI's weights were trained on (the release)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A pair of towers and the objective that trains them."""

    objective: Literal["info_nce", "sigmoid"] = "info_nce"
    image: VisionTransformer
    text: TextTransformer
    embedding: int
    """Dimensions of the space that images and texts share."""
    projection: bool = True
    """Project the image by a matrix; False: the image tower's vector is the embedding, as in SigLIP."""


def published_clip(
    image_width: int, image_depth: int, patch: int, text_width: int, embedding: int, remat: Remat
) -> Config:
    """A CLIP of 2103.00020, table 20, in OpenAI's released layout: 224 pixels, 77 tokens of a 49,408-word BPE."""

    def transformer(width: int, depth: int) -> Transformer:
        return Transformer(
            width=width,
            depth=depth,
            heads=width // 64,
            mlp=4 * width,
            activation="quick_gelu",
            norm_eps=1e-5,
            dtype="bfloat16",
            remat=remat,
        )

    return Config(
        image=VisionTransformer(
            image_size=224,
            patch_size=patch,
            pre_norm=True,
            patch_bias=False,
            transformer=transformer(image_width, image_depth),
        ),
        text=TextTransformer(
            vocab_size=49408, context_length=77, eos_id=49407, transformer=transformer(text_width, 12)
        ),
        embedding=embedding,
    )


CLIP_VIT_B32 = published_clip(768, 12, 32, 512, 512, "products")
CLIP_VIT_B16 = published_clip(768, 12, 16, 512, 512, "products")
CLIP_VIT_L14 = published_clip(1024, 24, 14, 768, 768, "all")

SIGLIP_VIT_B16 = Config(
    objective="sigmoid",
    image=VisionTransformer(
        image_size=224,
        patch_size=16,
        pool="attention",
        transformer=Transformer(width=768, depth=12, heads=12, mlp=3072, dtype="bfloat16", remat="products"),
    ),
    text=TextTransformer(
        vocab_size=32000,
        context_length=64,
        eos_id=1,
        pool="last",
        transformer=Transformer(width=768, depth=12, heads=12, mlp=3072, dtype="bfloat16", remat="products"),
    ),
    embedding=768,
    projection=False,
)


class CLIP(nn.Module):
    """Both towers and the temperature."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.image = VisionTower(c.image)
        self.text = TextTower(c.text, c.embedding, projection_bias=not c.projection)
        if c.projection:
            self.image_projection = nn.Dense(c.embedding, use_bias=False, dtype=c.image.transformer.dtype)
        initial_scale = {"info_nce": 1 / 0.07, "sigmoid": 10.0}[c.objective]
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(initial_scale)), ())
        if c.objective == "sigmoid":
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def embed_image(self, image: Int[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B D"]:
        x = self.image(normalised(image, self.config.image), train=train)
        return unit(self.image_projection(x) if self.config.projection else x)

    def embed_text(self, tokens: Int[Array, "B T"], *, train: bool = False) -> Float[Array, "B D"]:
        return unit(self.text(tokens, train=train))

    def image_features(self, image: Int[Array, "B H W C"]) -> Float[Array, "B T D"]:
        return self.image(normalised(image, self.config.image), pooled=False).astype(jnp.float32)

    def text_features(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.text.features(tokens).astype(jnp.float32)

    def __call__(
        self, image: Int[Array, "B H W C"], tokens: Int[Array, "B T"], *, train: bool = False
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        image, text = self.embed_image(image, train=train), self.embed_text(tokens, train=train)
        if self.config.objective == "info_nce":
            scale = jnp.minimum(jnp.exp(self.log_scale), MAX_SCALE)
            loss, metrics = info_nce(image, text, scale)
        else:
            scale = jnp.exp(self.log_scale)
            loss, metrics = sigmoid(image, text, scale, self.logit_bias)
        return loss, {**metrics, "scale": scale}


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scaled to length one, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def build(config: Config) -> Model:
    """Images and texts in one space: `embed_image` and `embed_text` return unit vectors."""
    module: Any = CLIP(config)  # linen types what `apply` returns as a union
    image, text = config.image, config.text

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["image"], batch["tokens"])

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        del step
        value, metrics = module.apply(variables, batch["image"], batch["tokens"], train=train, rngs={"dropout": key})
        return value, Aux(metrics)

    def embed_image(variables: Variables, image: Int[Array, "B H W C"]) -> Float[Array, "B D"]:
        return module.apply(variables, image, method="embed_image")

    def embed_text(variables: Variables, tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        return module.apply(variables, tokens, method="embed_text")

    def image_features(variables: Variables, image: Int[Array, "B H W C"]) -> Float[Array, "B T D"]:
        """Of each patch in raster order."""
        return module.apply(variables, image, method="image_features")

    def text_features(
        variables: Variables, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """A text goes to its first end token, that included."""
        return module.apply(variables, tokens, method="text_features"), up_to_end(tokens, text.eos_id)

    inputs: Mapping[str, Input] = {
        "image": Input((image.image_size, image.image_size, image.channels), "uint8", 256),
        "tokens": Input(
            (text.context_length,), "int32", text.vocab_size, contains=text.eos_id if text.pool == "eos" else None
        ),
    }
    rules = (
        (r"token/embedding$", ("vocab", "embed")),
        (r"projection/kernel$", ("embed", None)),
        *(() if config.projection else ((r"projection/bias$", (None,)),)),
        (r"log_scale$", ()),
        *(((r"logit_bias$", ()),) if config.objective == "sigmoid" else ()),
        *vision_rules(image),
    )
    return Model(
        inputs=inputs,
        init=init,
        loss=loss,
        rules=rules,
        embed_image=embed_image,
        embed_text=embed_text,
        image_features=image_features,
        text_features=text_features,
    )
