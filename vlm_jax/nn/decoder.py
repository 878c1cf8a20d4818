"""The decoder of today's language models: that of Llama (2302.13971, 2307.09288, 2407.21783) and its descendants."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, Slot, attend
from vlm_jax.nn.stack import StackConfig, stack
from vlm_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Rotations for contexts longer than those of the training (Llama 3.1).

    What turns fewer than `low_frequency` times within `original_length` tokens turns `factor` times more slowly, what
    turns more than `high_frequency` times as before, and between the two the rates are interpolated.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_frequency < self.high_frequency and self.original_length > 0):
            raise UserError(
                f"{self} scales no rotation: the factor must be at least 1, low_frequency above 0 and below "
                f"high_frequency, and original_length above 0"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Sizes of a stack of blocks with rotary positions, shared keys and values, and gated feed-forward."""

    kv_heads: int
    """Heads of keys and values, each of which heads / kv_heads neighbouring heads of queries share (2305.13245)."""
    head_width: int
    rope_base: float = 10_000.0
    rope_scaling: RotaryScaling | None = None
    qk_norm: Literal["none", "rms", "layer"] = "none"
    """Of each head of queries and keys, before the rotation. rms: with one scale for all heads, as Qwen3. layer: with
    a scale and bias for each head, as Chameleon (2405.09818)."""
    qkv_bias: bool = False
    """As Qwen2 (2407.10671)."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} heads of queries cannot share {self.kv_heads} heads of keys and values: choose kv_heads "
                f"that divide the heads"
            )
        if self.head_width % 2:
            raise UserError(f"a head of {self.head_width} features has no pairs to rotate: choose an even head_width")
        if not self.rope_base > 1:
            raise UserError(f"rope_base is {self.rope_base}: it must be above 1")


@dataclass(frozen=True, kw_only=True)
class PostNormDecoderConfig(DecoderConfig):
    """Of blocks that norm what they add: x + norm(attention(x)), then x + norm(mlp(x)).

    As Swin V2 (2111.09883) and Chameleon-34B (2405.09818, section 2.3.1), whose norms grow less with depth.
    """


@dataclass(frozen=True, kw_only=True)
class SeparateDecoderConfig(DecoderConfig):
    """Of blocks that have two feed-forward layers, one for texts and one for images, and one attention for both.

    As the decoders of Tuna-2 (2604.24763) and, of several modalities, of LMFusion (2412.15188).
    """


class Rotation(NamedTuple):
    """Of the pairs of features at each token's position, for all heads; fp32."""

    cos: Float[Array, "B T 1 d2"]
    sin: Float[Array, "B T 1 d2"]


class Setting(NamedTuple):
    """What the attention of every layer is told of the tokens."""

    rotation: Rotation
    mask: Bool[Array, "#B #H T _"] | None
    slot: Slot
    """Where in a cache the tokens go."""
    image: Bool[Array, "B T"] | None
    """Which places are an image's; None: it is not known, or none."""


def rotary_frequencies(config: DecoderConfig, coordinates: int = 1) -> list[float]:
    """Radians a position of each pair of features that turns with a coordinate: base ** (-2 i / d), scaled."""
    width = config.head_width // coordinates
    frequencies = [config.rope_base ** (-2 * i / width) for i in range(width // 2)]
    scaling = config.rope_scaling
    return frequencies if scaling is None else [scaled(frequency, scaling) for frequency in frequencies]


def scaled(frequency: float, scaling: RotaryScaling) -> float:
    """Of one pair."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    share = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    share = min(max(share, 0.0), 1.0)
    return frequency * (share + (1 - share) / scaling.factor)


def rotary(positions: Int[Array, "B T *A"], config: DecoderConfig) -> Rotation:
    """In fp32: bfloat16 has no number between 256 and 258.

    Args:
      positions: one number each, or several coordinates, each of which turns its share of the pairs (row and column:
        2406.06525, section 2.2).
    """
    coordinates = positions.reshape(*positions.shape[:2], 1, -1, 1).astype(jnp.float32)
    frequencies = jnp.array(rotary_frequencies(config, coordinates.shape[3]), jnp.float32)
    angles = (coordinates * frequencies).reshape(*positions.shape[:2], 1, -1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T H d"], by: Rotation) -> Float[Array, "B T H d"]:
    """Rotary position embedding (2104.09864), where feature i is a pair with feature i + d / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class RotaryAttention(nn.Module):
    """Causal or masked self-attention at rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], told: Setting, causal: bool, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config

        def project(name: str, heads: int, axis: str) -> Float[Array, "B T _ d"]:
            y = nn.Dense(heads * c.head_width, use_bias=c.qkv_bias, dtype=c.dtype, name=name)(x)
            return constrain(y.reshape(*x.shape[:2], heads, c.head_width), "batch", None, axis, None)

        def normalised(name: str, y: Float[Array, "B T _ d"]) -> Float[Array, "B T _ d"]:
            match c.qk_norm:
                case "rms":
                    return nn.RMSNorm(c.norm_eps, dtype=c.dtype, name=name)(y)
                case "layer":
                    return nn.LayerNorm(c.norm_eps, dtype=c.dtype, name=name, reduction_axes=-1, feature_axes=(-2, -1))(
                        y
                    )
            return y

        query = rotate(normalised("query_norm", project("query", c.heads, "heads")), told.rotation)
        key = rotate(normalised("key_norm", project("key", c.kv_heads, "kv_heads")), told.rotation)
        value = project("value", c.kv_heads, "kv_heads")
        y, cache = attend(query, key, value, told.mask, causal=causal, cache=cache, slot=told.slot)
        out = nn.Dense(c.width, use_bias=False, kernel_init=branch_init(c), dtype=c.dtype, name="out")
        return out(y.reshape(*x.shape[:2], -1)), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate, up = (nn.Dense(c.mlp, use_bias=False, dtype=c.dtype, name=name)(x) for name in ("gate", "up"))
        hidden = constrain(nn.silu(gate) * up, "batch", None, "mlp")
        return nn.Dense(c.width, use_bias=False, kernel_init=branch_init(c), dtype=c.dtype, name="down")(hidden)


def branch_init(config: DecoderConfig) -> nn.initializers.Initializer:
    """Each of the 2 * depth branches adds its share of variance, so that the sum's does not grow with depth."""
    return nn.initializers.variance_scaling(1 / (2 * config.depth), "fan_in", "normal")


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], told: Setting, causal: bool, train: bool, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y = nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        y, cache = RotaryAttention(c, name="attention")(y, told, causal, cache)
        x = x + dropout(y)
        y = nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="mlp_norm")(x)
        return x + dropout(SwiGLU(c, name="mlp")(y)), cache


class PostNormDecoderBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], told: Setting, causal: bool, train: bool, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y, cache = RotaryAttention(c, name="attention")(x, told, causal, cache)
        x = x + dropout(nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(y))
        y = SwiGLU(c, name="mlp")(x)
        return x + dropout(nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="mlp_norm")(y)), cache


class SeparateDecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), by the norm and feed-forward layer of texts or those of images."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], told: Setting, causal: bool, train: bool, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y = nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        y, cache = RotaryAttention(c, name="attention")(y, told, causal, cache)
        x = x + dropout(y)

        def fed(kind: str) -> Float[Array, "B T D"]:
            return SwiGLU(c, name=f"{kind}mlp")(nn.RMSNorm(c.norm_eps, dtype=c.dtype, name=f"{kind}mlp_norm")(x))

        text, image = fed(""), fed("image_")
        y = text if told.image is None else jnp.where(told.image[..., None], image, text)
        return x + dropout(y), cache


BLOCKS: dict[type[DecoderConfig], type[nn.Module]] = {
    DecoderConfig: DecoderBlock,
    PostNormDecoderConfig: PostNormDecoderBlock,
    SeparateDecoderConfig: SeparateDecoderBlock,
}


class Decoder(nn.Module):
    """`depth` blocks and a final norm; embedding and head are the family's."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T *A"],
        mask: Bool[Array, "#B 1 T _"] | None = None,
        *,
        causal: bool = False,
        cache: tuple[Cache, ...] | None = None,
        slot: Slot = 0,
        image: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None]:
        """Tokens at any positions, which the attention sees the differences of.

        With a `cache` of `depth` layers, they go into it from `slot` on, and attend to what is in it (`attend`); the
        layers are then `unrolled`.

        Args:
          image: which places are an image's, for blocks that tell them apart.
        """
        c = self.config
        told = Setting(rotary(positions, c), mask, slot, image)
        x, cache = stack(BLOCKS[type(c)], c, x.astype(c.dtype), told, causal, train, cache=cache)
        return nn.RMSNorm(c.norm_eps, dtype=c.dtype, name="final_norm")(constrain(x, "batch", None, None)), cache


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Sharding rules of a `Decoder`."""
    heads, kv_heads = ("heads", config.heads), ("kv_heads", config.kv_heads)
    biases = ((r"query/bias$", (heads,)), (r"(key|value)/bias$", (kv_heads,)))
    return (
        (r"query/kernel$", ("embed", heads)),
        (r"(key|value)/kernel$", ("embed", kv_heads)),
        *(biases if config.qkv_bias else ()),
        (r"out/kernel$", (heads, "embed")),
        (r"(gate|up)/kernel$", ("embed", "mlp")),
        (r"down/kernel$", ("mlp", "embed")),
        (r"norm/(scale|bias)$", (None,)),
    )
