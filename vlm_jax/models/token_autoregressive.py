"""Autoregressive models of an image's codes, told a class or a text: LlamaGen (Sun et al. 2024, 2406.06525).

The first stage, of any family that encodes images as a map of codes and decodes it, stays as another run left it
(`Start(workdir, into="first")`, frozen ^first/). A language model's decoder reads what it is told, then the codes in
raster order, and predicts each from those before it. Together they bound the likelihood of images from below, by
log p(codes) + log p(image | codes), for an image has one row of codes of many.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import models
from vlm_jax.contract import Aux, Batch, Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.conditioning import Told, Untold, doubled
from vlm_jax.nn.decoder import Decoder, DecoderConfig, decoder_rules
from vlm_jax.nn.labels import check_classes
from vlm_jax.nn.stack import unrolled
from vlm_jax.nn.told import Conditions
from vlm_jax.nn.transformer import MLP
from vlm_jax.nn.vocabulary import look_up, token_logits, vocabulary_rules
from vlm_jax.objectives.language import sequence_scores
from vlm_jax.objectives.likelihood import subpixels
from vlm_jax.sampling.autoregressive import decode, draw_token
from vlm_jax.sharding import constrain, under
from vlm_jax.trees import assembled, merge, part


@dataclass(frozen=True, kw_only=True)
class Config:
    """A first stage, and a decoder of its codes."""

    first: Any
    """The `Config` of a family that has `encode`, `decode` and one map of codes, such as `vqvae`."""
    decoder: DecoderConfig
    classes: int | None = None
    """None: it is told no class."""
    text: Any = None
    """The `Config` of a family that has `text_features`, by which images are told; None: they are told no text."""
    condition_dropout: float = 0.1
    """Share of training examples that are told nothing, neither class nor text, for guidance."""

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if self.decoder.head_width % 4:
            raise UserError(
                f"a head of {self.decoder.head_width} features has no pairs for both rows and columns: choose a "
                f"head_width that is a multiple of 4"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn."""

    guidance: float = 1.0
    """Above 1: logits away from those without a class and a text; at 0 those themselves (2207.12598)."""
    guidance_codes: int | None = None
    """There is guidance for the first so many codes; None: for all."""
    top_k: int | None = None
    """Of the likeliest so many codes alone; None: of all."""
    top_p: float = 1.0
    """Of the fewest likeliest codes with this share of the probability alone (1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"sampling.guidance is {self.guidance}: it must be a number, at least 0, and 1 is for none")
        for name in ("guidance_codes", "top_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"sampling.{name} is {value}: it must be at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1")


def published(width: int, depth: int, heads: int) -> DecoderConfig:
    """Of 2406.06525, table 2; its feed-forward layers have two thirds of 4 width, rounded up to a multiple of 256."""
    mlp = 256 * math.ceil(8 * width / 3 / 256)
    return DecoderConfig(
        width=width, depth=depth, heads=heads, kv_heads=heads, head_width=width // heads, mlp=mlp, dropout=0.1
    )


LLAMAGEN_B = published(768, 12, 12)
LLAMAGEN_L = published(1024, 24, 16)
LLAMAGEN_XL = published(1280, 36, 20)


class Codes(nn.Module):
    """What it is told and the codes so far -> a distribution of each code."""

    config: Config
    side: int
    """Of the map of codes, which is square."""
    size: int
    """Codes that there are."""

    def setup(self) -> None:
        c, d = self.config, self.config.decoder
        init = nn.initializers.normal(0.02)
        self.token, self.head = (nn.Embed(self.size, d.width, embedding_init=init) for _ in range(2))
        self.start = self.param("start", init, ((c.classes or 0) + 1, d.width))
        if c.text is not None:
            self.untold = Untold()
            self.reading = MLP(d.width, d.width, "gelu_tanh", dtype=d.dtype)
        self.decoder = Decoder(d)
        self.dropout = nn.Dropout(d.dropout)

    def embed(self, codes: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.token.embedding, codes, self.config.decoder.dtype)

    def prefix(self, told: Told, num: int) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """What stands before the codes, the class after the text, and which places of it are attended to."""
        label = jnp.zeros(num, jnp.int32) if told.label is None else told.label
        x = constrain(self.start, None, None)[label][:, None].astype(self.config.decoder.dtype)
        inside = jnp.ones((num, 1), bool)
        if told.text is None:
            return constrain(x, "batch", None, None), inside
        text = self.untold(told.text)
        features = self.reading(text.features.astype(self.config.decoder.dtype))
        x = constrain(jnp.concatenate([features, x], axis=1), "batch", None, None)
        return x, jnp.concatenate([text.inside, inside], axis=1)

    def places(self, before: int) -> Int[Array, "T 2"]:
        """Row and column of each code; of the prefix, 0 and 0."""
        row, column = (grid.reshape(-1) for grid in jnp.indices((self.side, self.side)))
        return jnp.pad(jnp.stack([row, column], axis=-1), ((before, 0), (0, 0)))

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return token_logits(x, self.head.embedding)

    def __call__(self, codes: Int[Array, "B N"], told: Told, *, train: bool = False) -> Float[Array, "B N"]:
        """log p of each code, nats."""
        prefix, inside = self.prefix(told, len(codes))
        x = jnp.concatenate([prefix, self.embed(codes[:, :-1])], axis=1)
        before, length = prefix.shape[1], x.shape[1]
        attended = jnp.pad(inside, ((0, 0), (0, length - before)), constant_values=True)
        mask = None if told.text is None else jnp.repeat(attended[:, None, None], length, axis=2)
        places = jnp.broadcast_to(self.places(before)[:length], (len(codes), length, 2))
        x = self.dropout(x, deterministic=not train)
        x, _ = self.decoder(x, places, mask, causal=True, train=train)
        return sequence_scores(self.logits, x[:, before - 1 :], codes, self.size).log_prob

    def feed(
        self,
        x: Float[Array, "B T D"],
        attended: Bool[Array, "B S"],
        cache: tuple[Cache, ...],
        slot: Int[Array, ""] | int,
        before: int,
    ) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
        """Logits of the code that follows x, which takes the places from `slot` on, and the cache with x.

        Args:
          before: places of the prefix.
        """
        places = jax.lax.dynamic_slice_in_dim(self.places(before), slot, x.shape[1])
        places = jnp.broadcast_to(places, (*x.shape[:2], 2))
        mask = jnp.repeat(attended[:, None, None], x.shape[1], axis=2)
        x, filled = self.decoder(x, places, mask, causal=True, cache=cache, slot=slot)
        assert filled is not None
        return self.logits(x[:, -1:])[:, 0], filled


def check_first(first: Model) -> Input:
    """The codes of a first stage.

    Raises:
      UserError: it makes none, or several at a place.
    """
    spec = first.latents
    if not isinstance(spec, Input) or spec.limit is None or first.encode is None or first.decode is None:
        raise UserError("the first stage does not encode images as codes and decode them: choose another for `first`")
    if len(spec.shape) != 2 or spec.shape[0] != spec.shape[1]:
        raise UserError(
            f"the first stage makes codes {list(spec.shape)} and must make a square of them: choose one book"
        )
    return spec


def build(config: Config) -> Model:
    """Draws codes and decodes them; a bound on the likelihood where the first stage has one of the pixels."""
    first = models.build(config.first)
    spec = check_first(first)
    side, size = spec.shape[0], spec.limit
    encode, decode_codes = first.encode, first.decode
    assert encode is not None and decode_codes is not None and size is not None
    module: Any = Codes(config, side, size)  # linen types what `apply` returns as a union
    reader = None if config.text is None else models.build(config.text)
    conditions = Conditions(config.classes, config.condition_dropout, reader)

    def init(key: Array, batch: Batch) -> Variables:
        first_key, prior_key, reader_key = jax.random.split(key, 3)
        variables = conditions.drawn(reader_key)
        codes = jnp.zeros((len(batch["image"]), side * side), jnp.int32)
        own = module.init(prior_key, codes, conditions.everything(variables, batch))
        stages = assembled({"first": first.init(first_key, {"image": batch["image"]})})
        return merge(merge(own, variables), stages)

    def stage(variables: Variables, image: Int[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """The codes."""
        return encode(part(variables, "first"), image)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy in nats a code."""
        del step
        told_key, dropout_key = jax.random.split(key)
        told = conditions.in_training(variables, batch, told_key) if train else conditions.everything(variables, batch)
        codes = batch["stage"] if "stage" in batch else stage(variables, batch["image"])
        codes = codes.reshape(len(codes), -1)
        log_probs = module.apply(variables, codes, told, train=train, rngs={"dropout": dropout_key})
        state = {collection: tree for collection, tree in variables.items() if collection != "params"}
        return -jnp.mean(log_probs), Aux({}, jnp.float32(len(codes)), state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        del key
        assert first.log_likelihood_given is not None
        codes = stage(variables, batch["image"])
        told = conditions.everything(variables, batch)
        log_prior = jnp.sum(module.apply(variables, codes.reshape(len(codes), -1), told), axis=1)
        return log_prior + first.log_likelihood_given(part(variables, "first"), batch["image"], codes)

    def sample(
        variables: Variables,
        key: Array,
        given: Batch,
        *,
        num: int,
        temperature: float = 1.0,
        sampling: Sampling,
    ) -> Int[Array, "num H W C"]:
        """The temperature is that of each code's softmax; pixels are the decoder's means.

        Raises:
          UserError: it is to be guided and is told nothing, or always was told.
        """
        told_key, code_key = jax.random.split(key)
        conditions.check_guidance(sampling.guidance)
        told = conditions.in_drawing(variables, given, told_key, num)
        guided = sampling.guidance != 1
        d, stack = unrolled(config.decoder, variables["params"]["decoder"])
        writer: Any = Codes(replace(config, decoder=d), side, size)
        own = {"params": {**variables["params"], "decoder": stack}}
        rows, count = 2 * num if guided else num, side * side
        x, inside = writer.apply(own, doubled(told, config.classes) if guided else told, rows, method="prefix")
        before = x.shape[1]
        attended = jnp.pad(inside, ((0, 0), (0, count)), constant_values=True)
        cache = empty_cache(rows, before + count, d.kv_heads, d.head_width, layers=d.depth, dtype=d.dtype)

        def draw(logits: Float[Array, "R V"], index: Array | int, key: Array) -> Int[Array, " num"]:
            if guided:
                with_told, without = jnp.split(logits, 2)
                last = count if sampling.guidance_codes is None else sampling.guidance_codes
                scale = jnp.where(index < last, sampling.guidance, 1.0)
                logits = without + scale * (with_told - without)
            return draw_token(key, logits, temperature=temperature, top_k=sampling.top_k, top_p=sampling.top_p)

        def step(cache: tuple[Cache, ...], code: Array, index: Array, key: Array) -> tuple[tuple[Cache, ...], Array]:
            x = writer.apply(own, jnp.tile(code, 2 if guided else 1)[:, None], method="embed")
            slot = before + index - 1
            logits, cache = writer.apply(own, x, attended, cache, slot, before, method="feed")
            return cache, draw(logits, index, key)

        logits, cache = writer.apply(own, x, attended, cache, 0, before, method="feed")
        code = draw(logits, 0, jax.random.fold_in(code_key, 0))
        rest = decode(step, cache, code, count, code_key, start=1)
        codes = jnp.concatenate([code[:, None], rest], axis=1).reshape(num, side, side)
        return decode_codes(part(variables, "first"), codes)

    text: tuple[Any, ...] = ()
    if reader is not None:
        text = (
            (r"untold/features$", (None, None)),
            (r"reading/up/kernel$", (None, "mlp")),
            (r"reading/up/bias$", ("mlp",)),
            (r"reading/down/kernel$", ("mlp", "embed")),
            (r"reading/down/bias$", (None,)),
        )
    density: dict[str, Any] = {"log_likelihood": log_likelihood, "count": subpixels, "bound": "lower"}
    return Model(
        inputs={"image": first.inputs["image"], **conditions.inputs},
        init=init,
        loss=loss,
        rules=(
            *under("first", first.rules),
            *conditions.rules,
            (r"^start$", (None, "embed")),
            *text,
            *vocabulary_rules(tied=False),
            *decoder_rules(config.decoder),
        ),
        latents=first.latents,
        encode=lambda variables, *rest: encode(part(variables, "first"), *rest),
        decode=lambda variables, latents: decode_codes(part(variables, "first"), latents),
        stage=stage,
        conditions=conditions.inputs,
        sampling=Sampling(),
        sample=sample,
        **(density if first.log_likelihood_given is not None else {}),
    )
