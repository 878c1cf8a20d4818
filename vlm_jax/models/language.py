"""The language model: a decoder of text (Llama: 2302.13971, 2307.09288; Qwen2.5: 2412.15115).

A token is looked up in a table, goes through the decoder, and its inner products with a table, the same or another,
are the logits of the token after it. Several documents are packed in a row: each attends to itself alone, and its
places count from its beginning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Aux, Batch, Input, Model, Rule, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.decoder import (
    Decoder,
    DecoderConfig,
    PostNormDecoderConfig,
    RotaryScaling,
    SeparateDecoderConfig,
    decoder_rules,
)
from vlm_jax.nn.sequence import attention_mask, check_continued, documents, next_tokens, positions, up_to_end
from vlm_jax.nn.stack import unrolled
from vlm_jax.nn.vocabulary import look_up, token_logits, vocabulary_rules
from vlm_jax.objectives.language import Scores, cross_entropy, sequence_scores
from vlm_jax.sampling.autoregressive import decode, draw_token, ending


@dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder and its vocabulary."""

    vocab_size: int
    context_length: int
    """Tokens of a row, padding included."""
    eos_id: int
    """The token that ends a document."""
    tied: bool = False
    """One table for the tokens that are read and those that are predicted."""
    decoder: DecoderConfig | PostNormDecoderConfig | SeparateDecoderConfig

    def __post_init__(self) -> None:
        if self.eos_id >= self.vocab_size:
            raise UserError(f"eos_id is {self.eos_id}: it must be below vocab_size, which is {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text is continued."""

    length: int | None = None
    """Tokens to draw, at most; None: 64, or as many as there is room for in the context."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest that have this share of the probability (1904.09751); 1: from all."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise UserError(f"sampling.length is {self.length}: at least 1 token must be drawn")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampling.top_k is {self.top_k}: it must be at least 1, or None: all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1")


LLAMA_2_7B = Config(
    vocab_size=32_000,
    context_length=4096,
    eos_id=2,
    decoder=DecoderConfig(
        width=4096,
        depth=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp=11_008,
        norm_eps=1e-5,
        dtype="bfloat16",
        remat="all",
    ),
)
"""6.7 billion parameters (2307.09288)."""

LLAMA_3_2_1B = Config(
    vocab_size=128_256,
    context_length=131_072,
    eos_id=128_001,
    tied=True,
    decoder=DecoderConfig(
        width=2048,
        depth=16,
        heads=32,
        kv_heads=8,
        head_width=64,
        mlp=8192,
        rope_base=500_000.0,
        rope_scaling=RotaryScaling(factor=32.0, low_frequency=1.0, high_frequency=4.0, original_length=8192),
        norm_eps=1e-5,
        dtype="bfloat16",
        remat="all",
    ),
)
"""1.24 billion parameters, of which the table of tokens has a fifth (2407.21783, and the release's config.json)."""

QWEN_2_5_0_5B = Config(
    vocab_size=151_936,
    context_length=32_768,
    eos_id=151_643,
    tied=True,
    decoder=DecoderConfig(
        width=896,
        depth=24,
        heads=14,
        kv_heads=2,
        head_width=64,
        mlp=4864,
        rope_base=1_000_000.0,
        qkv_bias=True,
        norm_eps=1e-6,
        dtype="bfloat16",
        remat="all",
    ),
)
"""494 million parameters (2412.15115, and the release's config.json)."""

SMOLLM2_135M = Config(
    vocab_size=49_152,
    context_length=8192,
    eos_id=2,
    tied=True,
    decoder=DecoderConfig(
        width=576, depth=30, heads=9, kv_heads=3, head_width=64, mlp=1536, rope_base=100_000.0, norm_eps=1e-5
    ),
)
"""135 million parameters (2502.02737, and the config.json of the instruct release, whose texts end as turns do)."""


class Language(nn.Module):
    """A row of tokens -> a distribution of each token given those of its document before it."""

    config: Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.token = nn.Embed(c.vocab_size, c.decoder.width, embedding_init=init)
        if not c.tied:
            self.head = nn.Embed(c.vocab_size, c.decoder.width, embedding_init=init)
        self.decoder = Decoder(c.decoder)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.token.embedding, tokens, self.config.decoder.dtype)

    def outputs(self) -> Float[Array, "V D"]:
        """The table by which tokens are predicted."""
        return (self.token if self.config.tied else self.head).embedding

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        following: Int[Array, "B T"],
        *,
        train: bool = False,
    ) -> Scores:
        """Of the token that follows each place."""
        return self.scores(self.embed(tokens), positions(segment), attention_mask(segment), following, train=train)

    def scores(
        self,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        mask: Bool[Array, "B 1 T T"],
        following: Int[Array, "B T"],
        *,
        train: bool = False,
    ) -> Scores:
        """The same of what stands in the places of embedded tokens."""
        return self.scored(self.decoder(x, position, mask, train=train)[0], following)

    def scored(self, x: Float[Array, "B T D"], following: Int[Array, "B T"]) -> Scores:
        """The same of what the decoder makes of them."""
        table = self.outputs()
        return sequence_scores(lambda x: token_logits(x, table), x, following, self.config.vocab_size)

    def feed(
        self,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        mask: Bool[Array, "B 1 T S"],
        cache: tuple[Cache, ...],
        slot: Int[Array, ""] | int,
        image: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """What the decoder makes of further places, which go into the cache from `slot` on."""
        x, filled = self.decoder(x, position, mask, cache=cache, slot=slot, image=image)
        assert filled is not None
        return x, filled

    def logits(self, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Of the token that follows one of the decoder's places."""
        return token_logits(x[:, None], self.outputs())[:, 0]


def inputs_of(config: Config) -> dict[str, Input]:
    """The fields of a sequence."""
    length = (config.context_length,)
    return {
        "tokens": Input(length, "int32", config.vocab_size),
        "target": Input(length, "bool", 2),
        "segment": Input(length, "int32", config.context_length + 1),
    }


def inputs_with_images(config: Config, image: Input, images: int, span: int) -> dict[str, Input]:
    """The fields of a sequence in which up to so many images stand.

    Args:
      image: the field of one.
      span: places that an image takes.
    """
    return {
        **inputs_of(config),
        "image": image._replace(shape=(images, *image.shape)),
        "image_at": Input((images,), "int32", config.context_length + 1, span=span),
    }


def rules_of(config: Config) -> tuple[Rule, ...]:
    """Sharding rules of a `Language`."""
    return (*vocabulary_rules(tied=config.tied), *decoder_rules(config.decoder))


def room_to_draw(config: Config, batch: Batch, order: tuple[str, ...], sampling: Sampling) -> int:
    """How many tokens are drawn, at most, to continue the rows.

    Raises:
      UserError: `order` is not one text, there is no room in the context, or, where values are known, a row ends in
        padding.
    """
    given = batch["tokens"].shape[1]
    left = config.context_length - given
    more = max(1, min(64, left)) if sampling.length is None else sampling.length
    if order != ("text",):
        raise UserError(f"`order` is {order} and a language model writes one text: make it ('text',)")
    if more > left:
        raise UserError(
            f"{given} tokens and {more} more are {given + more}, and the model's context_length is "
            f"{config.context_length}: shorten the prompts, or sampling.length"
        )
    check_continued(batch["segment"])
    return more


def continued(
    config: Config,
    params: Mapping[str, Any],
    batch: Batch,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B 1 T T"],
    key: Array,
    *,
    more: int,
    temperature: float,
    sampling: Sampling,
) -> dict[str, Array]:
    """Continues the last document of each row until `eos_id`, by `more` tokens at most.

    Args:
      params: of a `Language`.
      x: what stands in the places of the batch: its tokens, embedded, or what takes their place.
      mask: which of these places attend to which; what is drawn attends to all of its document.

    Returns:
      The fields of a sequence with as many further places: what was drawn is their target, and what follows the end of
      a text is padding.
    """
    tokens, segment = batch["tokens"], jnp.pad(batch["segment"], ((0, 0), (0, more)), mode="edge")
    start, room = tokens.shape[1], segment.shape[1]
    d, stack = unrolled(config.decoder, params["decoder"])
    writer: Any = Language(replace(config, decoder=d))
    variables = {"params": {**params, "decoder": stack}}
    document, position = documents(segment), positions(segment)
    cache = empty_cache(len(tokens), room, d.kv_heads, d.head_width, layers=d.depth, dtype=d.dtype)

    def draw(logits: Array, key: Array) -> Array:
        return draw_token(key, logits, temperature=temperature, top_k=sampling.top_k, top_p=sampling.top_p)

    def step(cache: tuple[Cache, ...], token: Array, place: Array, key: Array) -> tuple[tuple[Cache, ...], Array]:
        x = writer.apply(variables, token[:, None], method="embed")
        at, own = (jax.lax.dynamic_slice_in_dim(each, place - 1, 1, axis=1) for each in (position, document))
        x, cache = writer.apply(variables, x, at, (own == document)[:, None, None], cache, place - 1, method="feed")
        return cache, draw(writer.apply(variables, x[:, -1], method="logits"), key)

    seen = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, more)))
    x, cache = writer.apply(variables, x, position[:, :start], seen, cache, 0, method="feed")
    first = draw(writer.apply(variables, x[:, -1], method="logits"), jax.random.fold_in(key, start))
    carry = (cache, first == config.eos_id)
    rest = decode(ending(step, config.eos_id), carry, first, room, key, start=start + 1)
    drawn = jnp.concatenate([first[:, None], rest], axis=1)
    real = up_to_end(drawn, config.eos_id)
    prompt = jnp.ones_like(tokens, bool)
    return {
        "tokens": jnp.concatenate([tokens, drawn], axis=1),
        "target": jnp.concatenate([~prompt, real], axis=1),
        "segment": jnp.where(jnp.concatenate([prompt, real], axis=1), segment, 0),
    }


def build(config: Config) -> Model:
    """An exact density over the target tokens of a row, given its others."""
    module: Any = Language(config)  # linen types what `apply` returns as a union

    def scores(variables: Variables, batch: Batch, **settings: Any) -> tuple[Scores, Bool[Array, "B T"]]:
        following, predicted = next_tokens(batch["tokens"], batch["target"], batch["segment"])
        return module.apply(variables, batch["tokens"], batch["segment"], following, **settings), predicted

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch["tokens"], batch["segment"], batch["tokens"])

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy in nats a target token, of which perplexity is the exponential."""
        del step
        value, metrics, weight = cross_entropy(*scores(variables, batch, train=train, rngs={"dropout": key}))
        return value, Aux(metrics, weight)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """Of the target tokens of each row, each given what stands before it in its document."""
        del key
        found, predicted = scores(variables, batch)
        return jnp.sum(jnp.where(predicted, found.log_prob, 0), axis=1)

    def count(batch: Batch) -> Int[Array, " B"]:
        """The target tokens of each row that something predicts."""
        _, predicted = next_tokens(batch["tokens"], batch["target"], batch["segment"])
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
        """`continued` texts, which are padded on the left, of `sampling.length` tokens at most."""
        more = room_to_draw(config, batch, order, sampling)
        x, mask = module.apply(variables, batch["tokens"], method="embed"), attention_mask(batch["segment"])
        settings: dict[str, Any] = {"temperature": temperature, "sampling": sampling}
        return continued(config, variables["params"], batch, x, mask, key, more=more, **settings)

    return Model(
        inputs=inputs_of(config),
        init=init,
        loss=loss,
        rules=rules_of(config),
        log_likelihood=log_likelihood,
        bound="exact",
        count=count,
        sampling=Sampling(),
        generate=generate,
    )
