"""Chameleon: one decoder that reads and writes text and images as tokens of one vocabulary (2405.09818).

A first stage, of any family that encodes images as a map of codes and decodes it, stays as another run left it
(`Start(workdir, into="first")`, frozen ^first/). In a row an image is a token that begins it, its codes in raster order
and a token that ends it, and a language model predicts all tokens alike, from those before them.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import models
from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.models import language
from vlm_jax.models.language import Language
from vlm_jax.models.parts.continuation import Decoding, State, drawn_token
from vlm_jax.models.token_autoregressive import check_first
from vlm_jax.nn.decoder import DecoderConfig, PostNormDecoderConfig
from vlm_jax.nn.joint_vocabulary import (
    CODE,
    JointVocabulary,
    guided,
    planned,
    prompted,
    streams,
)
from vlm_jax.nn.sequence import attention_mask, image_numbers, next_tokens, place_images, target_images
from vlm_jax.nn.stack import unrolled
from vlm_jax.objectives.language import Scores, cross_entropy
from vlm_jax.sharding import under
from vlm_jax.trees import assembled, part


@dataclass(frozen=True, kw_only=True)
class Config:
    """A first stage, a language model, and the tokens by which it means images."""

    first: Any
    """The `Config` of a family that has `encode`, `decode` and one map of codes, such as `vqvae`."""
    language: language.Config
    """Its vocabulary holds the codes."""
    bos_id: int
    """The token that begins a document."""
    begin_id: int
    """The token that begins an image."""
    end_id: int
    """The token that ends an image."""
    code_at: int
    """The token of the first code, which those of the others follow."""
    images: int = 1
    """Of a row, at most."""
    z_loss: float = 1e-5
    """Weight of the mean square of log Z, which keeps the logits from drifting (section 2.3.1)."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"images is {self.images}: a row must have room for 1 at least")
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"z_loss is {self.z_loss}: it must be a number, at least 0, and 0 is for none")


@dataclass(frozen=True, kw_only=True)
class Sampling(language.Sampling):
    """How texts and codes are drawn."""

    guidance: float = 1.0
    """Above 1: logits of codes away from those of an image that is told nothing; at 0 those themselves (2207.12598)."""
    image_guidance: float | None = None
    """The same of what the images before it say, from which `guidance` then goes on to what the texts say (2211.09800,
    section 3.2.1); None: one guidance for both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "image_guidance"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise UserError(f"sampling.{name} is {value}: it must be a number, at least 0, and 1 is for none")


CHAMELEON_7B = language.Config(
    vocab_size=65_536,
    context_length=4096,
    eos_id=2,
    decoder=DecoderConfig(
        width=4096,
        depth=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp=11_008,
        qk_norm="layer",
        dropout=0.1,
        dtype="bfloat16",
        remat="all",
    ),
)
"""2405.09818, table 1; the vocabulary and sizes of the release's config.json."""
CHAMELEON_34B = replace(
    CHAMELEON_7B,
    decoder=PostNormDecoderConfig(
        width=8192,
        depth=48,
        heads=64,
        kv_heads=8,
        head_width=128,
        mlp=22_016,
        qk_norm="layer",
        dtype="bfloat16",
        remat="all",
    ),
)
"""2405.09818, table 1: it norms what is added, and drops nothing."""


def build(config: Config) -> Model:
    """A density over the target tokens of a row, and of its target images where the first stage has one of pixels."""
    first, c = models.build(config.first), config.language
    spec = check_first(first)
    side, size = spec.shape[0], spec.limit
    encode, decode_codes = first.encode, first.decode
    assert encode is not None and decode_codes is not None and size is not None
    vocabulary = JointVocabulary(
        c.vocab_size, config.code_at, size, config.bos_id, c.eos_id, config.begin_id, config.end_id
    )
    vocabulary.check()
    span = side * side + 2
    if span + 2 >= c.context_length:
        raise UserError(
            f"an image takes {span} places and the context_length is {c.context_length}: choose a longer one, or a "
            f"first stage of fewer codes"
        )
    module: Any = Language(c)  # linen types what `apply` returns as a union

    def init(key: Array, batch: Batch) -> Variables:
        first_key, own_key = jax.random.split(key)
        own = module.init(own_key, batch["tokens"], batch["segment"], batch["tokens"])
        return assembled({"first": first.init(first_key, {"image": batch["image"][:, 0]}), "language": own})

    def codes_of(variables: Variables, image: Int[Array, "B N H W C"]) -> Int[Array, "B N h w"]:
        codes = encode(part(variables, "first"), image.reshape(-1, *image.shape[2:]))
        return codes.reshape(*image.shape[:2], side, side)

    def written(
        tokens: Int[Array, "B T"], codes: Int[Array, "B N h w"], image_at: Int[Array, "B N"]
    ) -> Int[Array, "B T"]:
        """A row with the tokens of each image in its places."""
        own = jnp.pad(codes.reshape(*codes.shape[:2], -1) + config.code_at, ((0, 0), (0, 0), (1, 1)))
        own = own.at[..., 0].set(config.begin_id).at[..., -1].set(config.end_id)
        return place_images(tokens[..., None], own[..., None], image_at)[..., 0]

    def scores(
        variables: Variables, batch: Batch, codes: Int[Array, "B N h w"], **settings: Any
    ) -> tuple[Scores, Bool[Array, "B T"]]:
        tokens, segment = written(batch["tokens"], codes, batch["image_at"]), batch["segment"]
        following, predicted = next_tokens(tokens, batch["target"], segment)
        return module.apply(part(variables, "language"), tokens, segment, following, **settings), predicted

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy in nats a target token, and `z_loss` times the mean of their (log Z)^2."""
        del step
        codes = batch["stage"] if "stage" in batch else codes_of(variables, batch["image"])
        found, predicted = scores(variables, batch, codes, train=train, rngs={"dropout": key})
        value, metrics, weight = cross_entropy(found, predicted)
        drift = jnp.sum(jnp.where(predicted, found.log_normaliser**2, 0)) / jnp.maximum(weight, 1)
        metrics |= {"cross_entropy": value, "log_normaliser_squared": drift}
        state = {collection: tree for collection, tree in variables.items() if collection != "params"}
        return value + config.z_loss * drift, Aux(metrics, weight, state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the target tokens of each row and of its target images, each given what stands before it."""
        del key
        assert first.log_likelihood_given is not None
        image, codes = batch["image"], codes_of(variables, batch["image"])
        found, predicted = scores(variables, batch, codes)
        flat = image.reshape(-1, *image.shape[2:]), codes.reshape(-1, side, side)
        pixels = first.log_likelihood_given(part(variables, "first"), *flat).reshape(image.shape[:2])
        pixels = jnp.where(target_images(batch), pixels, 0)
        return jnp.sum(jnp.where(predicted, found.log_prob, 0), axis=1) + jnp.sum(pixels, axis=1)

    def count(batch: Batch) -> Int[Array, " B"]:
        """The target tokens of each row's texts, and the sub-pixels of its target images."""
        _, predicted = next_tokens(batch["tokens"], batch["target"], batch["segment"])
        image = image_numbers(batch["image_at"], span, batch["tokens"].shape[1])
        texts = jnp.sum(predicted & (jnp.roll(image, -1, axis=1) < 0), axis=1, dtype=jnp.int32)
        pixels = math.prod(batch["image"].shape[2:])
        return texts + pixels * jnp.sum(target_images(batch), axis=1, dtype=jnp.int32)

    def generate(
        variables: Variables,
        key: Array,
        batch: Batch,
        *,
        order: tuple[str, ...] = ("text",),
        temperature: float = 1.0,
        sampling: Sampling = Sampling(),
    ) -> dict[str, Array]:
        """Goes on with the last document of each row, which is padded on the left.

        A text takes `sampling.length` tokens at most: each ends where an image begins, and the last with `eos_id`
        too. Between the beginning of an image and its end codes alone can be drawn, and elsewhere none. What is
        drawn is the target; it follows the prompt without gaps, and padding follows it. Images that are drawn are the
        last ones of `image`.
        """
        plan = planned(batch, order, context=c.context_length, length=sampling.length, codes=side * side)
        rows = len(batch["tokens"])
        d, stack = unrolled(c.decoder, variables["params"]["language"]["decoder"])
        writer: Any = Language(replace(c, decoder=d))
        own = {"params": {**variables["params"]["language"], "decoder": stack}}
        scales = sampling.guidance, sampling.image_guidance
        seen = streams(batch, span, *scales)[: None if plan.images else 1]
        embed, feed, logits = (partial(writer.apply, own, method=method) for method in ("embed", "feed", "logits"))
        decoding = Decoding(embed, feed, logits, seen, plan, vocabulary)
        settings: dict[str, Any] = {"temperature": temperature, "sampling": sampling}
        legal = vocabulary.legal()[CODE][None]

        def drawn(state: State, start: int, key: Array) -> tuple[State, Int[Array, "B S"], Int[Array, "B H W C"]]:
            """After an image, its tokens, and the image."""
            state = state.holding(start, span)
            begin, end = (jnp.full(rows, mark, jnp.int32) for mark in (config.begin_id, config.end_id))

            def step(state: State, place: Array) -> tuple[State, Array]:
                logits = guided(jnp.split(state.logits, len(seen)), *scales)
                code = drawn_token(jax.random.fold_in(key, place), logits, legal, **settings)
                return decoding.told(state, code, place), code

            state = decoding.told(state, begin, start)
            state, codes = jax.lax.scan(step, state, start + 1 + jnp.arange(side * side))
            state = decoding.told(state, end, start + span - 1)
            image = decode_codes(part(variables, "first"), codes.T.reshape(-1, side, side) - config.code_at)
            return state, jnp.concatenate([begin[:, None], codes.T, end[:, None]], axis=1), image

        tokens = written(batch["tokens"], codes_of(variables, batch["image"]), batch["image_at"])
        image = image_numbers(batch["image_at"], span, tokens.shape[1]) >= 0
        state = decoding.begun(decoding.embed(tokens), attention_mask(batch["segment"]), image, d)
        return decoding.continued(state, {**batch, "tokens": tokens}, order, drawn, key, **settings)

    def sample(
        variables: Variables,
        key: Array,
        given: Batch,
        *,
        num: int,
        temperature: float = 1.0,
        sampling: Sampling,
    ) -> Int[Array, "num H W C"]:
        """An image of a document that begins with a text, or with nothing."""
        tokens = given["tokens"] if "tokens" in given else jnp.full((num, 1), config.bos_id, jnp.int32)
        begun = prompted(tokens, c.eos_id, images=(config.images, *first.inputs["image"].shape))
        settings: dict[str, Any] = {"temperature": temperature, "sampling": sampling}
        return generate(variables, key, begun, order=("image",), **settings)["image"][:, -1]

    density: dict[str, Any] = {"log_likelihood": log_likelihood, "count": count, "bound": "lower"}
    return Model(
        inputs=language.inputs_with_images(c, first.inputs["image"], config.images, span),
        init=init,
        loss=loss,
        rules=(*under("first", first.rules), *under("language", language.rules_of(c))),
        stage=codes_of,
        conditions={"tokens": Input((c.context_length - span,), "int32", c.vocab_size, contains=c.eos_id)},
        sampling=Sampling(),
        sample=sample,
        generate=generate,
        **(density if first.log_likelihood_given is not None else {}),
    )
